"""What scores of rows are worth: who is dropped, at any share, and elsewhere.

Paper: Shen, Chen, Das and Chen, SEAL: Safety-enhanced Aligned LLM Fine-tuning
via Bilevel Data Selection, ICLR 2025.

    python -m experiments.seal.evaluate --scores=OUT/scores.jsonl \
      --labels=F.jsonl --label=unsafe

Expected: the shares of unsafe and of clean rows that are dropped, for each
score and each share that is kept. Time: seconds.

Which rows are unsafe is read from the scores where `rank` knew it, or from a
field of the rows that were ranked. `--other=scores.jsonl`, of the same rows by
another model, says how far scores carry over.
"""

import dataclasses

import numpy as np
import scipy.stats

from experiments import harness
from experiments.lm import row_files
from experiments.seal import measures, rank


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    scores: `scores.jsonl`, as `rank` has written it; '' for made-up ones.
    labels: the rows that were ranked, with a field that says which are unsafe;
      '' if the scores have their kinds.
    label: the field: true, or a text that is not empty, for unsafe rows.
    other: scores of the same rows by another model; '' for none.
    unsafe_shares: shares of unsafe rows to which the rows are thinned out.
    keep: the shares that are kept.
  """

  scores: str = ''
  labels: str = ''
  label: str = 'unsafe'
  other: str = ''
  unsafe_shares: tuple[float, ...] = (0.05, 0.2, 0.5)
  keep: tuple[float, ...] = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


PRESETS = {'quick': Settings(), 'smoke': Settings(), 'paper': Settings()}


def read(path: str) -> dict[str, np.ndarray]:
  """The scores of a file by name, NaN where a row has none; and `kind`."""
  rows = row_files.read_rows(path)
  numbers = [row.get('row') for row in rows]
  if numbers != list(range(len(rows))):
    raise harness.UserError(
      f'{path}: rows are numbered from 0 in order, as rank writes them.'
    )
  names = [n for n in rows[0] if n not in ('row', 'kept', 'kind')]
  out: dict[str, np.ndarray] = {}
  for name in names:
    values = [np.nan if row[name] is None else row[name] for row in rows]
    out[name] = np.array(values, np.float64)
  if 'kind' in rows[0]:
    out['kind'] = np.array([row['kind'] for row in rows])
  return out


def kept_rows(path: str, score: str, share: float, count: int) -> np.ndarray:
  """Which rows of a file are kept, (rows,) of bool, by scores of `rank`.

  Raises:
    UserError: if the scores are of another file, or there is no such score.
  """
  scores = read(path)
  scores.pop('kind', None)
  if score not in scores:
    raise harness.UserError(
      f'{path} has no score {score!r}; it has {list(scores)}.'
    )
  if len(scores[score]) != count:
    raise harness.UserError(
      f'{path} has {len(scores[score])} rows, but the file has {count}: scores '
      'are of one file, in order.'
    )
  return measures.kept(scores[score], share)


def unsafe_of(settings: Settings, given: dict[str, np.ndarray]) -> np.ndarray:
  """Which rows are unsafe, (rows,) of bool; of a row that is none, not."""
  if not settings.labels:
    if 'kind' not in given:
      raise harness.UserError(
        'the scores do not say which rows are unsafe: give --labels=F.jsonl, '
        'the rows that were ranked, and --label, a field of theirs.'
      )
    return given['kind'] == 'unsafe'
  # A row may have a label and be no example.
  raw = [row.value for row in row_files.scan(settings.labels)]
  count = len(next(iter(given.values())))
  if len(raw) != count:
    raise harness.UserError(
      f'{settings.labels} has {len(raw)} rows, but {count} have scores.'
    )
  there = [row for row in raw if row is not None]
  if not any(settings.label in row for row in there):
    raise harness.UserError(
      f'no row of {settings.labels} has the field {settings.label!r}: --label '
      'names the one that says which rows are unsafe.'
    )
  return np.array([bool(row and row.get(settings.label)) for row in raw])


def thinned(unsafe: np.ndarray, share: float, seed: int = 0) -> np.ndarray:
  """Places of rows of which a share is unsafe, as many as there can be."""
  rng = np.random.default_rng(seed)
  bad, good = (rng.permutation(np.flatnonzero(unsafe == k)) for k in (1, 0))
  total = min(len(bad) / share, len(good) / (1 - share))
  count = round(share * total)
  return np.concatenate([bad[:count], good[: round(total) - count]])


def made_up() -> dict[str, np.ndarray]:
  """Scores of two kinds that overlap."""
  rng = np.random.default_rng(0)
  kinds = np.array(['unsafe'] * 60 + ['benign'] * 240)
  seal = rng.normal(size=300) - 1.5 * (kinds == 'unsafe')
  return {'seal': seal, 'random': rng.uniform(size=300), 'kind': kinds}


def check(settings: Settings) -> None:
  """Raises SettingsError for shares outside (0, 1)."""
  for name in ('unsafe_shares', 'keep'):
    if not all(0 < share < 1 for share in getattr(settings, name)):
      raise harness.SettingsError(f'{name} are between 0 and 1.')


def correlation(scores: np.ndarray, others: np.ndarray) -> float:
  """Rank correlation of scores of the same rows by two models."""
  if len(others) != len(scores):
    raise harness.UserError(
      f'the scores of --other are of {len(others)} rows, not of {len(scores)}.'
    )
  both = ~np.isnan(scores) & ~np.isnan(others)
  return float(scipy.stats.spearmanr(scores[both], others[both]).statistic)


def main(options: harness.Options) -> harness.Report:
  """Computes drop rates and areas under curves."""
  settings = options.settings
  given = read(settings.scores) if settings.scores else made_up()
  unsafe = unsafe_of(settings, given)
  other = read(settings.other) if settings.other else {}
  results = harness.Results()
  for name, scores in given.items():
    if name == 'kind':
      continue
    of = {'score': name}
    there = ~np.isnan(scores)
    for area, measure in measures.AREAS.items():
      found = measures.resampled(measure, scores[there], unsafe[there])
      results.put(of, {area: found})
    for keep in settings.keep:
      rates = measures.drop_rates(scores, unsafe, keep)
      results.put({**of, 'keep': keep}, rates)
      pair = f'{rates["unsafe_drop"]:.2f} / {rates["clean_drop"]:.2f}'
      results.note(of, {f'dropped, {keep:g} kept': pair})
    for share in settings.unsafe_shares:
      at = thinned(unsafe & there, share)
      at = at[there[at]]
      found = measures.auprc(scores[at], unsafe[at])
      results.add({**of, 'unsafe': share}, auprc=found)
    if name in other:
      results.add(of, transfer=correlation(scores, other[name]))
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


STUDY = harness.Study(
  main, PRESETS, paper='seal', binary='evaluate', check=check
)


if __name__ == '__main__':
  harness.run(STUDY)
