r"""Files of fragment pairs for people to label.

JSON lines, one per pair:

    {"first": {"observations": [[0.1, ...], ...], "actions": [0, 1, ...]},
     "second": {"observations": ..., "actions": ...}, "label": 1}

A fragment is shorter than the full length if its episode terminated. The label
is 0 if the first is preferred, 1 if the second is, 0.5 for neither, and null if
it is missing.
"""

import json
from typing import Any

import numpy as np

from experiments import harness
from experiments.harness.data import reading
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
  labels = []
  for number, text in enumerate(reading.read_lines(path, 'text'), 1):
    if not text.strip():
      continue
    where = f'{path}, line {number}'
    line = _parse(text, where)
    label = line.get('label')
    problem = (
      'has no label yet' if label is None else f'has the label {label!r}'
    )
    _need(
      not isinstance(label, bool) and label in LABELS,
      f'{where} {problem}: 0 for the first fragment, 1 for the second, 0.5 for '
      'neither',
    )
    labels.append(float(label))
    for side, fragments in sides.items():
      place = f'{where}: {side}'
      fragments.append(
        _fragment(line.get(side), place, shape, actions, length, dtype)
      )
  _need(labels, f'{path} has no pairs')
  returns = np.zeros(len(labels), np.float32)
  first, second = (
    preferences.Fragments(
      *(np.stack(column) for column in zip(*fragments, strict=True)), returns
    )
    for fragments in sides.values()
  )
  return preferences.Pairs(first, second, np.asarray(labels, np.float32))


def _need(valid, message):
  if not valid:
    raise harness.DamagedDataError(f'{message}.')


def _parse(text, where):
  try:
    line = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise harness.DamagedDataError(f'{where} is not JSON: {error}.') from error
  expected = 'an object with first, second and label'
  _need(isinstance(line, dict), f'{where} is not {expected}')
  return line


def _fragment(value, where, shape, actions, length, dtype):
  """Parses observations, actions and mask, padded to the full length."""
  keys = {'observations', 'actions'}
  valid = isinstance(value, dict) and keys <= {*value}
  _need(valid, f'{where} has no observations and actions')
  try:
    observations = np.asarray(value['observations'], np.float32)
    taken = np.asarray(value['actions'], np.float64)
  except (TypeError, ValueError, OverflowError) as error:
    raise harness.DamagedDataError(
      f'{where} has a value that is not a number, or rows of different lengths.'
    ) from error
  steps = len(taken) if taken.ndim == 1 else 0
  _need(
    1 <= steps <= length,
    f'{where} has actions of shape {taken.shape}; a fragment has 1 to {length} '
    'steps',
  )
  if observations.shape != (steps, *shape):
    raise harness.DamagedDataError(
      f'{where} has observations of shape {observations.shape}, but this '
      f'environment has {(steps, *shape)}: was the file made for another one?'
    )
  _need(
    np.all(np.isfinite(observations)),
    f'{where} has an observation that is not finite',
  )
  if np.issubdtype(dtype, np.integer):
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    integers = observations == np.round(observations)
    _need(
      np.all(integers & (observations >= low) & (observations <= high)),
      f'{where} has an observation that is no integer from {low} to {high}',
    )
  wrong = taken[(taken != np.round(taken)) | (taken < 0) | (taken >= actions)]
  _need(
    not wrong.size,
    f'{where} has the action {", ".join(f"{x:g}" for x in wrong[:1])}; this '
    f'environment has 0 to {actions - 1}',
  )
  padded = np.zeros((length, *shape), dtype)
  padded[:steps] = observations
  padded_actions = np.zeros(length, np.int32)
  padded_actions[:steps] = taken
  return padded, padded_actions, np.arange(length) < steps
