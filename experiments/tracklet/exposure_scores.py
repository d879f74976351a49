"""Scores of the trackers of `exposure`: kept in the workdir, and compared."""

import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments import harness
from experiments.harness.store import files
from experiments.tracking import judging, mot_files, tracker
from experiments.tracklet import rollouts
from experiments.tracklet.train_report import FIRST

if TYPE_CHECKING:
  import matplotlib.figure

WAYS = ('teacher_forcing', 'search', 'rollouts')
ORACLES: tuple[rollouts.Oracle, ...] = ('last', 'person', 'majority')
Scores = Mapping[str, np.ndarray]


def identify(weights: Any, *values: Any) -> str:
  """Digests weights and plain values, to recognise scores of other ones."""
  digest = hashlib.blake2b(json.dumps(values).encode(), digest_size=16)
  for name in sorted(weights):
    digest.update(np.ascontiguousarray(weights[name]).tobytes())
  return digest.hexdigest()


def keep(
  path: pathlib.Path, identity: str, compute: Callable[[], Mapping[str, Any]]
) -> dict[str, np.ndarray]:
  """Reads numbers from a file, or computes and writes them.

  Args:
    path: the file.
    identity: of what the numbers depend on; others are computed again.
    compute: makes arrays by name.

  Returns:
    Arrays by name.
  """
  old = files.read_sealed(path, 'computing its numbers again')
  if old is None or old['identity'] != identity:
    values = {name: np.asarray(x).tolist() for name, x in compute().items()}
    old = {'identity': identity, 'values': values}
    files.write_text(path, files.seal(old))
  return {name: np.array(x) for name, x in old['values'].items()}


def judge(
  makers: Sequence[judging.Track], trials: Mapping[str, list[judging.Trial]]
) -> dict[str, np.ndarray]:
  """Scores trackers, one per seed, by measure: (seeds, sequences)."""
  scores = [
    [judging.judge(track, on) for on in trials.values()] for track in makers
  ]
  return {
    measure: np.array([[one[measure].mean() for one in row] for row in scores])
    for measure in judging.MEASURES
  }


def make_oracle(model: tracker.Model, oracle: rollouts.Oracle) -> judging.Track:
  """A tracker that matches tracklets of more than one person by the truth."""

  def track(detected) -> mot_files.Boxes:
    return rollouts.record(model, detected, oracle=oracle).boxes

  return track


def measure_errors(
  models: Sequence[tracker.Model], trials: Mapping[str, list[judging.Trial]]
) -> dict[str, list[float]]:
  """Shares of choices by the tracker, in per cent, by field of `Errors`."""
  rows = []
  for model in models:
    errors = [
      rollouts.count_errors(
        on[0].detected, rollouts.record(model, on[0].detected).histories
      )
      for on in trials.values()
    ]
    rows.append(100 * np.mean([e[1:] for e in errors], axis=0))
  names = rollouts.Errors._fields[1:]
  return dict(zip(names, np.transpose(rows).tolist()))


def add_condition(
  results: harness.Results,
  condition: str,
  scores: Mapping[tuple[str, str], Scores],
  names: Sequence[str],
) -> None:
  """Adds the numbers of a condition, and paired differences.

  Args:
    results: to add to.
    condition: its name.
    scores: by method and matching, and by measure, (seeds, sequences).
    names: of the sequences.
  """
  for (method, matching), values in scores.items():
    at = {'condition': condition, 'method': method, 'matching': matching}
    results.put(at, {name: x.mean(axis=1) for name, x in values.items()})

  def lead(over, one, two, measures=('idf1', 'switches')):
    for measure in measures:
      difference = scores[one][measure] - scores[two][measure]
      at = {'condition': condition, **over}
      results.put(at, {f'{measure}_lead': difference.mean(axis=1)})
      for i, name in enumerate(names):
        results.put(
          {**at, 'sequence': name}, {f'{measure}_lead': difference[:, i]}
        )

  matchings = [m for way, m in scores if way == WAYS[-1]]
  for matching in matchings:
    for way, over in (
      *((way, WAYS[0]) for way in WAYS[1:]),
      *((way, FIRST) for way in WAYS),
    ):
      at = {'method': way, 'over': over, 'matching': matching}
      lead(at, (way, matching), (over, matching))
  for way in (*WAYS, FIRST):
    for matching in matchings:
      if matching != 'step':
        at = {'method': way, 'matching': matching, 'over': 'step'}
        lead(at, (way, matching), (way, 'step'))
    for oracle in ORACLES:
      if (way, f'oracle_{oracle}') in scores:
        at = {'method': way, 'headroom': oracle}
        lead(at, (way, f'oracle_{oracle}'), (way, 'step'), ('idf1',))


def draw(
  results: harness.Results, conditions: Sequence[str], matching: str
) -> 'matplotlib.figure.Figure':
  """Draws leads in IDF1 over teacher forcing with intervals, by condition."""
  import matplotlib.figure

  rows = (
    ('first weights', f'teacher_forcing/{FIRST}/{matching}', -1),
    ('search', f'search/{WAYS[0]}/{matching}', 1),
    ('rollouts', f'rollouts/{WAYS[0]}/{matching}', 1),
    ('oracle', f'{WAYS[0]}/person', 1),
  )
  figure = matplotlib.figure.Figure(
    figsize=(5.2 * len(conditions), 2.8), layout='constrained'
  )
  axes = figure.subplots(1, len(conditions), squeeze=False, sharey=True)[0]
  for one, condition in zip(axes, conditions):
    for row, (_, name, sign) in enumerate(rows):
      number = results[f'idf1_lead/{condition}/{name}']
      one.errorbar(
        sign * number.mean, row, xerr=number.half_width, fmt='o', capsize=3
      )
      seeds = sign * np.array(number.per_seed or ())
      one.plot(seeds, np.full(len(seeds), row + 0.2), 'k.', markersize=3)
    one.axvline(0, color='0.6', linewidth=1)
    one.set_yticks(range(len(rows)), [title for title, *_ in rows])
    one.set_title(condition)
    one.set_xlabel('IDF1 minus that of teacher forcing, points')
  axes[0].invert_yaxis()
  return figure
