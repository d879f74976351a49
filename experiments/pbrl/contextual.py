"""Compares leaders of a follower that acts in several contexts.

A context is a goal or a taste, drawn for each update; the leader does not
observe it. All methods are judged by the leader's return at the follower's
exact optimum, averaged over contexts. Binaries differ in their `Study` only.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

import bilevel_jax as bj
from experiments import harness
from experiments.harness.study import comparison
from experiments.pbrl import contextual_methods
from experiments.pbrl.contextual_methods import Study

TITLES = {
  'value_penalty': 'value penalty',
  'hpgd': 'HPGD, its mean',
  'amd': 'AMD',
  'zero_order': 'zero order',
}


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
    tuning_seeds: number of seeds that choose one rate for all cells.
    seeds: of the start and of the drawn contexts.
  """

  temperatures: tuple[float, ...] = (0.001, 0.003, 0.005)
  steps: int = 150
  chunk: int = 50
  penalty: tuple[float, float] = (0.3, 10.0)
  backups: int = 5
  rates: tuple[float, ...] = (0.1, 0.5, 2.5)
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
      record_start=not job.tuning,  # A record compiles another program.
    ),
  )
  # The comparison expects one member per seed and point.
  shape = (-1, len(study.cells), members)
  history = {k: v.reshape(shape) for k, v in trained.history.items()}
  return trained._replace(history=history)


def run(options: harness.Options, study: Study) -> harness.Report:
  """Tunes, runs and compares all methods."""
  settings = options.settings
  rules = comparison.Rules(
    options,
    settings=harness.run_settings(settings, 'rates'),
    # One rate for all cells, by the mean of their returns.
    score=lambda trained: trained.history['leader_return'][-1].mean(axis=0),
    tuning_seeds=comparison.tuning_seeds(settings.tuning_seeds),
    widenings=1,
  )
  outcomes = comparison.compare(
    rules,
    tuple(TITLES),
    functools.partial(train, study, settings),
    {'rate': settings.rates},
  )

  def measure_outcome(outcome):
    history = outcome.trained.history
    return {
      # Mean over cells, per seed.
      'leader_return': history['leader_return'][-1].mean(axis=0),
      'start_return': history['leader_return'][0].mean(),
      'optimum_error': harness.reduced(history['error'].ravel(), 'max'),
    }

  results = harness.Results()
  comparison.add_outcomes(results, outcomes, measure_outcome)
  histories = {m: o.trained.history for m, o in outcomes.items() if o.trained}
  penalty = {'method': 'value_penalty'}
  verdicts = []
  for number, cell in enumerate(study.cells):
    finals = {m: h['leader_return'][-1, number] for m, h in histories.items()}
    for method, final in finals.items():
      results.add({'method': method, **cell}, leader_return=final)
    verdicts.append(verdict(finals.pop('value_penalty'), [*finals.values()]))
    results.note(cell, {'ours is': verdicts[-1]})
  for word in ('above', 'level', 'below'):
    results.put(penalty, {f'cells_{word}': verdicts.count(word)})
  gap = histories['value_penalty']['follower_gap'][-1]
  results.add(penalty, follower_gap=harness.reduced(gap.ravel(), 'max'))
  return harness.Report(
    results,
    rows=tuple(study.cells[0]),
    columns=(
      *(
        harness.Column('leader_return', title, {'method': method})
        for method, title in TITLES.items()
      ),
      'ours is',
    ),
    plots={'curves.png': _draw(study, outcomes)},
  )


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


def _draw(study, outcomes):
  panels = []
  for number, cell in enumerate(study.cells):
    curves = {
      TITLES[m]: (
        o.trained.steps,
        o.trained.history['leader_return'][:, number],
      )
      for m, o in outcomes.items()
      if o.trained
    }
    title = ', '.join(f'{name} {value:g}' for name, value in cell.items())
    panels.append(harness.Panel(curves, 'updates', 'leader return', title))
  return harness.draw_panels(panels, columns=3)
