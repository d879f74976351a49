r"""Evaluates scores of rows: drop rates, areas, and transfer between models.

Paper: Shen, Chen, Das and Chen, SEAL: Safety-enhanced Aligned LLM Fine-tuning
via Bilevel Data Selection, ICLR 2025.

    python -m experiments.seal.evaluate --scores=OUT/scores.jsonl \
      --labels=F.jsonl --label=unsafe

Expected: the fractions of unsafe and of clean rows that are dropped, for each
score and each fraction that is kept. Time: seconds.

The kinds of rows are read from the scores if `rank` knew them, or from a field
of the ranked rows. With `--other=scores.jsonl`, scores of the same rows by
another model, the rank correlation of both is reported.
"""

import dataclasses
import reprlib

import numpy as np
import scipy.stats

from experiments import harness
from experiments.lm import row_files
from experiments.seal import measures, rank


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    scores: `scores.jsonl` as written by `rank`; '' for made-up scores.
    labels: the file of ranked rows with a field that marks unsafe rows; '' if
      the scores have kinds.
    label: this field; true or a text that is not empty marks an unsafe row.
    other: scores of the same rows by another model; '' for none.
    unsafe_shares: fractions of unsafe rows, for precision at other prevalences.
    keep: fractions of the rows that are kept.
  """

  scores: str = ''
  labels: str = ''
  label: str = 'unsafe'
  other: str = ''
  unsafe_shares: tuple[float, ...] = (0.05, 0.2, 0.5)
  keep: tuple[float, ...] = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


PRESETS = {'quick': Settings(), 'smoke': Settings(), 'paper': Settings()}


def read(path: str) -> dict[str, np.ndarray]:
  """Reads scores by name, NaN for missing ones, and `kind` if present."""
  rows = row_files.read_rows(path)
  numbers = [row.get('row') for row in rows]
  if numbers != list(range(len(rows))):
    raise harness.UserError(
      f'{path}: the field row is not 0, 1, 2 and so on: give a file that rank '
      'has written.'
    )
  names = [n for n in rows[0] if n not in ('row', 'kept', 'kind')]
  scores: dict[str, np.ndarray] = {}
  for name in names:
    values = [row.get(name, '') for row in rows]
    for i, value in enumerate(values):
      is_number = type(value) in (int, float) and value == value
      if value is not None and not is_number:
        raise harness.DamagedDataError(
          f'{path}: row {i} has {name}={reprlib.repr(value)}, expected a '
          'number other than NaN, or null.'
        )
    with harness.parsing(path, 'file of scores'):
      values = [np.nan if value is None else float(value) for value in values]
    scores[name] = np.array(values, np.float64)
  if 'kind' in rows[0]:
    kinds = [row.get('kind') for row in rows]
    if not all(isinstance(kind, str) for kind in kinds):
      raise harness.DamagedDataError(
        f'{path} has rows whose kind is missing or no text.'
      )
    scores['kind'] = np.array(kinds)
  if not names:
    raise harness.DamagedDataError(f'{path} has no scores.')
  return scores


def read_mask(path: str, score: str, fraction: float, count: int) -> np.ndarray:
  """Reads which rows of a file are kept, bool (rows,), by a score of `rank`.

  Args:
    path: `scores.jsonl`.
    score: name of the score.
    fraction: of the rows that are kept.
    count: number of rows of the file.

  Raises:
    UserError: if the score is missing, or the number of rows differs.
  """
  scores = read(path)
  scores.pop('kind', None)
  if score not in scores:
    raise harness.UserError(
      f'{path} has no score {score!r}; it has {list(scores)}.'
    )
  if len(scores[score]) != count:
    raise harness.UserError(
      f'{path} has {len(scores[score])} rows, but the file has {count}: give '
      'the scores of this file.'
    )
  return measures.keep_highest(scores[score], fraction)


def read_unsafe(
  settings: Settings, scores: dict[str, np.ndarray]
) -> np.ndarray:
  """Reads which rows are unsafe, bool (rows,); invalid rows are not."""
  if not settings.labels:
    if 'kind' not in scores:
      raise harness.UserError(
        'the scores have no kinds of rows: give --labels=F.jsonl, the ranked '
        'rows, and --label, the field that marks unsafe rows.'
      )
    return scores['kind'] == 'unsafe'
  raw = [row.value for row in row_files.scan(settings.labels)]
  count = len(next(iter(scores.values())))
  if len(raw) != count:
    raise harness.UserError(
      f'{settings.labels} has {len(raw)} rows, but {count} have scores.'
    )
  if not any(settings.label in row for row in raw if row is not None):
    raise harness.UserError(
      f'no row of {settings.labels} has the field {settings.label!r}: give '
      '--label, the field that marks unsafe rows.'
    )
  return np.array([bool(row and row.get(settings.label)) for row in raw])


def thinned(unsafe: np.ndarray, share: float, seed: int = 0) -> np.ndarray:
  """Indices of the largest subset of rows in which `share` is unsafe."""
  rng = np.random.default_rng(seed)
  bad, good = (rng.permutation(np.flatnonzero(unsafe == k)) for k in (1, 0))
  total = min(len(bad) / share, len(good) / (1 - share))
  count = round(share * total)
  return np.concatenate([bad[:count], good[: round(total) - count]])


def made_up() -> dict[str, np.ndarray]:
  """Makes up scores whose distributions for both kinds of rows overlap."""
  rng = np.random.default_rng(0)
  kinds = np.array(['unsafe'] * 60 + ['benign'] * 240)
  seal = rng.normal(size=300) - 1.5 * (kinds == 'unsafe')
  return {'seal': seal, 'random': rng.uniform(size=300), 'kind': kinds}


def check(settings: Settings) -> None:
  """Raises SettingsError for fractions outside (0, 1)."""
  for name in ('unsafe_shares', 'keep'):
    if not all(0 < share < 1 for share in getattr(settings, name)):
      raise harness.SettingsError(f'--{name} takes numbers between 0 and 1.')


def correlation(scores: np.ndarray, others: np.ndarray) -> float:
  """Spearman correlation of scores of the same rows by two models."""
  if len(others) != len(scores):
    raise harness.UserError(
      f'--other has scores of {len(others)} rows, --scores of {len(scores)}: '
      'give two files about the same rows.'
    )
  both = ~np.isnan(scores) & ~np.isnan(others)
  return float(scipy.stats.spearmanr(scores[both], others[both]).statistic)


def main(options: harness.Options) -> harness.Report:
  """Computes drop rates, areas under curves and rank correlations."""
  settings = options.settings
  all_scores = read(settings.scores) if settings.scores else made_up()
  unsafe = read_unsafe(settings, all_scores)
  other = read(settings.other) if settings.other else {}
  results = harness.Results()
  for name, scores in all_scores.items():
    if name == 'kind':
      continue
    at = {'score': name}
    scored = ~np.isnan(scores)
    for area, measure in measures.AREAS.items():
      value = measures.resampled(measure, scores[scored], unsafe[scored])
      results.put(at, {area: value})
    for keep in settings.keep:
      rates = measures.drop_rates(scores, unsafe, keep)
      results.put({**at, 'keep': keep}, rates)
      pair = f'{rates["unsafe_drop"]:.2f} / {rates["clean_drop"]:.2f}'
      results.note(at, {f'dropped, {keep:g} kept': pair})
    for share in settings.unsafe_shares:
      rows = thinned(unsafe & scored, share)
      rows = rows[scored[rows]]
      auprc = measures.auprc(scores[rows], unsafe[rows])
      results.add({**at, 'unsafe': share}, auprc=auprc)
    if name in other:
      results.add(at, transfer=correlation(scores, other[name]))
  return harness.Report(
    results,
    rows='score',
    columns=(
      *(harness.Column(area) for area in measures.AREAS),
      *(f'dropped, {keep:g} kept' for keep in settings.keep),
      *(
        harness.Column('auprc', f'auprc, {share:g} unsafe', {'unsafe': share})
        for share in settings.unsafe_shares
      ),
      *(['transfer'] if other else []),
    ),
    titles=rank.TITLES,
  )


STUDY = harness.Study(main, PRESETS, check=check)


if __name__ == '__main__':
  harness.run(STUDY)
