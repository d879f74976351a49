"""Broken folders of adapters."""

import json
import os

import numpy as np

from tests.faults.corpus import models_weights
from tests.faults.corpus.models import MISSING, Case, edit, fields, put, special

CONFIG, FILE = 'adapter_config.json', 'adapter_model.safetensors'
KEY = 'base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight'


def tensors(change):
  """Writes the adapters again, changed."""

  def apply(raw):
    header, data = models_weights.split(raw)
    header.pop('__metadata__', None)
    arrays = {
      n: np.frombuffer(data[slice(*f['data_offsets'])], np.float32).reshape(
        f['shape']
      )
      for n, f in header.items()
    }
    return models_weights.packed(change(arrays))

  return edit(FILE, apply)


def renamed(old, new):
  """Renames tensors."""
  return tensors(lambda a: {n.replace(old, new): w for n, w in a.items()})


def value(number):
  """Puts a number into a tensor."""

  def change(arrays):
    array = arrays[KEY].copy()
    array[0, 0] = number
    return {**arrays, KEY: array}

  return tensors(change)


def _link_out(path):
  outside = path.parent.with_name(f'{path.parent.name}-outside.json')
  outside.write_text(json.dumps({'r': 2, 'lora_alpha': 4}))
  path.symlink_to(outside)


_DEEP = b'{"a":' + b'[' * 100_000 + b']' * 100_000 + b'}'
_CONFIG = {
  'is missing': (
    'missing|no adapters',
    lambda folder: (folder / CONFIG).unlink(),
  ),
  'is empty': ('', put(CONFIG, b'')),
  'is a list': ('', put(CONFIG, b'[]')),
  'is null': ('', put(CONFIG, b'null')),
  'is cut short': ('', edit(CONFIG, lambda raw: raw[:-9])),
  'is not UTF-8': ('', put(CONFIG, b'{"a": "\xff"}')),
  'is deep': ('', put(CONFIG, _DEEP)),
  'has a key twice': (
    'more than once',
    edit(CONFIG, lambda raw: raw.rstrip()[:-1] + b', "r": 3}'),
  ),
  'is a FIFO': ('regular', special(CONFIG, os.mkfifo)),
  'leads out of the folder': ('outside', special(CONFIG, _link_out)),
  'has a matrix for a list of modules': (
    'target_modules',
    fields(CONFIG, {'target_modules': [['q_proj']]}),
  ),
  'has a number for its modules': (
    'target_modules',
    fields(CONFIG, {'target_modules': 3}),
  ),
  'has unknown modules': (
    'target_modules',
    fields(CONFIG, {'target_modules': ['q_proj', 'w_pack']}),
  ),
  'has other modules than its weights': (
    'target_modules',
    fields(CONFIG, {'target_modules': ['k_proj', 'v_proj']}),
  ),
  'has a text for its layers': (
    'layers_to_transform',
    fields(CONFIG, {'layers_to_transform': 'all'}),
  ),
  'has nested lists for its layers': (
    'layers_to_transform',
    fields(CONFIG, {'layers_to_transform': [[0], [1]]}),
  ),
  'has other layers than its weights': (
    'layers_to_transform',
    fields(CONFIG, {'layers_to_transform': [0, 7]}),
  ),
  'has an object for its type': (
    'peft_type',
    fields(CONFIG, {'peft_type': {}}),
  ),
  'is of another method': ('peft_type', fields(CONFIG, {'peft_type': 'IA3'})),
  'has ranks by module': (
    'rank_pattern',
    fields(CONFIG, {'rank_pattern': {'q_proj': 4}}),
  ),
  'has a text for use_dora': ('use_dora', fields(CONFIG, {'use_dora': 'no'})),
  'has a text for use_rslora': (
    'use_rslora',
    fields(CONFIG, {'use_rslora': 'no'}),
  ),
}
_VALUES = {
  'r': [0, -2, 2.0, '2', None, MISSING, True, 10**30, [2]],
  'lora_alpha': [-1, 'four', None, float('nan'), float('inf'), True, 10**400],
}
_WEIGHTS = {
  'is missing': (
    'missing|no adapters',
    lambda folder: (folder / FILE).unlink(),
  ),
  'is empty': ('', put(FILE, b'')),
  'is a page of HTML': ('', put(FILE, '<!DOCTYPE html>')),
  'is cut short': ('', edit(FILE, lambda raw: raw[:-8])),
  'is a FIFO': ('regular', special(FILE, os.mkfifo)),
  'is a folder': ('regular', special(FILE, lambda path: path.mkdir())),
  'has no tensors': ('', tensors(lambda a: {})),
  'lacks a tensor': (
    KEY,
    tensors(lambda a: {n: w for n, w in a.items() if n != KEY}),
  ),
  'has NaN': (KEY, value(np.nan)),
  'has infinity': (KEY, value(-np.inf)),
  'has integers': (
    KEY,
    tensors(lambda a: {**a, KEY: a[KEY].astype(np.int64)}),
  ),
  'has a tensor of another rank': (
    KEY,
    tensors(lambda a: {**a, KEY: np.ones((3, 16), np.float32)}),
  ),
  'has a tensor of another width': (
    KEY,
    tensors(lambda a: {**a, KEY: np.ones((2, 17), np.float32)}),
  ),
  'has a vector for a tensor': (
    KEY,
    tensors(lambda a: {**a, KEY: np.ones(32, np.float32)}),
  ),
  'has an unknown module': ('w_pack', renamed('q_proj', 'w_pack')),
  'has a layer too many': (r'layers\.9', renamed('layers.1', 'layers.9')),
  'has a negative layer': (r'layers\.-1', renamed('layers.1', 'layers.-1')),
  'lacks the last layer': (
    'layers',
    tensors(lambda a: {n: w for n, w in a.items() if '.1.' not in n}),
  ),
  'has adapters of the embedding': (
    'embed_tokens',
    tensors(
      lambda a: {
        **a,
        'base_model.model.model.embed_tokens.lora_A.weight': a[KEY],
      }
    ),
  ),
}
CASES = {
  f'{file} {name}': Case('adapters', file, cause, damage)
  for file, table in ((CONFIG, _CONFIG), (FILE, _WEIGHTS))
  for name, (cause, damage) in table.items()
}
for _key, _values in _VALUES.items():
  for _value in _values:
    _shown = 'missing' if _value is MISSING else str(_value)[:20]
    CASES[f'{CONFIG}: {_key} is {_shown}'] = Case(
      'adapters', CONFIG, f'{_key}|digits', fields(CONFIG, {_key: _value})
    )
CASES[f'{CONFIG} has use_dora without magnitudes'] = Case(
  'adapters', FILE, 'magnitude', fields(CONFIG, {'use_dora': True})
)
CASES[f'{CONFIG}: r differs from the weights'] = Case(
  'adapters', FILE, 'shape', fields(CONFIG, {'r': 3})
)
