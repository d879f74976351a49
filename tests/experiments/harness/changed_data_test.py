"""One changed byte of any kind of data, and a resumed run refuses it."""

import json
import wave

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from experiments import harness
from experiments.lm import byte_tokenizer, row_files
from experiments.speech import audio

DRAW = np.random.default_rng(0)


def _arrays(path):
  np.save(path, DRAW.normal(size=(20, 3)).astype(np.float32))
  return -5, lambda: {'data': jnp.asarray(np.load(path))}


def _table(path):
  path.write_text('x,y\n' + '1.25,0\n0.5,1\n' * 10, encoding='utf-8')
  read = lambda: harness.read_table(path, header=True)
  return -4, lambda: {'data': [read().inputs, read().targets]}


def _audio(path):
  """The file itself is identified, and not only what it sounds like."""
  pytest.importorskip('soundfile', reason='needs the extra asr')
  with wave.open(str(path), 'wb') as file:
    file.setparams((1, 2, 8000, 0, 'NONE', ''))
    file.writeframes(DRAW.integers(-999, 999, 800, np.int16).tobytes())

  def task():
    rows = audio.read(audio.probe(path)).reshape(8, -1)
    return {'stream': harness.Stream(list(rows), 4, files=[path])}

  return -5, task


def _text(path):
  rows = [{'prompt': f'How much is {i} + 1?'} for i in range(20)]
  text = ''.join(json.dumps(row) + '\n' for row in rows)
  path.write_text(text, encoding='utf-8')

  def task():
    encode = byte_tokenizer.make().encode
    texts = [encode(row['prompt']) for row in row_files.read_rows(path)]
    tokens = [{'tokens': np.array(text, np.int32)} for text in texts]
    lengths = [len(text) for text in texts]
    padding = {'buckets': (64,), 'lengths': lengths, 'pad': {'tokens': 0}}
    return {'stream': harness.Stream(tokens, 4, **padding)}

  return -6, task


def _weights(path):
  safetensors = pytest.importorskip(
    'safetensors.numpy', reason='needs the extra llm'
  )
  weights = {'embedding': DRAW.normal(size=(20, 3)).astype(np.float32)}
  safetensors.save_file(weights, path)
  return -5, lambda: {'frozen': safetensors.load_file(path)}


def train(workdir, steps, task):
  loss = lambda params, batch: jnp.sum((params - batch) ** 2)
  return harness.train(
    optax.chain(bj.gradient(loss), optax.sgd(0.1)),
    harness.Task(lambda c: jnp.zeros(()), lambda c: c.step * 1.0, **task),
    harness.Training(steps, chunk=2, seeds=1, workdir=workdir),
  )


@pytest.mark.parametrize(
  ('write', 'suffix', 'name'),
  [
    (_arrays, 'npy', 'data'),
    (_table, 'csv', 'data 0'),
    (_audio, 'wav', r'data file data\.wav'),
    (_text, 'jsonl', 'streamed examples'),
    (_weights, 'safetensors', 'frozen weights embedding'),
  ],
)
def test_one_changed_byte_is_refused(tmp_path, write, suffix, name):
  path, workdir = tmp_path / f'data.{suffix}', tmp_path / 'run'
  place, task = write(path)
  train(workdir, 2, task())
  before = path.read_bytes()
  changed = bytearray(before)
  changed[place] ^= 1
  path.write_bytes(changed)
  with pytest.raises(harness.OtherRunError, match=f'changed: {name}\\.'):
    train(workdir, 4, task())
  path.write_bytes(before)
  assert train(workdir, 4, task()).step == 4
