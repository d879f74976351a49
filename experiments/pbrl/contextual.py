"""Compares leaders of a follower that acts in several contexts.

A context is a goal or a taste, drawn for each update; the leader does not
observe it. All methods are judged by the leader's return at the follower's
exact optimum, averaged over contexts. Binaries differ in their `Study` only.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Annotated

import jax.numpy as jnp
import numpy as np

import bilevel_jax as bj
from experiments import harness
from experiments.harness.study import comparison
from experiments.pbrl import contextual_methods
from experiments.pbrl.contextual_methods import Study

PENALTIES = {
  'value_penalty': 'value penalty',
  'bellman_penalty': 'Bellman penalty',
}
RIVALS = {
  'hpgd': 'HPGD, its mean',
  'amd': 'AMD',
  'zero_order': 'zero order',
}
# Not a rival: like the penalties it uses all contexts in each update.
TITLES = PENALTIES | RIVALS | {'exact_gradient': 'exact gradient'}


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run; the paper is Thoma et al., 2024.

  Attributes:
    temperatures: temperatures of the follower's entropy, as in the paper.
    steps: number of updates; 10,000 in the paper.
    chunk: updates between two records.
    penalty: the first and the last lambda times the temperature; the follower's
      logits are biased by about the inverse.
    backups: backups of adaptive model design per update; 100 in the paper.
    rates: step sizes of the leader, whose gradients are clipped to norm 1.
    max_grid_extensions: largest number of extensions of the rates.
    tuning_seeds: number of seeds that choose one rate for all cells.
    seeds: of the start and of the drawn contexts.
  """

  temperatures: tuple[float, ...] = (0.001, 0.003, 0.005)
  steps: int = 150
  chunk: int = 50
  penalty: tuple[float, float] = (0.3, 10.0)
  backups: int = 5
  rates: tuple[float, ...] = (0.1, 0.5, 2.5)
  max_grid_extensions: Annotated[int, harness.Allowed(0)] = 1
  tuning_seeds: int = 1
  seeds: int = 10


def train(
  study: Study, settings: Settings, job: comparison.Job
) -> harness.Trained:
  """Runs one job in all cells, with a member per cell and seed."""
  members = len(job.seeds)
  hyper = {k: np.tile(v, len(study.cells)) for k, v in job.hyper.items()}
  for name in study.cells[0]:
    values = np.array([cell[name] for cell in study.cells], np.float32)
    hyper[name] = np.repeat(values, members)
  seeds = job.seeds * len(study.cells)

  def init(context):
    w = study.start(context.key)
    return bj.BilevelParams(w, jnp.zeros((study.contexts, *study.shape)))

  trained = harness.train(
    lambda context: contextual_methods.make_solver(
      study, job.method, settings, context
    ),
    harness.Task(init, lambda context: context.key, hyper=hyper),
    job.training(settings.steps, settings.chunk, seeds=seeds),
    harness.Measure(
      functools.partial(contextual_methods.measure, study),
      record_start=True,
    ),
  )
  # The comparison expects one member per seed and point.
  shape = (-1, len(study.cells), members)
  history = {k: v.reshape(shape) for k, v in trained.history.items()}
  return trained._replace(history=history)


def run(options: harness.Options, study: Study) -> harness.Report:
  """Tunes, runs and compares all methods.

  A method runs all rates on the tuning seeds and on the reported ones, in one
  program. The tuning seeds choose one rate for all cells; a second comparison
  has the best rate of each cell on the reported seeds.
  """
  settings = options.settings
  seeds = len(options.seeds)
  tuning = comparison.tuning_seeds(settings.tuning_seeds)
  rules = comparison.Rules(
    options._replace(seeds=(*options.seeds, *tuning)),
    settings=harness.run_settings(settings, 'rates', 'max_grid_extensions'),
    # One rate for all cells, by the mean of their returns.
    score=lambda trained: trained.history['leader_return'][-1].mean(axis=0),
    over_seeds=lambda scores: np.mean(scores[seeds:]),
    widenings=settings.max_grid_extensions,
  )
  outcomes = comparison.compare(
    rules,
    tuple(TITLES),
    functools.partial(train, study, settings),
    {'rate': settings.rates},
  )

  def measure_outcome(outcome):
    returns, errors = (
      reported(outcome, name, seeds) for name in ('leader_return', 'error')
    )
    return {
      # Mean over cells, per seed.
      'leader_return': returns[-1].mean(axis=0),
      'start_return': returns[0].mean(),
      'optimum_error': harness.reduced(errors.ravel(), 'max'),
    }

  results = harness.Results()
  comparison.add_outcomes(results, outcomes, measure_outcome)
  finished = {m: o for m, o in outcomes.items() if o.trained}
  verdicts: dict[tuple[str, str], list[str]] = {}
  for number, cell in enumerate(study.cells):
    tables = {
      '': {
        m: reported(o, 'leader_return', seeds)[-1, number]
        for m, o in finished.items()
      },
      '_best_rate': {
        m: best_rate(o, number, seeds) for m, o in finished.items()
      },
    }
    for table, finals in tables.items():
      for method, final in finals.items():
        measures = {f'leader_return{table}': final}
        results.add({'method': method, **cell}, **measures)
      rivals = [finals[m] for m in RIVALS if m in finals]
      for method in [m for m in PENALTIES if m in finals]:
        word = verdict(finals[method], rivals)
        verdicts.setdefault((method, table), []).append(word)
        results.note(cell, {_NOTES[method, table]: word})
  for (method, table), words in verdicts.items():
    for word in ('above', 'level', 'below'):
      count = {f'cells_{word}{table}': words.count(word)}
      results.put({'method': method}, count)
  for method in [m for m in PENALTIES if m in finished]:
    gap = reported(finished[method], 'follower_gap', seeds)[-1]
    largest = harness.reduced(gap.ravel(), 'max')
    results.add({'method': method}, follower_gap=largest)
  column = harness.Column
  return harness.Report(
    results,
    rows=tuple(study.cells[0]),
    columns=(
      *(column('leader_return', t, {'method': m}) for m, t in TITLES.items()),
      *(_NOTES[method, ''] for method in PENALTIES),
      *(
        column('leader_return_best_rate', f'{t}, best rate', {'method': m})
        for m, t in TITLES.items()
      ),
      *(_NOTES[method, '_best_rate'] for method in PENALTIES),
    ),
    plots={'curves.png': _draw(study, finished, seeds)},
  )


_NOTES = {
  ('value_penalty', ''): 'ours is',
  ('bellman_penalty', ''): 'Bellman is',
  ('value_penalty', '_best_rate'): 'ours is, best rates',
  ('bellman_penalty', '_best_rate'): 'Bellman is, best rates',
}


def reported(
  outcome: comparison.Outcome, metric: str, seeds: int
) -> np.ndarray:
  """A metric at the chosen rate, (records, cells, seeds)."""
  members = outcome.members[:seeds]
  return outcome.trained.history[metric][:, :, members]


def best_rate(outcome: comparison.Outcome, cell: int, seeds: int) -> np.ndarray:
  """Returns of the rate that is best in a cell on the reported seeds."""
  finals = [
    trial.trained.history['leader_return'][-1, cell, trial.members[:seeds]]
    for trial in outcome.trials
    if len(trial.members)
  ]
  return max(finals, key=lambda final: np.nan_to_num(final.mean(), nan=-np.inf))


def product(**values: Sequence[float]) -> list[dict[str, float]]:
  """Cells of a table: all combinations of values."""
  return [
    dict(zip(values, numbers, strict=True))
    for numbers in itertools.product(*values.values())
  ]


def verdict(values: np.ndarray, others: list[np.ndarray]) -> str:
  """Compares with the best other mean, by intervals: above, level or below."""
  if not others:
    return '-'
  best = max(others, key=np.mean)
  lead = harness.mean_interval(values - best)
  if abs(lead.mean) <= max(lead.half_width, 0.005):
    return 'level'
  return 'above' if lead.mean > 0 else 'below'


def _draw(study, outcomes, seeds):
  panels = []
  for number, cell in enumerate(study.cells):
    curves = {
      TITLES[m]: (
        o.trained.steps,
        reported(o, 'leader_return', seeds)[:, number],
      )
      for m, o in outcomes.items()
    }
    title = ', '.join(f'{name} {value:g}' for name, value in cell.items())
    panels.append(harness.Panel(curves, 'updates', 'leader return', title))
  return harness.draw_panels(panels, columns=3)
