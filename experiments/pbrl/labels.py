r"""Files of fragment pairs for people to label.

JSON lines, one per pair:

    {"first": {"observations": [[0.1, ...], ...], "actions": [0, 1, ...]},
     "second": {"observations": ..., "actions": ...}, "label": 1}

A fragment is shorter than the full length if its episode terminated. The label
is 0 if the first is preferred, 1 if the second is, 0.5 for neither, and null if
it is missing.
"""

import json
import math
from typing import Any

import numpy as np

from experiments.harness.data import json_values, reading
from experiments.harness.store import files
from experiments.pbrl import preferences

LABELS = (0, 0.5, 1)


def write(
  path: files.Path, pairs: preferences.Pairs, *, labelled: bool = True
) -> None:
  """Writes pairs without masked steps.

  Args:
    path: of the file.
    pairs: (pairs, ...); pairs with an empty fragment are left out.
    labelled: whether to write labels instead of null.
  """
  lines = []
  for i, label in enumerate(np.asarray(pairs.labels)):
    line: dict[str, Any] = {}
    for side in ('first', 'second'):
      one = getattr(pairs, side)
      mask = np.asarray(one.mask[i])
      observations = np.asarray(one.observations[i])[mask]
      if observations.dtype == bool:  # 0 and 1 are shorter than false and true.
        observations = observations.astype(int)
      line[side] = {
        'observations': observations.tolist(),
        'actions': np.asarray(one.actions[i])[mask].tolist(),
      }
    if line['first']['actions'] and line['second']['actions']:
      line['label'] = float(label) if labelled else None
      lines.append(json.dumps(line) + '\n')
  files.write_text(path, ''.join(lines))


def read(
  path: files.Path,
  *,
  shape: tuple[int, ...],
  actions: int,
  length: int,
  dtype: Any,
) -> preferences.Pairs:
  """Reads labelled pairs for an environment.

  Args:
    path: of the file.
    shape: of an observation.
    actions: number of actions.
    length: of a fragment.
    dtype: of the observations.

  Returns:
    `Pairs` of NumPy arrays with unknown returns, set to zero.

  Raises:
    MissingDataError: if the file is missing.
    DamagedDataError: if a pair is invalid; names the line and the reason.
  """
  sides: dict[str, list] = {'first': [], 'second': []}
  labels: list[float] = []
  # Fragments are filled up to the full length, so short ones grow.
  size = 2 * length * math.prod(shape) * np.dtype(dtype).itemsize
  max_pairs = reading.MOST_BYTES // size
  for number, text in enumerate(reading.read_lines(path, 'file of labels'), 1):
    if not text.strip():
      continue
    where = f'{path}, line {number}'
    if len(labels) == max_pairs:
      raise reading.damaged(
        where,
        f'at most {max_pairs:,} pairs of this environment are read',
        'split the file',
      )
    line = _parse(text, where)
    labels.append(_label(line.get('label'), where))
    for side, fragments in sides.items():
      place = f'{where}, {side}'
      fragments.append(
        _fragment(line.get(side), place, shape, actions, length, dtype)
      )
  if not labels:
    raise reading.damaged(
      path, 'it has no pairs', 'make pairs by the mode export, and label them'
    )
  returns = np.zeros(len(labels), np.float32)
  first, second = (
    preferences.Fragments(
      *(np.stack(column) for column in zip(*fragments, strict=True)), returns
    )
    for fragments in sides.values()
  )
  return preferences.Pairs(first, second, np.asarray(labels, np.float32))


def _need(valid, where, cause, remedy=reading.CORRECT):
  if not valid:
    raise reading.damaged(where, cause, remedy)


def _parse(text, where):
  try:
    line = json_values.parse_json(text)
  except ValueError as error:
    raise reading.damaged(
      where, f'it is not JSON ({error})', reading.CORRECT
    ) from error
  expected = 'an object with first, second and label'
  _need(isinstance(line, dict), where, f'it is not {expected}')
  return line


def _label(label, where):
  remedy = 'give 0 for the first fragment, 1 for the second, 0.5 for neither'
  _need(label is not None, where, 'it has no label yet', remedy)
  _need(
    type(label) in (int, float) and label in LABELS,
    where,
    f'it has the label {reading.shorten(repr(label))}',
    remedy,
  )
  return float(label)


def _numbers(fragment, name, where):
  """Parses an array of finite numbers in double precision."""
  try:
    array = np.asarray(fragment[name])
  except ValueError as error:
    raise reading.damaged(
      where, f'its {name} are rows of different lengths', reading.CORRECT
    ) from error
  # Texts are no numbers, although NumPy would convert them.
  valid = array.size == 0 or array.dtype.kind in 'biuf'
  _need(valid, where, f'its {name} have a value that is not a number')
  array = array.astype(np.float64)
  finite = np.all(np.abs(array) <= reading.LARGEST)
  _need(finite, where, f'its {name} have a number that is not finite')
  return array


def _fragment(value, where, shape, actions, length, dtype):
  """Parses observations, actions and mask, filled up to the full length."""
  keys = {'observations', 'actions'}
  valid = isinstance(value, dict) and keys <= {*value}
  _need(valid, where, 'it has no observations and actions')
  observations = _numbers(value, 'observations', where)
  taken = _numbers(value, 'actions', where)
  steps = len(taken) if taken.ndim == 1 else 0
  _need(
    1 <= steps <= length,
    where,
    f'it has actions of shape {taken.shape}; a fragment has 1 to {length} '
    'steps',
  )
  _need(
    observations.shape == (steps, *shape),
    where,
    f'it has observations of shape {observations.shape}, but this environment '
    f'has {(steps, *shape)}',
    'give a file of the same environment',
  )
  if np.issubdtype(dtype, np.integer):
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    integers = observations == np.round(observations)
    _need(
      np.all(integers & (observations >= low) & (observations <= high)),
      where,
      f'it has an observation that is no integer from {low} to {high}',
    )
  wrong = taken[(taken != np.round(taken)) | (taken < 0) | (taken >= actions)]
  _need(
    not wrong.size,
    where,
    f'it has the action {", ".join(f"{x:g}" for x in wrong[:1])}; this '
    f'environment has 0 to {actions - 1}',
  )
  padded = np.zeros((length, *shape), dtype)
  padded[:steps] = observations
  padded_actions = np.zeros(length, np.int32)
  padded_actions[:steps] = taken
  return padded, padded_actions, np.arange(length) < steps
