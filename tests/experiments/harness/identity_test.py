"""Digests of a run's arrays and files."""

import hashlib
import os
import pathlib

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import bilevel_jax as bj
from experiments import harness
from experiments.harness.store import identity


def test_tells_arrays_apart_and_names_them():
  rows = np.arange(12.0).reshape(3, 4)
  found = identity.digests('data', {'a': rows, 'b': (rows.T, rows + 0)})
  assert list(found) == ["data['a']", "data['b'][0]", "data['b'][1]"]
  a, transposed, again = found.values()
  assert a == again != transposed
  same = identity.digests('', [rows, rows.reshape(-1), np.float32(rows)])
  assert len(set(same.values())) == 3
  keys = [jax.random.key(0), jax.random.key(1)]
  assert len(set(identity.digests('', keys).values())) == 2
  on_device = identity.digests('', np.float32(rows))
  many = [rows] * 20
  assert list(identity.digests('data', many)) == ['data']
  assert identity.digest(many) != identity.digest([*many[:-1], rows + 1])
  assert on_device == identity.digests('', jax.numpy.float32(rows))


def test_is_that_of_earlier_runs_up_to_16_mib():
  """So that a run of an earlier version goes on."""
  array = np.arange(2**22, dtype=np.int32)
  head = b'int32(4194304,)'
  digest = hashlib.blake2b(head + array.tobytes(), digest_size=8).hexdigest()
  assert identity.digests('', array) == {'': digest}


def places(count):
  """First, middle, last and drawn places, also beside the edges of blocks."""
  drawn = np.random.default_rng(0).integers(count, size=4).tolist()
  return [0, count // 2, count - 1, *drawn]


def test_every_number_of_a_large_array_counts():
  """Those of several blocks of 16 MiB, the last one cut, and of views."""
  labels = np.zeros(2**24 * 2 + 1001, np.int8)
  of = lambda x: identity.digests('', x)['']
  before = of(labels)
  assert before == of(labels.copy()) == of(jax.numpy.asarray(labels))
  for place in [*places(len(labels)), 2**24 - 1, 2**24]:
    labels[place] ^= 1
    assert of(labels) != before
    labels[place] ^= 1
  assert of(labels[::-1]) == before
  labels[0] = 1
  assert of(labels[::-1]) != of(labels)
  mesh = jax.make_mesh((8,), ('rows',), axis_types=(AxisType.Auto,))
  rows = np.arange(2**21 * 8, dtype=np.float32).reshape(-1, 8)
  split = jax.device_put(rows, NamedSharding(mesh, PartitionSpec('rows')))
  assert of(split) == of(rows)


def test_every_number_of_every_example_counts():
  examples = [
    {'x': np.full(2 + i % 3, i, np.float32), 'label': np.int32(i % 2)}
    for i in range(101)
  ]
  before = identity.digest_examples(examples)
  assert before == identity.digest_examples(iter(examples))
  for place in places(len(examples)):
    for name in ('x', 'label'):
      changed = [dict(example) for example in examples]
      changed[place][name] = changed[place][name] + 1
      assert identity.digest_examples(changed) != before
  # Neither where one ends and the next begins, nor types, nor keys.
  digests = [
    identity.digest_examples(one)
    for one in (
      [[1, 2], [3]],
      [[1], [2, 3]],
      [np.array([1, 2]), np.array([3])],
      [np.array([1]), np.array([2, 3])],
      [{'a': np.int32(1)}],
      [{'b': np.int32(1)}],
      [{'a': np.float32(1)}],
      [],
    )
  ]
  assert len(set(digests)) == len(digests)


def train(workdir, steps, **task):
  loss = lambda params, batch: jax.numpy.mean((params - batch) ** 2)
  return harness.train(
    optax.chain(bj.gradient(loss), optax.sgd(0.1)),
    harness.Task(lambda context: jax.numpy.zeros(()), **task),
    harness.Training(steps, chunk=2, seeds=1, workdir=workdir),
  )


@pytest.mark.parametrize('kind', ['data', 'stream'])
def test_a_resumed_run_refuses_one_changed_label(tmp_path, kind):
  """Of 101 examples, or in an array above 16 MiB."""
  if kind == 'data':
    labels = np.zeros(2**24 + 101, np.int8)
    given = lambda: {
      'data': {'labels': labels},
      'batch': lambda context: context.data['labels'][:1],
    }
    name = r'data: changed: data labels\.'
  else:
    labels = np.zeros(101, np.int8)
    given = lambda: {
      'stream': harness.Stream([{'label': x} for x in labels], 10),
      'batch': lambda context: context.streamed['label'],
    }
    name = r'data: changed: streamed examples\.'
  run = lambda steps: train(tmp_path, steps, **given())
  run(2)
  for place in places(len(labels)):
    labels[place] = 1
    with pytest.raises(harness.OtherRunError, match=name):
      run(4)
    labels[place] = 0
  assert run(4).step == 4


class Files:
  """Examples that are read when they are asked for."""

  def __init__(self, paths):
    self.paths, self.read = list(paths), 0

  def __len__(self):
    return len(self.paths)

  def __getitem__(self, i):
    self.read += 1
    return np.fromfile(self.paths[i], np.int32)


@pytest.mark.parametrize('count', [12, 30])
def test_a_resumed_run_refuses_one_changed_file(tmp_path, count):
  folder, workdir = tmp_path / 'a', tmp_path / 'run'
  folder.mkdir()
  for i in range(count):
    np.full(4, i, np.int32).tofile(folder / f'{i:02}.bin')

  def run(steps, folder=folder):
    source = Files(sorted(folder.glob('*.bin')))
    stream = harness.Stream(source, 4, files=source.paths)
    trained = train(
      workdir, steps, stream=stream, batch=lambda context: context.streamed
    )
    return trained.step

  run(2)
  for i in (0, count // 2, count - 1):
    path = folder / f'{i:02}.bin'
    kept = path.read_bytes()
    np.full(4, -1, np.int32).tofile(path)
    name = f'data file {i:02}.bin' if count <= 16 else 'data file'
    with pytest.raises(harness.OtherRunError, match=f'changed: {name}'):
      run(4)
    path.write_bytes(kept)
  # The same files elsewhere are the same data.
  assert run(4, folder.rename(tmp_path / 'b')) == 4


def test_a_file_is_read_once_while_it_does_not_change(tmp_path, monkeypatch):
  paths = [tmp_path / name for name in ('large', 'small', 'empty')]
  content = bytearray(2**25 + 7)
  for path, size in zip(paths, (len(content), 3, 0)):
    path.write_bytes(content[:size])
  read = []
  hashed = identity._hash_block
  monkeypatch.setattr(
    identity,
    '_hash_block',
    lambda block: read.append(pathlib.Path(block[0]).name) or hashed(block),
  )

  def digest():
    read.clear()
    return identity.digest_files('f', paths, tmp_path / 'run')

  (tmp_path / 'run').mkdir()
  before = digest()
  assert sorted(read) == ['empty', 'large', 'large', 'large', 'small']
  assert list(before) == ["f['large']", "f['small']", "f['empty']"]
  assert digest() == before and not read
  for place in [*places(len(content)), 2**24 - 1, 2**24]:
    content[place] ^= 1
    paths[0].write_bytes(content)
    os.utime(paths[0], ns=(0, place))  # However coarse the clock is.
    after = digest()
    assert set(read) == {'large'}
    assert {k for k in after if after[k] != before[k]} == {"f['large']"}
    content[place] ^= 1
  # Another file of the same size and time has another inode.
  stat = paths[1].stat()
  (tmp_path / 'new').write_bytes(b'abc')
  (tmp_path / 'new').replace(paths[1])
  os.utime(paths[1], ns=(stat.st_atime_ns, stat.st_mtime_ns))
  assert digest()["f['small']"] != before["f['small']"]
  # What is kept of digests is not trusted if it is damaged.
  kept = tmp_path / 'run' / 'digests.json'
  kept.write_text(kept.read_text().replace(after["f['large']"], '0' * 16))
  paths[0].write_bytes(bytes(len(content)))
  assert digest()["f['large']"] == before["f['large']"]
  paths[2].unlink()
  with pytest.raises(harness.MissingDataError, match='empty cannot be read'):
    digest()
