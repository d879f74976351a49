"""A crafted file or checkpoint runs no code, and is reported in one line."""

import contextlib
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from experiments import harness
from experiments.benchmarks import suite
from experiments.harness.store import files
from experiments.lm import array_cache
from experiments.rl import policies
from experiments.speech import recogniser, transcribe
from experiments.tracking import models, track
from tests.faults import crafted

# What loads a file of a trained model, by the name of the file.
LOADERS = {
  'recogniser.npz': recogniser.load,
  'search.npz': models.load,
  'policy.npz': policies.load,
}
MEMBERS = ['about.npy', 'noise.npy', 'rules.npy', 'weights/embed.npy']
CONTENTS = {
  'pickle': crafted.pickle,
  'npy': crafted.npy,
  'npz': lambda marker: crafted.npz(marker, MEMBERS),
}


def test_the_files_do_run_code_where_pickles_are_loaded(tmp_path):
  """Otherwise the tests below would show nothing."""
  marker = tmp_path / 'marker'
  (tmp_path / 'a.npy').write_bytes(crafted.npy(marker))
  with pytest.raises(ValueError, match='allow_pickle'):
    np.load(tmp_path / 'a.npy')
  assert not marker.exists()
  options = {'allow' + '_pickle': True}
  np.load(tmp_path / 'a.npy', **options)
  assert marker.exists()


@pytest.mark.parametrize('content', CONTENTS)
@pytest.mark.parametrize('name', LOADERS)
def test_trained_models(tmp_path, name, content):
  path, marker = tmp_path / name, tmp_path / 'marker'
  path.write_bytes(CONTENTS[content](marker))
  with pytest.raises(harness.DamagedDataError) as error:
    LOADERS[name](path)
  assert str(path) in str(error.value) and '\n' not in str(error.value)
  assert not marker.exists()


@pytest.mark.parametrize('content', CONTENTS)
def test_programs_of_trained_models(tmp_path, content, capfd):
  marker = tmp_path / 'marker'
  for name in LOADERS:
    (tmp_path / name).write_bytes(CONTENTS[content](marker))
  flags = [f'--checkpoint={tmp_path}']
  (tmp_path / 'det.txt').write_text('1,-1,10,10,20,40,1,-1,-1,-1\n')
  files = [f'--detections={tmp_path}/det.txt', f'--output={tmp_path}/out.txt']
  for main, arguments in (
    (transcribe.main, [*flags, str(tmp_path / 'a.wav')]),
    (track.main, [*flags, *files]),
  ):
    assert main(arguments) not in (0, None)
    said = capfd.readouterr().err
    assert said.count('\n') == 1 and '.npz' in said, said
  assert not marker.exists()


@pytest.mark.parametrize('content', CONTENTS)
def test_caches(tmp_path, content):
  path, marker = tmp_path / 'cache.npz', tmp_path / 'marker'
  path.write_bytes(CONTENTS[content](marker))
  with pytest.warns(RuntimeWarning, match='is damaged'):
    assert array_cache._read(path, ['about', 'noise'], 1) is None
  row = tmp_path / 'rows' / 'a+b.json'
  row.parent.mkdir()
  row.write_bytes(CONTENTS[content](marker))
  options = harness.Options('', '', '', None, str(tmp_path), None, ())
  with pytest.warns(RuntimeWarning, match='is measured again'):
    assert suite._read(options, 'a/b') == {}
  assert not marker.exists()


def train(workdir):
  return harness.train(
    optax.chain(
      bj.gradient(lambda params, batch: jnp.sum((params - batch) ** 2)),
      optax.sgd(0.1),
    ),
    harness.Task(lambda context: jnp.zeros(3), lambda context: 1.0),
    harness.Training(steps=2, chunk=1, seeds=1, workdir=workdir),
  )


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp('run')
  return folder, train(folder)


@pytest.mark.parametrize(
  ('kind', 'path'),
  [
    ('object[1, 3]', ['params']),
    ('V8[1, 3]', ['params']),
    ('float32[1, 1000000000]', ['params']),
    ('float32[1000000000, 1000000000]', ['params']),
    ('float32[-1, 3]', ['params']),
    ('float32[1, 3]', ['..', '..', 'a']),
    ('float32[1, 3]', ['params', 0, [], {}]),
    ('float32[1, 3]', ['state', 0]),
    ('float32[1, 3]', []),
    (0, 0),
  ],
)
def test_a_description_with_a_valid_digest(run, tmp_path, kind, path):
  """Whoever crafts a checkpoint also writes digests that match."""
  folder, whole = run
  shutil.copytree(folder, workdir := tmp_path / 'run')
  for about in workdir.rglob('about/metadata'):
    content = files.unseal(about.read_bytes())
    leaf = content['leaves']['0000.params']
    leaf[0], leaf[2] = kind, path
    about.write_text(files.seal(content))
  for read in (harness.load, train):
    try:
      with warnings.catch_warnings(record=True):
        warnings.simplefilter('always')
        loaded = read(workdir)
    except harness.UserError as error:
      assert '\n' not in str(error)
      continue
    for leaf in jax.tree.leaves(loaded.params):
      np.testing.assert_array_equal(leaf, whole.params)
  with contextlib.suppress(harness.UserError), warnings.catch_warnings():
    warnings.simplefilter('ignore')
    harness.load(workdir, state=whole.state)
  assert [path.name for path in tmp_path.iterdir()] == ['run']


def test_every_file_of_a_checkpoint(run, tmp_path):
  """Its arrays, manifests and descriptions; see also `kills_test`."""
  folder, whole = run
  marker = tmp_path / 'marker'
  shutil.copytree(folder, workdir := tmp_path / 'run')
  for path in sorted(workdir.rglob('*')):
    if path.is_file():
      crafted.replace(path, marker)
  with pytest.warns(RuntimeWarning), pytest.raises(harness.MissingDataError):
    harness.load(workdir)
  with pytest.warns(RuntimeWarning):
    np.testing.assert_array_equal(train(workdir).params, whole.params)
  assert not marker.exists()
