"""Broken files of JSON in a model's folder."""

import os

from tests.faults.corpus.models import (
  MISSING,
  Case,
  edit,
  fields,
  put,
  special,
)

_SIZES = (
  'num_hidden_layers',
  'hidden_size',
  'intermediate_size',
  'num_attention_heads',
  'vocab_size',
)
# Files of JSON that a model's folder has.
_FILES = (
  'config.json',
  'generation_config.json',
  'tokenizer.json',
  'tokenizer_config.json',
)


def _damaged(file):
  """Damage that any file of JSON may have: name -> (cause, function)."""
  deep = b'{"a":' + b'[' * 100_000 + b']' * 100_000 + b'}'
  return {
    'is empty': ('', put(file, b'')),
    'is cut short': ('', edit(file, lambda raw: raw[: len(raw) // 2])),
    'is a list': ('', put(file, b'[]')),
    'is null': ('', put(file, b'null')),
    'is a text': ('', put(file, b'"a"')),
    'is a number': ('', put(file, b'1')),
    'has zero bytes': ('', put(file, bytes(64))),
    'is UTF-16': ('', edit(file, lambda raw: raw.decode().encode('utf-16'))),
    'has a byte that is not UTF-8': (
      '',
      edit(file, lambda raw: raw.rstrip()[:-1] + b',"a":"\xff"}'),
    ),
    'has text after its end': ('', edit(file, lambda raw: raw + b'{}')),
    'is deep': ('', put(file, deep)),
    'has a number of many digits': (
      '',
      edit(
        file, lambda raw: raw.rstrip()[:-1] + b',"a":' + b'9' * 9_999 + b'}'
      ),
    ),
    'is a folder': ('regular', special(file, lambda path: path.mkdir())),
    'is a FIFO': ('regular', special(file, os.mkfifo)),
    'is a device': (
      'regular|outside',
      special(file, lambda path: path.symlink_to('/dev/zero')),
    ),
    'leads out of the folder': ('outside', special(file, _link_out)),
    'is a link to nothing': (
      'missing|regular|link',
      special(file, lambda path: path.symlink_to(path.with_name('none'))),
    ),
    'is a link to itself': (
      'link',
      special(file, lambda path: path.symlink_to(path)),
    ),
    'is a git-lfs pointer': (
      '',
      put(
        file,
        'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n',
      ),
    ),
  }


def _link_out(path):
  outside = path.parent.with_name(f'{path.parent.name}-outside.json')
  outside.write_text('{"model_type": "llama"}')
  path.symlink_to(outside)


def _sparse(file, size):
  def damage(folder):
    with (folder / file).open('r+b') as stream:
      stream.truncate(size)

  return damage


CASES: dict[str, Case] = {}
for _file in _FILES:
  for _name, (_cause, _damage) in _damaged(_file).items():
    CASES[f'{_file} {_name}'] = Case('model', _file, _cause, _damage)
  CASES[f'{_file} has 4 GiB'] = Case(
    'model', _file, 'bytes', _sparse(_file, 2**32), heavy=True
  )
for _file in _FILES[:2]:
  CASES[f'{_file} has a key twice'] = Case(
    'model',
    _file,
    'eos_token_id.* more than once',
    edit(_file, lambda raw: raw.rstrip()[:-1] + b',"eos_token_id":1}'),
  )

_WRONG = {
  'missing': MISSING,
  'null': None,
  'zero': 0,
  'negative': -4,
  'a text': 'four',
  'a list': [4],
  'huge': 10**30,
  'a fraction': 4.5,
  'true': True,
}
for _key in _SIZES:
  for _name, _value in _WRONG.items():
    CASES[f'config.json: {_key} is {_name}'] = Case(
      'model', 'config.json', _key, fields('config.json', {_key: _value})
    )
_INVALID = {
  'num_key_value_heads': [0, -2, 3, 8, 'two', 2.5, 10**20],
  'head_dim': [0, -4, 5, 2**40, 'four', [4]],
  'rms_norm_eps': [float('nan'), -1e-5, 0, float('inf'), 'small', [1]],
  'rope_theta': [0, -1e4, float('nan'), float('inf'), 'large', [1], True],
  'rope_parameters': [[1], 'a', {'rope_theta': 0}, {'rope_theta': 'a'}],
  'rope_scaling': [
    [1],
    'linear',
    {'rope_type': 'yarn', 'factor': 2.0},
    {'rope_type': ['linear'], 'factor': 2.0},
    {'rope_type': 'linear'},
    {'rope_type': 'linear', 'factor': 0},
    {'rope_type': 'linear', 'factor': float('nan')},
    {'rope_type': 'linear', 'factor': 'two'},
    {'rope_type': 'llama3', 'factor': 8.0},
    {
      'rope_type': 'llama3',
      'factor': 8.0,
      'low_freq_factor': 1.0,
      'high_freq_factor': 1.0,
      'original_max_position_embeddings': 64,
    },
    {
      'rope_type': 'llama3',
      'factor': 8.0,
      'low_freq_factor': 1.0,
      'high_freq_factor': 4.0,
      'original_max_position_embeddings': -64,
    },
  ],
  'model_type': ['', 'gpt2', ['llama'], None, {'a': 1}],
  'tie_word_embeddings': ['false', 2, [True]],
  'max_position_embeddings': [-1, 'long', 2.5, 10**30],
  'hidden_act': ['gelu', ['silu']],
  'attention_bias': [True, 'no'],
  'eos_token_id': ['end', -5, 2**40, [1, 'a'], 1.5, {'a': 1}],
  'pad_token_id': ['end', 2**40, [1]],
}
for _key, _values in _INVALID.items():
  for _value in _values:
    CASES[f'config.json: {_key} is {str(_value)[:40]}'] = Case(
      'model',
      'config.json',
      'head' if 'head' in _key else _key.split('_')[0],
      fields('config.json', {_key: _value}),
    )
for _value in ('end', -5, 2**40, [1, 'a'], 1.5):
  CASES[f'generation_config.json: eos_token_id is {_value}'] = Case(
    'model',
    'generation_config.json',
    'eos_token_id',
    fields('generation_config.json', {'eos_token_id': _value}),
  )
CASES['config.json: fewer layers than weights'] = Case(
  'model',
  'model.safetensors',
  r'layers\.1\.',
  fields('config.json', {'num_hidden_layers': 1}),
)
CASES['config.json: more layers than weights'] = Case(
  'model',
  '',
  r'layers\.2\.',
  fields('config.json', {'num_hidden_layers': 2_000}),
)
CASES['config.json: other width than the weights'] = Case(
  'model', '', 'shape', fields('config.json', {'hidden_size': 2**20})
)
# These are read elsewhere: without them a folder is still a model.
for _name in ('is empty', 'is cut short', 'is null'):
  CASES[f'tokenizer_config.json {_name}'] = CASES[
    f'tokenizer_config.json {_name}'
  ]._replace(file='tokenizer_config.json')
