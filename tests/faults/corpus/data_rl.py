"""Broken files of labelled fragments, and of policies."""

import functools
import json

import jax
import numpy as np

from experiments.pbrl import labels
from experiments.rl import networks, policies
from tests.faults.corpus import data_arrays
from tests.faults.corpus import data_case as case

PAIRS, POLICY = 'pairs.jsonl', 'policy.npz'
FRAGMENT = {'observations': [[0.5, 1], [2, 3]], 'actions': [0, 2]}
_PAIR = {'first': FRAGMENT, 'second': FRAGMENT, 'label': 1}
_VALID = json.dumps(_PAIR) + '\n'


def _second(text):
  """A valid line and a broken one."""
  start = _VALID.encode() if isinstance(text, bytes) else _VALID
  return start + text, 'line 2'


def _pair(**changes):
  return _second(json.dumps(_PAIR | changes))


def _first(**changes):
  text, place = _pair(first=FRAGMENT | changes)
  return text, f'{place}, first'


def _observations(value):
  """A first observation in the words of JSON."""
  text = json.dumps(_PAIR).replace('0.5', value, 1)
  return _VALID + text, 'line 2, first'


LABELS = {
  'empty': '',
  'blank lines': '\n \n',
  'HTML': (case.HTML, 'line 1'),
  'JSON of another kind': (case.JSON, 'line 1'),
  'picture': (case.PNG, 'line 1'),
  'UTF-16': (_VALID.encode('utf-16'), 'line 1'),
  'latin-1': _second(b'{"\xe9": 1}'),
  'NUL': _second('{"first": \0}'),
  'cut': _second(_VALID[:60]),
  'two objects': _second(_VALID.strip() * 2),
  'list': _second('[1, 2]'),
  'null': _second('null'),
  'deep': _second('[' * 100_000),
  'deep object': _second('{"first":' * 100_000),
  'key twice': _second(_VALID.replace('"second"', '"first"')),
  'number of 9,999 digits': _second('{"label": ' + '9' * 9_999 + '}'),
  'no label': _pair(label=None),
  'label 2': _pair(label=2),
  'label true': _pair(label=True),
  'label of a text': _pair(label='1'),
  'label of a list': _pair(label=[1]),
  'label nan': _second(_VALID.replace('"label": 1', '"label": NaN')),
  'label of 400 digits': _pair(label=10**400),
  'no fragments': (lambda: _second('{"label": 1}')[0], 'line 2, first'),
  'fragment of a number': (_pair(second=3)[0], 'line 2, second'),
  'no actions': (
    _pair(second={'observations': [[1, 2]]})[0],
    'line 2, second',
  ),
  'no steps': _first(observations=[], actions=[]),
  'too many steps': _first(observations=[[0, 0]] * 5, actions=[0] * 5),
  'fewer actions': _first(actions=[0]),
  'another environment': _first(observations=[[1], [2]]),
  'deep observations': _first(observations=[[[[1, 2]]]] * 2),
  'rows of two lengths': _first(observations=[[1, 2], [3]]),
  'observation of a text': _first(observations=[['a', 1], [2, 3]]),
  'number in a text': _first(observations=[['1', '2'], ['3', '4']]),
  'observation of null': _first(observations=[[None, 1], [2, 3]]),
  'observation of an object': _first(observations=[{}, {}]),
  'observation nan': _observations('NaN'),
  'observation inf': _observations('-Infinity'),
  'observation 1e39': _observations('1e39'),
  'observation 1e999': _observations('1e999'),
  'observation of 400 digits': _observations('9' * 400),
  'observation of 30 digits': _first(observations=[[0, 10**30], [1, 1]]),
  'action 3': _first(actions=[0, 3]),
  'action -1': _first(actions=[0, -1]),
  'action 0.5': _first(actions=[0, 0.5]),
  'action 2^70': _first(actions=[0, 2**70]),
  'action of a text': _first(actions=['0', '1']),
  'line of 17 MB': (lambda: ' ' * (17 * 2**20), 'line 1'),
  **case.IRREGULAR,
}
PACKED_LABELS = {
  'not gzip': _VALID,
  'cut short': lambda: case.cut(case.packed(_VALID.encode() * 50)),
  'equal lines': lambda: case.bomb(b'', 40, b'\n'),
}


@functools.cache
def _policy():
  agent = networks.agent((4,), 2)
  weights = jax.eval_shape(agent.init, jax.random.key(0)).actor
  members = {
    f'{i:03}': data_arrays.npy(np.zeros(x.shape, x.dtype))
    for i, x in enumerate(jax.tree.leaves(weights))
  }
  return _about({'env': 'CartPole'}) | members


def _about(value):
  text = value if isinstance(value, str) else json.dumps(value)
  return {'about': data_arrays.npy(np.array(text))}


def _with(members):
  return lambda: data_arrays.archive(_policy() | members)


def _described(value):
  return _with(_about(value)), 'about'


def _weights(make):
  return lambda: _with({'000': data_arrays.npy(make())})()


POLICIES = {
  'empty': b'',
  'HTML': case.HTML,
  'plain array': lambda: data_arrays.npy(np.ones((3, 4))),
  'plain array of objects': lambda: data_arrays.npy(
    header="{'descr': '|O', 'fortran_order': False, 'shape': (1,)}\n",
    content=b'\x80\x04]\x94}\x94a.',
  ),
  'cut': lambda: case.cut(_with({})()),
  'no description': (
    lambda: data_arrays.archive({'000': data_arrays.npy(np.ones(3))}),
    'about',
  ),
  'description of a number': _with({'about': data_arrays.npy(np.ones(()))}),
  'description without JSON': _described('{'),
  'deep description': _described('[' * 100_000),
  'description of a list': _described([]),
  'no environment': _described({}),
  'environment of a number': _described({'env': 3}),
  'environment of a list': _described({'env': ['CartPole-v1']}),
  'unknown environment': _described({'env': 'Nonsense-v1'}),
  'environment of 1 MB': _described({'env': 'a' * 2**20}),
  'environment of a path': _described({'env': '../../etc/passwd'}),
  'another environment': _with(_about({'env': 'Acrobot-v1'})),
  'more weights': _with({'999': data_arrays.npy(np.ones(3, np.float32))}),
  'weights of whole numbers': _weights(lambda: np.zeros(64, np.int32)),
  'weights of texts': _weights(lambda: np.full(64, 'a')),
  'weights nan': (_weights(lambda: np.full(64, np.nan, np.float32)), '000'),
  'link to a device': case.ZERO,
  'named pipe': case.PIPE,
  'folder': None,
}


def _read_labels(name):
  return lambda folder: labels.read(
    folder / name, shape=(2,), actions=3, length=4, dtype='float32'
  )


def cases() -> list[case.Case]:
  """All cases of this module."""
  make, packed = case.cases, f'{PAIRS}.gz'
  return [
    *make('labels', PAIRS, _read_labels(PAIRS), LABELS),
    *make('labels packed', packed, _read_labels(packed), PACKED_LABELS),
    *make(
      'policy',
      POLICY,
      lambda folder: policies.load(folder / POLICY),
      POLICIES,
      package='gymnax',
    ),
  ]
