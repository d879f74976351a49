"""Reads tokenisers and chat templates from folders and GGUF files."""

import contextlib
import json
import math
import pathlib
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from experiments import harness
from experiments.lm import checked_files

# Pre-tokenisers by their names in GGUF files.
_SPLITS = {
  'smollm': 'digits',
  'default': 'bytes',
  'gpt-2': 'bytes',
}
# Most characters of a chat template, and that a normaliser makes of one.
_MOST_TEMPLATE, _GROWTH = 2**20, 64
# Types of tokens in GGUF files. User-defined tokens match before merges.
_CONTROL, _USER_DEFINED = 3, 4
# The fields of a `tokenizer.Tokenizer`.
Parts = tuple[Any, str, int, dict[str, str], str, str]


@contextlib.contextmanager
def parsing(path: Any) -> Iterator[None]:
  """Turns errors of the package into a `DamagedDataError`; see `parsing`.

  Its panics, for instance of a pattern that backtracks for ever, are no
  `Exception`.
  """
  try:
    with harness.parsing(path, 'tokeniser'):
      yield
  except BaseException as error:
    if type(error).__name__ != 'PanicException':
      raise
    raise harness.DamagedDataError(
      f'{path} is damaged or no tokeniser: {checked_files.one_line(error)}.'
    ) from error


def _growth(part: Any) -> int:
  """Bounds how many characters a normaliser makes of one."""
  parts = part.values() if isinstance(part, dict) else part
  added = (
    [part.get(n) for n in ('content', 'prepend')] if parts is not part else []
  )
  own = sum(len(one) for one in added if isinstance(one, str))
  inner = [one for one in parts if isinstance(one, (dict, list))]
  return math.prod(map(_growth, inner), start=1 + own)


def from_folder(folder: pathlib.Path) -> Parts:
  """Reads a folder of Hugging Face; see `tokenizer.load`."""
  path = folder / 'tokenizer.json'
  if not checked_files.exists(path):
    raise harness.UserError(
      f'{folder} has no tokenizer.json; other formats are not supported.'
    )
  inner = _read_vocabulary(path, folder)
  config_file = folder / 'tokenizer_config.json'
  fields: dict[str, Any] = {}
  if checked_files.exists(config_file):
    fields = checked_files.read_json(config_file, folder)
  template, source = _chat_template(config_file, fields), config_file
  if checked_files.exists(template_file := folder / 'chat_template.jinja'):
    source = template_file
    template = checked_files.read_text(source, folder, _MOST_TEMPLATE)
  tokens = {}
  for name in ('bos_token', 'eos_token', 'pad_token', 'unk_token'):
    if token := fields.get(name):
      token = token.get('content') if isinstance(token, dict) else token
      tokens[name] = checked_files.typed(config_file, {name: token}, name, str)
  end = inner.token_to_id(tokens.get('eos_token', ''))
  if end is None:
    raise harness.UserError(
      f'{config_file} has no eos_token of tokenizer.json: set the token that '
      'ends an answer.'
    )
  return inner, template, end, tokens, str(source), str(path)


def _read_vocabulary(path: pathlib.Path, folder: pathlib.Path) -> Any:
  """Reads a `tokenizer.json`; raises DamagedDataError."""
  tokenizers = harness.load_extra('tokenizers', 'llm', 'a tokeniser')
  text = checked_files.read_text(path, folder)
  with parsing(path):
    inner = tokenizers.Tokenizer.from_str(text)
    # Prompts are never cut or padded by the tokeniser.
    inner.no_truncation()
    inner.no_padding()
    numbers = inner.get_vocab(with_added_tokens=True).values()
  if len(set(numbers)) < len(numbers) or not numbers:
    raise harness.DamagedDataError(
      f'{path} has no tokens, or several tokens of one number.'
    )
  with parsing(path):
    numbers = inner.encode(string.ascii_letters, add_special_tokens=False).ids
  if not numbers:
    raise harness.DamagedDataError(
      f'{path} has no tokens of letters, so that texts would be lost: get it '
      'again.'
    )
  for part in filter(None, (inner.normalizer, inner.decoder)):
    if _growth(json.loads(part.__getstate__())) > _GROWTH:
      raise harness.DamagedDataError(
        f'{path} has a normaliser or decoder that makes texts more than '
        f'{_GROWTH} times as long.'
      )
  if getattr(inner.model, 'dropout', None) is not None:
    raise harness.DamagedDataError(
      f'{path} has dropout={inner.model.dropout}, which splits words at '
      'random: set it to null.'
    )
  return inner


def _chat_template(path: pathlib.Path, fields: Mapping[str, Any]) -> str:
  """Returns the default template of a `tokenizer_config.json`; '' if unset."""
  template = fields.get('chat_template') or ''
  if isinstance(template, list):  # Several templates by name.
    named = [t for t in template if isinstance(t, dict) and 'name' in t]
    if len(named) < len(template):
      raise harness.DamagedDataError(
        f'{path} has chat_template without names, expected a text or a list of '
        'name and template.'
      )
    template = {str(t['name']): t.get('template') for t in named}
    template = template.get('default') or ''
  if not isinstance(template, str) or len(template) > _MOST_TEMPLATE:
    raise harness.DamagedDataError(
      f'{path} has no text of at most {_MOST_TEMPLATE:,} characters for '
      'chat_template.'
    )
  return template


def from_fields(fields: Mapping[str, Callable[[], Any]]) -> Parts:
  """Reads the fields of a GGUF file; see `tokenizer.load`."""
  source = fields['file']() if 'file' in fields else 'the GGUF file'
  with harness.parsing(source, 'tokeniser'):
    values = {name: field() for name, field in fields.items()}
  kind, split = values.get('ggml.model'), values.get('ggml.pre', 'default')
  if kind != 'gpt2' or split not in _SPLITS:
    raise harness.UserError(
      f'{source}: the tokeniser is {kind!r} with the split {split!r}; '
      f"supported: 'gpt2' with {', '.join(_SPLITS)}. Give the folder of "
      'Hugging Face with its tokenizer.json.'
    )
  words = _listed(source, values, 'ggml.tokens', str)
  merges = _listed(source, values, 'ggml.merges', str)
  kinds = _listed(source, values, 'ggml.token_type', int)
  if len(set(words)) < len(words) or len(kinds) > len(words):
    raise harness.DamagedDataError(
      f'{source} has a token twice, or more entries of ggml.token_type than '
      'tokens.'
    )
  template = values.get('chat_template', '')
  checked_files.typed(source, values, 'chat_template', str, '')
  with parsing(source):
    inner = _byte_pairs(words, merges, kinds, _SPLITS[split])
  last = len(words) - 1
  end = checked_files.integer(source, values, 'ggml.eos_token_id', 0, last)
  tokens = {'eos_token': words[end]}
  if values.get('ggml.bos_token_id') is not None:
    first = checked_files.integer(source, values, 'ggml.bos_token_id', 0, last)
    tokens['bos_token'] = words[first]
  return inner, template, end, tokens, str(source), str(source)


def _listed(
  source: Any, values: Mapping[str, Any], name: str, kind: type
) -> list[Any]:
  """Returns a list of values of a type; only token types may be missing."""
  default = [] if kind is int else None
  listed = checked_files.typed(source, values, name, list, default)
  if not all(type(one) is kind for one in listed):
    raise harness.DamagedDataError(
      f'{source} has {name} with other values than {kind.__name__}.'
    )
  return listed


def _byte_pairs(
  words: Sequence[str], merges: Sequence[str], kinds: Sequence[int], split: str
) -> Any:
  """Makes the tokeniser of a GGUF file."""
  tokenizers = harness.load_extra('tokenizers', 'llm', 'a tokeniser')
  pairs = [tuple(merge.split(' ', 1)) for merge in merges]
  if wrong := [pair for pair in pairs if len(pair) < 2]:
    raise ValueError(f'the merge {wrong[0][0]!r} has one part')
  inner = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      vocab={word: i for i, word in enumerate(words)},
      merges=pairs,
      fuse_unk=False,
    )
  )
  splitter = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=True
  )
  if split == 'digits':
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    splitter = tokenizers.pre_tokenizers.Sequence([digits, splitter])
  inner.pre_tokenizer = splitter
  inner.decoder = tokenizers.decoders.ByteLevel()
  inner.add_tokens(
    [
      tokenizers.AddedToken(
        words[i], special=kind == _CONTROL, normalized=False
      )
      for i, kind in enumerate(kinds)
      if kind in (_CONTROL, _USER_DEFINED)
    ]
  )
  return inner
