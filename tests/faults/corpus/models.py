"""Makes broken files of language models, each from a valid one.

    models.make('model', 'config.json: rope_theta is 0', folder)

A case has a loader, the file that the error has to name, a pattern of the
cause, and a function that breaks a valid folder.
"""

import functools
import gzip
import json
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from experiments.lm import (
  adapter_files,
  data,
  decoder,
  hugging_face,
  lora,
  tokenizer,
  weights,
)
from experiments.lm import config as config_lib
from experiments.seal import evaluate
from tests.experiments.lm import weights_test

# The imported test skips without the other packages.
gguf = pytest.importorskip('gguf', reason=weights_test._WHY)

CONFIG = config_lib.Config(
  family='llama',
  layers=2,
  width=16,
  hidden=24,
  heads=4,
  kv_heads=2,
  head_width=4,
  vocabulary=260,
  rope_base=1e4,
  norm_epsilon=1e-5,
  tied=True,
  context=64,
)
MESSAGES = (
  {'role': 'user', 'content': 'Hello'},
  {'role': 'assistant', 'content': 'Hi'},
)
MISSING = object()
Break = Callable[[pathlib.Path], Any]


class Case(NamedTuple):
  """A broken file.

  Attributes:
    loader: one of `LOADERS`.
    file: the file that the error has to name.
    cause: pattern that the error has to match.
    damage: breaks a valid folder of the loader.
    heavy: whether a loader without limits would need much memory or time.
  """

  loader: str
  file: str
  cause: str
  damage: Break
  heavy: bool = False


def _render(folder: pathlib.Path) -> str:
  return tokenizer.load(folder).render(MESSAGES)


@functools.cache
def _params() -> decoder.Params:
  return decoder.init(CONFIG, 0)


# What reads the folder of a case.
LOADERS: dict[str, Callable[[pathlib.Path], Any]] = {
  'model': lambda folder: weights.load_both(str(folder)),
  'template': _render,
  'gguf': lambda folder: weights.load_both(str(folder / 'model.gguf')),
  'adapters': lambda folder: adapter_files.load(folder, CONFIG, _params()),
  'rows': lambda folder: data.read(folder / 'rows.jsonl'),
  'list': lambda folder: data.read(folder / 'rows.json'),
  'packed': lambda folder: data.read(folder / 'rows.jsonl.gz'),
  'scores': lambda folder: evaluate.read(str(folder / 'scores.jsonl')),
}
ROWS = [{'prompt': 'a', 'response': 'b'}, {'prompt': 'c', 'response': 'd'}]
SCORES = [
  {'row': 0, 'seal': 0.5, 'kind': 'unsafe'},
  {'row': 1, 'seal': None, 'kind': 'safe'},
]


def lines(rows: Any) -> bytes:
  """Writes rows as JSON lines."""
  return b''.join(json.dumps(row).encode() + b'\n' for row in rows)


@functools.cache
def _valid(loader: str) -> pathlib.Path:
  """Makes a valid folder once."""
  folder = pathlib.Path(tempfile.mkdtemp())
  params = _params()
  if loader in ('model', 'template'):
    hugging_face.export(
      folder, CONFIG, params, weights_test.words(), generation={}
    )
  elif loader == 'adapters':
    adapters = lora.init(params, jax.random.key(0), rank=2)
    adapter_files.export(
      folder, CONFIG, adapters, alpha=4.0, base_params=params
    )
  elif loader == 'gguf':
    write_gguf(folder / 'model.gguf')
  elif loader == 'rows':
    (folder / 'rows.jsonl').write_bytes(lines(ROWS))
  elif loader == 'packed':
    (folder / 'rows.jsonl.gz').write_bytes(gzip.compress(lines(ROWS)))
  elif loader == 'list':
    (folder / 'rows.json').write_text(json.dumps(ROWS))
  elif loader == 'scores':
    (folder / 'scores.jsonl').write_bytes(lines(SCORES))
  return folder


def make(case: Case, folder: pathlib.Path) -> None:
  """Makes the files of a case in an empty folder."""
  copy_valid(case.loader, folder)
  case.damage(folder)


def copy_valid(loader: str, folder: pathlib.Path) -> None:
  """Copies the valid files of a loader."""
  shutil.copytree(_valid(loader), folder, dirs_exist_ok=True)


def put(file: str, content: bytes | str) -> Break:
  """Replaces a file."""
  content = content.encode() if isinstance(content, str) else content

  def damage(folder):
    (folder / file).write_bytes(content)

  return damage


def edit(file: str, change: Callable[[bytes], bytes]) -> Break:
  """Changes the bytes of a file."""

  def damage(folder):
    path = folder / file
    path.write_bytes(change(path.read_bytes()))

  return damage


def fields(file: str, changes: dict[str, Any]) -> Break:
  """Changes the fields of a JSON file; MISSING removes them."""

  def change(raw):
    merged = {**json.loads(raw), **changes}
    kept = {n: v for n, v in merged.items() if v is not MISSING}
    return json.dumps(kept).encode()

  return edit(file, change)


def special(file: str, make: Callable[[pathlib.Path], Any]) -> Break:
  """Replaces a file by a folder, FIFO or link."""

  def damage(folder):
    path = folder / file
    path.unlink(missing_ok=True)
    make(path)

  return damage


# Values of the metadata of a valid GGUF file, with their types.
_U32, _F32 = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.FLOAT32
_TEXT, _ARRAY = gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY


def _metadata() -> dict[str, tuple[Any, Any]]:
  alphabet = sorted(weights_test.tokenizers.pre_tokenizers.ByteLevel.alphabet())
  words = [*alphabet, 'th', '<s>', '</s>', '<pad>']
  return {
    'llama.block_count': (CONFIG.layers, _U32),
    'llama.context_length': (64, _U32),
    'llama.embedding_length': (CONFIG.width, _U32),
    'llama.feed_forward_length': (CONFIG.hidden, _U32),
    'llama.attention.head_count': (CONFIG.heads, _U32),
    'llama.attention.head_count_kv': (CONFIG.kv_heads, _U32),
    'llama.attention.layer_norm_rms_epsilon': (1e-5, _F32),
    'llama.rope.freq_base': (1e4, _F32),
    'tokenizer.ggml.model': ('gpt2', _TEXT),
    'tokenizer.ggml.pre': ('smollm', _TEXT),
    'tokenizer.ggml.tokens': (words, _ARRAY),
    'tokenizer.ggml.token_type': ([1] * 257 + [3] * 3, _ARRAY),
    'tokenizer.ggml.merges': (['t h'], _ARRAY),
    'tokenizer.ggml.eos_token_id': (258, _U32),
    'tokenizer.ggml.bos_token_id': (257, _U32),
    'tokenizer.chat_template': (weights_test.TEMPLATE, _TEXT),
  }


def _gguf_tensors() -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  width, hidden = CONFIG.width, CONFIG.hidden
  key = CONFIG.kv_heads * CONFIG.head_width
  tensors = {
    'token_embd.weight': draw(CONFIG.vocabulary, width),
    'output_norm.weight': draw(width),
  }
  for i in range(CONFIG.layers):
    shapes = {
      'attn_norm': (width,),
      'attn_q': (width, width),
      'attn_k': (key, width),
      'attn_v': (key, width),
      'attn_output': (width, width),
      'ffn_norm': (width,),
      'ffn_gate': (hidden, width),
      'ffn_up': (hidden, width),
      'ffn_down': (width, hidden),
    }
    for name, shape in shapes.items():
      tensors[f'blk.{i}.{name}.weight'] = draw(*shape)
  return tensors


def write_gguf(
  path: pathlib.Path,
  metadata: dict[str, Any] | None = None,
  tensors: dict[str, Any] | None = None,
  family: str = 'llama',
) -> None:
  """Writes a GGUF file with changes of its metadata and tensors."""
  writer = gguf.GGUFWriter(path, family)
  for name, (value, kind) in {**_metadata(), **(metadata or {})}.items():
    if value is not MISSING:
      sub = None
      if kind == _ARRAY and not value:
        continue
      writer.add_key_value(name, value, kind, sub)
  for name, array in {**_gguf_tensors(), **(tensors or {})}.items():
    if array is not MISSING:
      writer.add_tensor(name, array)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
