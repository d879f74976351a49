"""Searches without gradients: points are asked for, and told their losses."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import harness
from experiments.pbgd import network_problem


class Search:
  """A search for each seed.

  Args:
    space: the box of points.
    seeds: seeds, one per search.
  """

  def __init__(
    self, space: network_problem.Space, seeds: Sequence[int]
  ) -> None:
    self._space = space
    self._rngs = [np.random.default_rng(seed) for seed in seeds]
    self._tried: list[np.ndarray] = []
    self._losses: list[np.ndarray] = []

  def ask(self) -> np.ndarray:
    """The next point of each search, (seeds, numbers)."""
    space = self._space
    points = [rng.uniform(space.low, space.high) for rng in self._rngs]
    self._tried.append(np.stack(points))
    return self._tried[-1]

  def tell(self, losses: Any) -> None:
    """Takes the losses (seeds,) of the last points; NaN is the worst."""
    losses = np.asarray(losses, np.float64)
    self._losses.append(np.where(np.isnan(losses), np.inf, losses))

  def best(self) -> np.ndarray:
    """The point of the smallest loss of each search, (seeds, numbers)."""
    rows = np.argmin(self._losses, axis=0)
    return np.stack(self._tried)[rows, np.arange(len(rows))]


class Bayesian(Search):
  """optuna's tree-structured Parzen estimator; arguments as for `Search`."""

  def __init__(
    self, space: network_problem.Space, seeds: Sequence[int]
  ) -> None:
    super().__init__(space, seeds)
    try:
      import optuna
    except ImportError as error:
      raise harness.SettingsError(
        'the method tpe needs optuna: pip install "bilevel_jax[tune]", or '
        'leave it out of --methods.'
      ) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    self._studies = [
      optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
      for seed in seeds
    ]

  def ask(self) -> np.ndarray:
    """The next point of each search, (seeds, numbers)."""
    space = self._space
    ranges = list(zip(space.names, space.low, space.high, strict=True))
    self._trials = [study.ask() for study in self._studies]
    points = [
      [trial.suggest_float(*each) for each in ranges] for trial in self._trials
    ]
    self._tried.append(np.asarray(points))
    return self._tried[-1]

  def tell(self, losses: Any) -> None:
    """Takes the losses (seeds,) of the last points; NaN is the worst."""
    super().tell(losses)
    worst = 1e9  # Not infinite: the estimator ranks losses.
    for study, trial, loss in zip(
      self._studies, self._trials, self._losses[-1], strict=True
    ):
      study.tell(trial, min(loss, worst))


def make(
  name: str, space: network_problem.Space, seeds: Sequence[int]
) -> Search:
  """Makes the search `random` or `tpe`."""
  return {'random': Search, 'tpe': Bayesian}[name](space, seeds)
