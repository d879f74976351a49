r"""Pairs of fragments in a file, for people to label.

JSON lines, one a pair:

    {"first": {"observations": [[0.1, ...], ...], "actions": [0, 1, ...]},
     "second": {"observations": ..., "actions": ...}, "label": 1}

A fragment has from one step to the length of a fragment: fewer where the
episode terminated. The label is 0 where the first is preferred, 1 where the
second is, 0.5 where neither; null where nobody has looked yet.
"""

import json
from typing import Any

import numpy as np

from experiments import harness
from experiments.harness.store import files
from experiments.pbrl import preferences

LABELS = (0, 0.5, 1)


def write(
  path: files.Path, pairs: preferences.Pairs, *, labelled: bool = True
) -> None:
  """Writes pairs, without the steps that do not count.

  Args:
    path: of the file.
    pairs: (pairs, ...); those with an empty fragment are left out.
    labelled: whether with their labels, or null in their places.
  """
  lines = []
  for i, label in enumerate(np.asarray(pairs.labels)):
    line: dict[str, Any] = {}
    for side in ('first', 'second'):
      one = getattr(pairs, side)
      kept = np.asarray(one.mask[i])
      seen = np.asarray(one.observations[i])[kept]
      # A cell is on or off: as a number, in fewer letters.
      seen = seen.astype(int) if seen.dtype == bool else seen
      line[side] = {
        'observations': seen.tolist(),
        'actions': np.asarray(one.actions[i])[kept].tolist(),
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
    actions: their number.
    length: of a fragment.
    dtype: that observations are kept in.

  Returns:
    `Pairs` of numpy arrays; their returns are not known, and zero.

  Raises:
    MissingDataError: if there is no such file.
    DamagedDataError: if it holds no such pairs; names line and cause.
  """
  try:
    with open(path, encoding='utf-8-sig') as file:  # Editors add a mark.
      lines = file.read().split('\n')
  except FileNotFoundError as error:
    raise harness.MissingDataError(f'there is no file {path}.') from error
  except (OSError, UnicodeDecodeError) as error:
    raise harness.DamagedDataError(f'{path} is no text: {error}.') from error
  sides: dict[str, list] = {'first': [], 'second': []}
  labels = []
  for number, text in enumerate(lines, 1):
    if not text.strip():
      continue
    where = f'{path}, line {number}'
    line = _object(text, where)
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
  _need(labels, f'{path} holds no pair')
  none = np.zeros(len(labels), np.float32)
  first, second = (
    preferences.Fragments(
      *(np.stack(column) for column in zip(*fragments, strict=True)), none
    )
    for fragments in sides.values()
  )
  return preferences.Pairs(first, second, np.asarray(labels, np.float32))


def _need(fine, message):
  if not fine:
    raise harness.DamagedDataError(f'{message}.')


def _object(text, where):
  try:
    line = json.loads(text)
  except ValueError as error:
    raise harness.DamagedDataError(f'{where} is no JSON: {error}.') from error
  of = 'no object with first, second and label'
  _need(isinstance(line, dict), f'{where} is {of}')
  return line


def _fragment(given, where, shape, actions, length, dtype):
  """Observations, actions and mask, padded to the length of a fragment."""
  known = isinstance(given, dict) and {'observations', 'actions'} <= {*given}
  _need(known, f'{where} has no observations and actions')
  try:
    seen = np.asarray(given['observations'], np.float32)
    done = np.asarray(given['actions'], np.float64)
  except (TypeError, ValueError) as error:
    raise harness.DamagedDataError(
      f'{where} holds something that is no number, or rows of several lengths.'
    ) from error
  steps = len(done) if done.ndim == 1 else 0
  _need(
    1 <= steps <= length,
    f'{where} has actions of shape {done.shape}; a fragment has 1 to {length} '
    'steps',
  )
  if seen.shape != (steps, *shape):
    raise harness.DamagedDataError(
      f'{where} has observations of shape {seen.shape}, and this environment '
      f'wants {(steps, *shape)}: was the file made for another one?'
    )
  _need(np.all(np.isfinite(seen)), f'{where} has an observation not finite')
  if np.issubdtype(dtype, np.integer):
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    _need(
      np.all((seen == np.round(seen)) & (seen >= low) & (seen <= high)),
      f'{where} has an observation that is no whole number from {low} to '
      f'{high}',
    )
  wrong = done[(done != np.round(done)) | (done < 0) | (done >= actions)]
  _need(
    not wrong.size,
    f'{where} has the action {", ".join(f"{x:g}" for x in wrong[:1])}; this '
    f'environment has 0 to {actions - 1}',
  )
  padded = np.zeros((length, *shape), dtype)
  padded[:steps] = seen
  acts = np.zeros(length, np.int32)
  acts[:steps] = done
  return padded, acts, np.arange(length) < steps
