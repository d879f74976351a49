"""A byte tokeniser for small random models, without files or packages."""

import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from experiments.lm.tokenizer import ROLES_TEMPLATE, Tokenizer


class _Encoded(NamedTuple):
  ids: list[int]


class _Added(NamedTuple):
  content: str
  special: bool


class _Bytes:
  """One token per byte, and an end token."""

  END = 256
  encode_special_tokens = False  # Whether the text of the end token is bytes.

  def get_added_tokens_decoder(self) -> dict[int, _Added]:
    """Returns the added tokens by number."""
    return {self.END: _Added('</s>', True)}

  def encode(self, text: str, add_special_tokens: bool = False) -> _Encoded:
    del add_special_tokens
    parts = [text] if self.encode_special_tokens else text.split('</s>')
    ids = [token for part in parts for token in (self.END, *part.encode())]
    return _Encoded(ids[1:])

  def decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
    content = bytes(t for t in tokens if t < self.END)
    text = content.decode(errors='replace')
    ended = self.END in tokens and not skip_special_tokens
    return text + '</s>' * ended

  def save(self, path: str) -> None:
    """Writes the format of the package `tokenizers`, without the package."""
    byte_level = {
      'type': 'ByteLevel',
      'add_prefix_space': False,
      'trim_offsets': True,
      'use_regex': False,
    }
    end = {
      'id': self.END,
      'content': '</s>',
      'single_word': False,
      'lstrip': False,
      'rstrip': False,
      'normalized': False,
      'special': True,
    }
    fields = {
      'version': '1.0',
      'added_tokens': [end],
      'pre_tokenizer': byte_level,
      'decoder': byte_level,
      'model': {
        'type': 'BPE',
        'vocab': self.get_vocab(with_added_tokens=False),
        'merges': [],
      },
    }
    pathlib.Path(path).write_text(json.dumps(fields) + '\n', encoding='utf-8')

  def get_vocab(self, with_added_tokens: bool) -> dict[str, int]:
    """Returns the numbers of bytes in the byte-level BPE alphabet of GPT-2.

    Bytes that are not visible letters of Latin-1 are written as letters from
    256.
    """
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = iter(range(256, 512))
    letters = {chr(b if b in visible else next(hidden)): b for b in range(256)}
    return letters | ({'</s>': self.END} if with_added_tokens else {})


def make() -> Tokenizer:
  """Makes a tokeniser of 257 tokens with a template of roles."""
  tokens = {'eos_token': '</s>'}
  return Tokenizer(_Bytes(), ROLES_TEMPLATE, _Bytes.END, tokens)
