"""Tests of checkpoints: what survives, and what a damaged one leads to."""

import resource
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import harness
from experiments.harness.store import checkpoints, files


def tree(step=0):
  return {
    'params': (jnp.arange(5.0) + step, jnp.ones((2, 3), jnp.bfloat16)),
    'flags': jnp.array([True, False]),
    'count': jnp.int32(step),
    'key': jax.random.split(jax.random.key(step), 3),
    'empty': jnp.zeros((0, 4)),
    'nothing': (None, ()),
  }


def data(value):
  is_key = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
  return np.asarray(jax.random.key_data(value) if is_key else value)


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    assert isinstance(x, jax.Array)
    np.testing.assert_array_equal(data(x), data(y))


@pytest.fixture
def saved(tmp_path):
  """Checkpoints of steps 10 and 20, closed; gives their folder."""
  manager = harness.Checkpoints(tmp_path / 'checkpoints')
  for step in (10, 20):
    manager.save(step, tree(step), {'seconds': float(step)})
  manager.close()
  return tmp_path / 'checkpoints'


def restore(folder, like=None):
  manager = harness.Checkpoints(folder)
  try:
    return manager.restore(tree() if like is None else like)
  finally:
    manager.close()


def largest_file(folder):
  files = [path for path in folder.rglob('*') if path.is_file()]
  return max(files, key=lambda path: path.stat().st_size)


class TestRestore:
  def test_everything_survives(self, saved):
    restored = restore(saved, jax.eval_shape(tree))
    assert (restored.step, restored.extra) == (20, {'seconds': 20.0})
    assert_same(restored.tree, tree(20))
    jax.random.uniform(restored.tree['key'][0])

  def test_restored_arrays_can_be_donated(self, saved):
    restored = restore(saved).tree['params'][0]
    jax.jit(lambda x: x + 1, donate_argnums=0)(restored)
    assert restored.is_deleted()

  def test_nothing_there(self, tmp_path):
    with warnings.catch_warnings():
      warnings.simplefilter('error')
      assert restore(tmp_path / 'new') is None

  def test_keeps_the_last_ones(self, tmp_path):
    manager = harness.Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
      manager.save(step, tree(step), {})
    manager.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ['2', '3']

  def test_another_structure_is_an_error_and_nothing_is_lost(self, saved):
    like = tree() | {'count': jnp.float32(0)}
    with pytest.raises(
      harness.OtherRunError, match=r'count is int32\[\] there and float32\[\]'
    ):
      restore(saved, like)
    with pytest.raises(harness.OtherRunError, match='absent there'):
      restore(saved, tree() | {'more': jnp.zeros(1)})
    assert restore(saved).step == 20


class TestDamage:
  @pytest.mark.parametrize(
    'kind', ['cut', 'flip', 'missing', 'about', 'digest', 'extra']
  )
  def test_falls_back_to_the_one_before(self, saved, kind):
    newest = saved / '20'
    target = largest_file(newest / 'leaves' / 'd')
    content = target.read_bytes()
    about = newest / 'about' / 'metadata'
    if kind == 'cut':
      target.write_bytes(content[: len(content) // 2])
    elif kind == 'flip':
      middle = len(content) // 2
      target.write_bytes(
        content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
      )
    elif kind == 'missing':
      target.unlink()
    elif kind == 'about':
      about.write_text('{"digest": ')
    elif kind == 'digest':
      about.write_text(
        about.read_text().replace('"_digest": "', '"_digest": "0')
      )
    else:  # Still good JSON.
      about.write_text(about.read_text().replace('20.0', '21.0'))
    manager = harness.Checkpoints(saved)
    with pytest.warns(RuntimeWarning, match='step 20 is damaged') as caught:
      restored = manager.restore(tree())
    assert len(caught) == 1
    assert restored.step == 10
    assert_same(restored.tree, tree(10))
    assert (saved.parent / 'damaged' / '20').is_dir()
    manager.save(20, tree(21), {})  # Its place is free again.
    manager.close()
    assert_same(restore(saved).tree, tree(21))

  def test_none_left_starts_anew(self, saved):
    for step in ('10', '20'):
      (saved / step / 'about' / 'metadata').write_text('')
    with pytest.warns(RuntimeWarning) as caught:
      assert restore(saved) is None
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 3
    assert 'starting at step 0' in messages[-1]

  @pytest.mark.parametrize('name', ['\u00b2', '\u0665\u0660', '050'])
  def test_a_step_in_other_digits_is_put_aside(self, saved, name):
    """Python reads the digits of any script, and fails on a superscript."""
    shutil.copytree(saved / '20', saved / name)
    with pytest.warns(RuntimeWarning, match='plain digits; moved to') as caught:
      assert restore(saved).step == 20
    assert len(caught) == 1
    assert (saved.parent / 'damaged' / name).is_dir()
    assert sorted(path.name for path in saved.iterdir()) == ['10', '20']

  def test_a_half_written_checkpoint_is_ignored(self, saved):
    (saved / '30.orbax-checkpoint-tmp').mkdir()
    assert restore(saved).step == 20

  def test_a_run_goes_on_from_the_one_before(self, train, tmp_path):
    """The damaged run must end as an undamaged one, records included."""
    folder = tmp_path / 'run'
    stop = lambda history: len(history['score']) >= 3
    train(stop_when=stop)
    (folder / 'checkpoints' / '30' / 'about' / 'metadata').write_text('{')
    with pytest.warns(RuntimeWarning, match='step 30 is damaged'):
      resumed = train()
    whole = train(workdir=tmp_path / 'whole')
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)
    assert (folder / 'metrics.jsonl').read_bytes() == (
      tmp_path / 'whole' / 'run' / 'metrics.jsonl'
    ).read_bytes()

  @pytest.mark.slow
  @pytest.mark.parametrize('second', ['metrics', 'settings', 'checkpoint'])
  def test_two_damaged_files_at_once_are_both_put_aside(
    self, train, tmp_path, second
  ):
    """And no record is lost without a warning."""
    folder, whole = tmp_path / 'run', tmp_path / 'whole' / 'run'
    train(workdir=tmp_path / 'whole')
    train(steps=30)
    about = folder / 'checkpoints' / '30' / 'about' / 'metadata'
    other = {
      'metrics': folder / 'metrics.jsonl',
      'settings': folder / 'settings.json',
      'checkpoint': folder / 'checkpoints' / '20' / 'about' / 'metadata',
    }[second]
    for path in (about, other):
      path.write_bytes(path.read_bytes().replace(b'{', b'[', 1))
    with pytest.warns(RuntimeWarning) as caught:
      resumed = train()
    told = [str(warning.message) for warning in caught]
    lost = {'metrics': 1, 'settings': 0, 'checkpoint': 0}[second]
    assert len(told) == (3 if second == 'checkpoint' else 2)
    assert all('damaged' in words for words in told)
    moved = {path.name for path in (folder / 'damaged').iterdir()}
    assert (
      moved
      == {
        'metrics': {'30', 'metrics.jsonl'},
        'settings': {'30', 'settings.json'},
        'checkpoint': {'20', '30', 'metrics.jsonl'},
      }[second]
    )
    assert len(resumed.steps) == 4 - lost
    lines = [x / 'metrics.jsonl' for x in (folder, whole)]
    here, there = [x.read_bytes().splitlines() for x in lines]
    assert here == there[lost:]

  def test_a_record_that_is_missing_is_told(self, train, tmp_path):
    """The checkpoint knows how many there were."""
    train(steps=30)
    path = tmp_path / 'run' / 'metrics.jsonl'
    first, _, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + last)
    with pytest.warns(RuntimeWarning, match='the history has a gap'):
      assert train().steps.tolist() == [10, 30, 40]
    assert train().steps.tolist() == [10, 30, 40]  # Known by now.


class TestWriting:
  def test_a_full_disk_is_one_clear_error(self, saved):
    """A limit on the size of files fails as a full disk does."""
    big = tree(30) | {
      'big': jnp.asarray(np.random.default_rng(0).random(10**6))
    }
    manager = harness.Checkpoints(saved)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
      manager.save(30, big, {})  # In the background.
      with pytest.raises(harness.WriteError) as error:
        manager.wait()
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
      manager.close()
    assert str(saved) in str(error.value)
    assert 'writable folder' in str(error.value)
    assert len(str(error.value)) < 500
    assert restore(saved).step == 20

  def test_what_is_saved_may_be_donated_at_once(self, tmp_path):
    """Finds a save in the background that reads what the run overwrites."""
    double = jax.jit(lambda x: 2 * x, donate_argnums=0)
    manager = harness.Checkpoints(tmp_path)
    value = jax.block_until_ready(jnp.ones(10**6) * 3)
    manager.save(1, {'a': value}, {})
    for _ in range(5):
      value = double(value)
    jax.block_until_ready(value)
    manager.close()
    restored = restore(tmp_path, {'a': value})
    np.testing.assert_array_equal(restored.tree['a'], np.full(10**6, 3.0))

  def test_a_save_waits_for_the_one_before(self, tmp_path):
    manager = harness.Checkpoints(tmp_path, keep=5)
    for step in range(1, 5):
      manager.save(step, tree(step), {})
    manager.wait()
    assert not manager.busy
    assert sorted(path.name for path in tmp_path.iterdir()) == list('1234')
    manager.close()

  def test_a_workdir_that_cannot_be_made(self, train, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(
      OSError, match=r'cannot write to .*file/here.*--workdir'
    ):
      train(workdir=tmp_path / 'file' / 'here')


def test_settings_are_compared_as_json(tmp_path):
  path = tmp_path / 'settings.json'
  checkpoints.check_settings(path, {'sizes': (1, 2), 'rate': 0.1})
  checkpoints.check_settings(path, {'rate': 0.1, 'sizes': [1, 2]})
  with pytest.raises(harness.OtherRunError) as error:
    checkpoints.check_settings(path, {'rate': 0.2, 'depth': 3})
  for difference in (
    'rate: 0.1 -> 0.2',
    'sizes: [1, 2] -> absent',
    'absent -> 3',
  ):
    assert difference in str(error.value)
  assert files.unseal(path.read_text()) == {'sizes': [1, 2], 'rate': 0.1}


def test_of_nested_settings_the_parts_that_differ_are_named(tmp_path):
  path = tmp_path / 'settings.json'
  data = {'batch': 4, 'audio and transcripts': 'ab'}
  checkpoints.check_settings(path, {'stream': data, 'rate': {'a': 1}})
  with pytest.raises(harness.OtherRunError) as error:
    checkpoints.check_settings(
      path, {'stream': data | {'audio and transcripts': 'cd'}, 'rate': 2}
    )
  assert (
    'rate: absent -> 2; rate.a: 1 -> absent; '
    'stream.audio and transcripts: ab -> cd.'
  ) in str(error.value)


def test_changed_data_are_named_in_words(tmp_path):
  """Without digests, and after the flags."""
  path = tmp_path / 'settings.json'
  digests = {f'{i:016x}': 0 for i in range(5)}
  one, two, three, four, five = digests
  before = {
    'train.data': one,
    "train.data['train']['sft'].parts[0]['tokens']": one,
    "train.files['a.bin']": one,
    'train.files["it\'s.bin"]': one,
    'train.chunk': 2,
    'train.stream': {'digest': one, 'seed': 0},
    "train.own['x']": one,
  }
  now = {
    'train.data': two,
    "train.data['train']['sft'].parts[0]['tokens']": two,
    "train.files['a.bin']": three,
    'train.files["it\'s.bin"]': three,
    'train.chunk': 3,
    'train.stream': {'digest': four, 'seed': 0},
    'zeta': 0.5,
    'train.frozen': five,
  }
  checkpoints.check_settings(path, before)
  with pytest.raises(harness.OtherRunError) as error:
    checkpoints.check_settings(path, now)
  assert str(error.value) == (
    f'{tmp_path} holds a run with other settings or data: chunk: 2 -> 3; '
    'zeta: absent -> 0.5; changed: data; changed: data '
    "train/sft/parts/0/tokens; changed: data file it's.bin; "
    'changed: data file a.bin; new: frozen '
    'weights; missing: data of each seed x; changed: streamed examples. Give '
    'another --workdir, or delete this one.'
  )


@pytest.mark.parametrize(
  'content', [b'', b'{"rate": 0.1', b'[]', b'\xff\xfe', None]
)
def test_damaged_settings_are_put_aside(tmp_path, content):
  path = tmp_path / 'settings.json'
  checkpoints.check_settings(path, {'rate': 0.1})
  written = path.read_bytes()
  content = written.replace(b'1', b'2') if content is None else content
  path.write_bytes(content)
  with pytest.warns(RuntimeWarning, match=r'settings.json is damaged .*moved'):
    checkpoints.check_settings(path, {'rate': 0.1})
  assert path.read_bytes() == written
  assert (tmp_path / 'damaged' / 'settings.json').read_bytes() == content
  path.unlink()
  path.mkdir()
  with pytest.warns(RuntimeWarning, match=r'damaged \(a folder\): taking'):
    checkpoints.check_settings(path, {'rate': 0.1})
