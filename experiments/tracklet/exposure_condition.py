"""Trains, tunes and scores the networks of a condition of `exposure`."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments import harness
from experiments.harness.study import comparison
from experiments.tracking import judging, near_online, scenes, tracker
from experiments.tracklet import (
  cost,
  exposure_scores,
  learning,
  rollout_training,
  simulation,
  train,
)
from experiments.tracklet.exposure_scores import ORACLES, WAYS
from experiments.tracklet.train_report import FIRST

MATCHINGS = near_online.MATCHINGS
TUNING_SEED = 1_000  # First seed of the networks that rates are tuned on.
WIDENINGS = 3  # Extensions of the grid of rates.


def test_trials(
  options: harness.Options, first: list[judging.Trial]
) -> dict[str, list[judging.Trial]]:
  """The simulations of each held-out sequence, by its name."""
  settings = options.settings
  trials = {first[0].scene.info.name: first}
  for name in settings.more_held_out if options.data_dir else ():
    scene = scenes.read(options.data_dir, name)
    trials[name] = settings.data.test_trials(scene)
  return trials


def validation_trials(options: harness.Options) -> list[judging.Trial]:
  """The simulations of the validation sequence."""
  settings = options.settings
  if options.data_dir:
    scene = scenes.read(options.data_dir, settings.validation)
  else:
    scene = scenes.make_up(3, length=60 if options.preset == 'smoke' else 400)
  seeds = range(simulation.TUNING, simulation.TUNING + settings.validated)
  return judging.trials([scene], settings.data.simulated_detector(), seeds)


def train_way(
  way: str,
  prepared: train.Prepared,
  options: harness.Options,
  start: Any,
  rates: np.ndarray,
) -> harness.Trained:
  """Trains networks in one way.

  Args:
    way: in `WAYS`.
    prepared: training data.
    options: with a seed per network.
    start: weights, with a leading axis of networks.
    rates: first learning rate of each network.

  Returns:
    The trained networks.
  """
  settings, run = options.settings, train.common_run(options)
  if way == 'rollouts':
    return rollout_training.train(
      prepared.task,
      run,
      prepared.simulated,
      settings.rollouts,
      name=way,
      rate=rates,
      steps=settings.rollout_steps,
      start=start,
    )
  search = settings.search
  if way == 'teacher_forcing':
    search = dataclasses.replace(search, hypotheses=0)
  return learning.train(
    prepared.task,
    run,
    search,
    name=way,
    rate=rates,
    steps=count_updates(settings, way),
    end=0.01,
    start=start,
  )


def count_updates(settings: Any, way: str) -> int:
  """Updates of a way after pretraining."""
  return {
    'teacher_forcing': settings.training.forcing_steps,
    'search': settings.training.search_steps,
    'rollouts': settings.rollout_steps,
  }[way]


def pretrain(
  prepared: train.Prepared, options: harness.Options
) -> harness.Trained:
  """Trains the first weights of all ways."""
  settings = options.settings
  return learning.train(
    prepared.task,
    train.common_run(options),
    dataclasses.replace(settings.search, hypotheses=0),
    name='warm',
    rate=settings.training.rate,
    steps=settings.training.pretrain_steps,
  )


class Condition(NamedTuple):
  """A condition's data, and where its numbers go.

  Attributes:
    name: of the condition.
    options: with its detector and folder.
    prepared: training data.
    validation: trials to tune on.
    trials: trials to test on, by sequence.
    results: to add to.
  """

  name: str
  options: harness.Options
  prepared: train.Prepared
  validation: list[judging.Trial]
  trials: dict[str, list[judging.Trial]]
  results: harness.Results

  def models(self, params: Any) -> list[tracker.Model]:
    """A model per network."""
    weights = train.split_members(params, 1)
    return [tracker.make_model(x, self.prepared.task.noise) for x in weights]

  def keep(
    self, name: str, params: Any, compute: Callable[[], Mapping[str, Any]]
  ) -> dict[str, np.ndarray]:
    """Keeps numbers of weights and settings; see `exposure_scores.keep`."""
    folder = pathlib.Path(self.options.workdir) / 'scores'
    identity = exposure_scores.identify(
      params, harness.run_settings(self.options.settings), name
    )
    folder.mkdir(parents=True, exist_ok=True)
    return exposure_scores.keep(folder / f'{name}.json', identity, compute)


def tune_rates(condition: Condition) -> dict[str, float]:
  """Chooses the first learning rate of each way on the validation sequence.

  All ways try the same rates from the same weights, with the updates of the
  comparison. The grid of a way is extended where its end is chosen.

  Args:
    condition: data.

  Returns:
    The rate of the highest mean IDF1, by way.
  """
  settings = condition.options.settings
  seeds = tuple(range(TUNING_SEED, TUNING_SEED + settings.tuning_seeds))
  folder = pathlib.Path(condition.options.workdir)
  options = condition.options._replace(
    seeds=seeds, workdir=str(folder / 'tuning')
  )
  first = pretrain(condition.prepared, options).params
  half = settings.training.rate / 2
  chosen = {}
  for way in WAYS:
    at = {'condition': condition.name, 'method': way}

    def try_rates(points, widening, way=way, at=at):
      name = f'tuning_{widening}' if widening else 'tuning'
      factors = [point['rate'] for point in points]
      idf1 = _validate(
        condition,
        way,
        options._replace(
          seeds=seeds * len(factors), workdir=str(folder / name)
        ),
        {k: np.concatenate([x] * len(factors)) for k, x in first.items()},
        np.repeat(half * np.array(factors), len(seeds)),
      ).reshape(len(factors), len(seeds))
      for factor, values in zip(factors, idf1, strict=True):
        condition.results.put(
          {**at, 'rate': factor}, {'validation_idf1': values}
        )
      print(f'{condition.name}, {way}: IDF1 of {factors}: {idf1}', flush=True)
      return [
        comparison.Trial(point, float(values.mean()), None, np.arange(0))
        for point, values in zip(points, idf1, strict=True)
      ]

    best, edges, _ = comparison.search(
      {'rate': settings.factors},
      try_rates,
      widenings=WIDENINGS if settings.full else 0,
    )
    factor = best.point['rate']
    condition.results.put(at, {'rate': factor, 'edges': len(edges)})
    chosen[way] = float(half * factor)
  return chosen


def _validate(condition, way, options, start, rates):
  """Trains networks, and scores them on the validation sequence: IDF1."""
  settings = condition.options.settings
  params = train_way(way, condition.prepared, options, start, rates).params
  tracks = [
    judging.make_tracker(MATCHINGS[settings.matching], m)
    for m in condition.models(params)
  ]
  on = {settings.validation: condition.validation}
  judge = functools.partial(exposure_scores.judge, tracks, on)
  name = f'{pathlib.Path(options.workdir).name}_{way}'
  return condition.keep(name, params, judge)['idf1']


def score_networks(
  condition: Condition, name: str, params: Any
) -> dict[tuple[str, str], Mapping[str, np.ndarray]]:
  """Scores networks by each matching and oracle; adds their errors."""
  models, trials = condition.models(params), condition.trials
  tracks = {
    matching: [judging.make_tracker(MATCHINGS[matching], m) for m in models]
    for matching in condition.options.settings.matchings
  }
  if name in (FIRST, WAYS[0]):
    for oracle in ORACLES:
      tracks[f'oracle_{oracle}'] = [
        exposure_scores.make_oracle(m, oracle) for m in models
      ]
  scores = {}
  for matching, one in tracks.items():
    judge = functools.partial(exposure_scores.judge, one, trials)
    kept_scores = condition.keep(f'{name}_{matching}', params, judge)
    scores[name, matching] = kept_scores
    mean = kept_scores['idf1'].mean()
    print(f'{condition.name}, {name}, {matching}: IDF1 {mean:.2f}', flush=True)
  errors = condition.keep(
    f'{name}_errors',
    params,
    lambda: exposure_scores.measure_errors(models, trials),
  )
  condition.results.put({'condition': condition.name, 'method': name}, errors)
  return scores


def score_classical(
  condition: Condition,
) -> dict[tuple[str, str], Mapping[str, np.ndarray]]:
  """Scores classical trackers, tuned on the validation sequence."""
  scores = {}
  for name, (make, grid) in judging.classical(
    condition.prepared.task.noise
  ).items():

    def compute(make=make, grid=grid):
      values = judging.objective(make, condition.validation)
      choice = judging.tune(grid, values)
      # The same tracker for every seed.
      track = make(**choice.point)
      return exposure_scores.judge([track], condition.trials)

    scores[name, 'step'] = condition.keep(name, {}, compute)
  return scores


def add_costs(condition: Condition, params: Any) -> None:
  """Adds the CPU time of an update of each way, and of all of them."""
  settings = condition.options.settings
  costs = condition.keep(
    'costs',
    params,
    lambda: cost.measure(
      condition.prepared.task,
      condition.prepared.simulated,
      params,
      settings.search,
      settings.rollouts,
    ),
  )
  for way, seconds in costs.items():
    updates = count_updates(settings, way)
    condition.results.put(
      {'condition': condition.name, 'method': way},
      {
        'updates': updates,
        'update_cpu_seconds': float(seconds),
        'cpu_seconds': float(updates * seconds),
      },
    )


def run(
  results: harness.Results, options: harness.Options, name: str
) -> harness.Source:
  """Trains and scores all methods in a condition; returns the data's source."""
  prepared = train.prepare(options)
  condition = Condition(
    name,
    options,
    prepared,
    validation_trials(options),
    test_trials(options, prepared.test),
    results,
  )
  first = pretrain(prepared, options).params
  # The headroom first: without any, nothing is shown.
  scores = dict(score_networks(condition, FIRST, first))
  add_costs(condition, first)
  rates = tune_rates(condition)
  for way, rate in rates.items():
    each = np.full(len(options.seeds), rate)
    params = train_way(way, prepared, options, first, each).params
    scores |= score_networks(condition, way, params)
  if options.settings.full:
    scores |= score_classical(condition)
  exposure_scores.add_condition(results, name, scores, list(condition.trials))
  return prepared.source
