"""Broken GGUF files."""

import os
import struct

import numpy as np

from tests.faults.corpus import models
from tests.faults.corpus.models import MISSING, Case, edit, put, special

FILE = 'model.gguf'
_U32, _F32 = models._U32, models._F32
_TEXT, _ARRAY = models._TEXT, models._ARRAY


def metadata(kind=_U32, **changes):
  """Writes the file with other values; `__` stands for a dot."""
  named = {n.replace('__', '.'): (v, kind) for n, v in changes.items()}

  def damage(folder):
    (folder / FILE).unlink()
    models.write_gguf(folder / FILE, metadata=named)

  return damage


def tensors(change=None, family='llama', **changes):
  """Writes the file with other tensors."""
  named = {n.replace('__', '.'): v for n, v in changes.items()}

  def damage(folder):
    (folder / FILE).unlink()
    models.write_gguf(folder / FILE, tensors=named, family=family)

  return damage


def poke(at, pattern, *values):
  """Overwrites bytes at an offset."""
  new = struct.pack(pattern, *values)
  return edit(FILE, lambda raw: raw[:at] + new + raw[at + len(new) :])


def after(name, skip, pattern, *values):
  """Overwrites bytes after the name of a field or tensor."""
  new = struct.pack(pattern, *values)

  def change(raw):
    at = raw.index(name.encode()) + len(name) + skip
    return raw[:at] + new + raw[at + len(new) :]

  return edit(FILE, change)


def _array_of(count, kind, body):
  """A file with one array as its only field."""
  head = b'GGUF' + struct.pack('<IQQ', 3, 0, 1)
  name = struct.pack('<Q', 1) + b'a'
  return head + name + struct.pack('<IIQ', 9, kind, count) + body


def _many_arrays(count):
  """A file with arrays of a million numbers."""
  size = 10**6
  content = b'GGUF' + struct.pack('<IQQ', 3, 0, count)
  for i in range(count):
    content += struct.pack('<QBIIQ', 1, 97 + i, 9, 0, size) + bytes(size)
  return content


def _nested(depth):
  head = b'GGUF' + struct.pack('<IQQ', 3, 0, 1)
  name = struct.pack('<Q', 1) + b'a'
  return head + name + struct.pack('<I', 9) + struct.pack('<IQ', 9, 1) * depth


_QUERY = 'blk.1.attn_q.weight'
_NAN = np.full((16, 16), np.nan, np.float32)
_WORDS = models._metadata()['tokenizer.ggml.tokens'][0]
_DAMAGE = {
  'is empty': ('', put(FILE, b'')),
  'has four bytes': ('', put(FILE, b'GGUF')),
  'has another start': ('', poke(0, '<I', 7)),
  'is a git-lfs pointer': (
    'git lfs',
    put(FILE, 'version https://git-lfs.github.com/spec/v1\noid sha256:0\n'),
  ),
  'is of version 1': ('', poke(4, '<I', 1)),
  'is of version 99': ('', poke(4, '<I', 99)),
  'is of the other byte order': ('', poke(4, '>I', 3)),
  'announces 2**40 tensors': ('', poke(8, '<Q', 2**40)),
  'announces 2**63 tensors': ('', poke(8, '<Q', 2**63)),
  'announces 2**40 fields': ('', poke(16, '<Q', 2**40)),
  'announces no fields': ('', poke(16, '<Q', 0)),
  'has a name of 2**60 bytes': ('', poke(24, '<Q', 2**60)),
  'has a name of 2**63 bytes': ('', poke(24, '<Q', 2**63)),
  'has a field of unknown type': (
    '',
    after('llama.block_count', 0, '<I', 77),
  ),
  'has a name that is not UTF-8': (
    '',
    edit(FILE, lambda raw: raw.replace(b'llama.block', b'llama\xffblock')),
  ),
  'has a text that is not UTF-8': (
    '',
    edit(FILE, lambda raw: raw.replace(b'gpt2', b'gpt\xff')),
  ),
  'has a field twice': (
    '',
    edit(
      FILE,
      lambda raw: raw.replace(b'tokenizer.ggml.eos', b'tokenizer.ggml.bos'),
    ),
  ),
  'has a tensor twice': (
    '',
    edit(FILE, lambda raw: raw.replace(b'blk.1.attn_q', b'blk.0.attn_q')),
  ),
  'has an array of arrays': ('', put(FILE, _nested(5_000))),
  'is cut in its fields': ('', edit(FILE, lambda raw: raw[:300])),
  'is cut in its tensors': ('', edit(FILE, lambda raw: raw[:-64])),
  'has a tensor of 9 axes': ('', after(_QUERY, 0, '<I', 9)),
  'has a tensor of 2**31 axes': ('', after(_QUERY, 0, '<I', 2**31)),
  'has a tensor of 2**40 numbers': ('', after(_QUERY, 4, '<QQ', 2**20, 2**20)),
  'has a tensor whose size overflows': (
    '',
    after(_QUERY, 4, '<QQ', 2**40, 2**40),
  ),
  'has a tensor of no numbers': ('', after(_QUERY, 4, '<QQ', 0, 16)),
  'has a tensor of unknown type': ('', after(_QUERY, 20, '<I', 999)),
  'has a tensor of a removed type': ('', after(_QUERY, 20, '<I', 4)),
  'has a tensor of integers': ('', after(_QUERY, 20, '<I', 26)),
  'has a tensor beyond its end': ('', after(_QUERY, 24, '<Q', 2**40)),
  'has a tensor at 2**63': ('', after(_QUERY, 24, '<Q', 2**63)),
  'has overlapping tensors': ('overlap', after(_QUERY, 24, '<Q', 0)),
  'has an alignment of 0': ('', metadata(general__alignment=0)),
  'has an alignment of 7': ('', metadata(general__alignment=7)),
  'has NaN': (_QUERY, tensors(blk__1__attn_q__weight=_NAN)),
  'has infinity in float16': (
    _QUERY,
    tensors(blk__1__attn_q__weight=np.full((16, 16), np.inf, np.float16)),
  ),
  'lacks a tensor': (_QUERY, tensors(blk__1__attn_q__weight=MISSING)),
  'lacks the embedding': ('token_embd', tensors(token_embd__weight=MISSING)),
  'has an embedding of one axis': (
    'token_embd',
    tensors(token_embd__weight=np.zeros(16, np.float32)),
  ),
  'has another shape': (
    _QUERY,
    tensors(blk__1__attn_q__weight=np.zeros((8, 16), np.float32)),
  ),
  'is of another architecture': (
    'llama|gpt2',
    edit(
      FILE,
      lambda raw: raw.replace(
        b'\x05\0\0\0\0\0\0\0llama', b'\x05\0\0\0\0\0\0\0bloom', 1
      ),
    ),
  ),
  'has more layers than tensors': (
    r'blk\.2\.',
    metadata(llama__block_count=3),
  ),
  'has fewer layers than tensors': (
    r'blk\.1\.',
    metadata(llama__block_count=1),
  ),
  'has 2**31 layers': ('block_count', metadata(llama__block_count=2**31)),
  'has a list of heads': (
    'head_count',
    metadata(_ARRAY, llama__attention__head_count=[4, 4]),
  ),
  'has a text for its width': (
    'embedding_length',
    metadata(_TEXT, llama__embedding_length='16'),
  ),
  'has no heads': ('head_count', metadata(llama__attention__head_count=0)),
  'has no key heads': (
    'head_count',
    metadata(llama__attention__head_count_kv=0),
  ),
  'has 3 key heads': ('head', metadata(llama__attention__head_count_kv=3)),
  'has a width of 0': ('embedding_length', metadata(llama__embedding_length=0)),
  'has heads of width 0': (
    'key_length|head',
    metadata(llama__attention__key_length=0),
  ),
  'has heads of width 5': (
    'key_length|head',
    metadata(llama__attention__key_length=5),
  ),
  'has an epsilon of NaN': (
    'epsilon',
    metadata(_F32, llama__attention__layer_norm_rms_epsilon=float('nan')),
  ),
  'has a negative epsilon': (
    'epsilon',
    metadata(_F32, llama__attention__layer_norm_rms_epsilon=-1.0),
  ),
  'has no epsilon': (
    'epsilon',
    metadata(llama__attention__layer_norm_rms_epsilon=MISSING),
  ),
  'has a base of 0': ('freq_base', metadata(_F32, llama__rope__freq_base=0.0)),
  'has a base of NaN': (
    'freq_base',
    metadata(_F32, llama__rope__freq_base=float('nan')),
  ),
  'has scaled positions': (
    'rotary',
    metadata(_TEXT, llama__rope__scaling__type='yarn'),
  ),
  'has no end token': (
    'eos_token_id',
    metadata(tokenizer__ggml__eos_token_id=MISSING),
  ),
  'has an end token beyond its tokens': (
    'eos_token_id',
    metadata(tokenizer__ggml__eos_token_id=9_999),
  ),
  'has a start token beyond its tokens': (
    'bos_token_id',
    metadata(tokenizer__ggml__bos_token_id=9_999),
  ),
  'has a text for its end token': (
    'eos_token_id',
    metadata(_TEXT, tokenizer__ggml__eos_token_id='end'),
  ),
  'has no tokens': ('tokens', metadata(tokenizer__ggml__tokens=MISSING)),
  'has tokens that are numbers': (
    'tokens',
    metadata(_ARRAY, tokenizer__ggml__tokens=[1, 2]),
  ),
  'has a token twice': (
    'token',
    metadata(_ARRAY, tokenizer__ggml__tokens=[*_WORDS[:-1], _WORDS[0]]),
  ),
  'has more tokens than embeddings': (
    'embeddings',
    metadata(
      _ARRAY, tokenizer__ggml__tokens=[*_WORDS, *map(str, range(100, 150))]
    ),
  ),
  'has more token types than tokens': (
    'token_type',
    metadata(_ARRAY, tokenizer__ggml__token_type=[3] * 300),
  ),
  'has no merges': ('merges', metadata(tokenizer__ggml__merges=MISSING)),
  'has merges of one word': (
    'merge',
    metadata(_ARRAY, tokenizer__ggml__merges=['th']),
  ),
  'has merges of unknown tokens': (
    'erge|vocab|OOV',
    metadata(_ARRAY, tokenizer__ggml__merges=['zz yy']),
  ),
  'has another tokeniser': (
    'rwkv',
    metadata(_TEXT, tokenizer__ggml__model='rwkv'),
  ),
  'has a number for its template': (
    'chat_template',
    metadata(tokenizer__chat_template=5),
  ),
  'is a folder': ('', special(FILE, lambda path: path.mkdir())),
  'is a FIFO': ('regular', special(FILE, os.mkfifo)),
  'is a device': (
    'regular',
    special(FILE, lambda path: path.symlink_to('/dev/zero')),
  ),
}
_HEAVY = {
  'has an array of 2**40 numbers': put(FILE, _array_of(2**40, 0, b'abc')),
  'has an array of 2**40 texts': put(FILE, _array_of(2**40, 8, bytes(8))),
  'has an array of 2**63 arrays': put(FILE, _array_of(2**63, 9, bytes(16))),
  'has an array of 16,000,000 bytes': put(
    FILE, _array_of(16_000_000, 0, bytes(16_000_000))
  ),
  'has many arrays': put(FILE, _many_arrays(20)),
  'has an array of a million texts': put(
    FILE, _array_of(10**6, 8, bytes(8 * 10**6))
  ),
}
CASES = {
  f'{FILE} {name}': Case('gguf', FILE, cause, damage)
  for name, (cause, damage) in _DAMAGE.items()
} | {
  f'{FILE} {name}': Case('gguf', FILE, '', damage, heavy=True)
  for name, damage in _HEAVY.items()
}
