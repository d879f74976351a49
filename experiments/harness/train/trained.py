"""The result of `train`, and its members that became non-finite."""

import itertools
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.harness.app import errors

_REMEDY = (
  'Try a smaller step size for these sequences, or clip the gradients '
  '(optax.clip_by_global_norm).'
)
_FIRST_REMEDY = (
  'At the first step, check the data, rewards and initial params for NaN '
  'before you change the step size.'
)


class Stopped(NamedTuple):
  """A member that became non-finite.

  Attributes:
    member: its index.
    seed: its seed.
    step: the step, counted from 0, whose result was not finite.
    sequences: the non-finite fields of the params, and losses as `loss/name`.
  """

  member: int
  seed: int
  step: int
  sequences: tuple[str, ...]


class Trained(NamedTuple):
  """The result of a run.

  Attributes:
    params: last finite params; leaves have a leading axis of members.
    state: the solver's state, with the same axis.
    best: a `Best`, or () if no metric selects.
    step: steps taken.
    steps: steps of the records, int (records,).
    history: values by metric, float64 (records, members); NaN if not finite,
      and after a member has stopped.
    stopped: members that became non-finite.
    seconds: run time without compilation, over all attempts.
    compile_seconds: compile time, over all attempts.
  """

  params: Any
  state: Any
  best: Any
  step: int
  steps: np.ndarray
  history: dict[str, np.ndarray]
  stopped: tuple[Stopped, ...]
  seconds: float
  compile_seconds: float


def find_stops(
  carry: Any, seeds: Sequence[int], names: Sequence[str]
) -> tuple[Stopped, ...]:
  """Returns the members of a carry that stopped, in order."""
  stopped, culprits = np.asarray(carry.stopped), np.asarray(carry.culprits)
  return tuple(
    Stopped(
      member=int(i),
      seed=seeds[i],
      step=int(stopped[i]),
      sequences=tuple(itertools.compress(names, culprits[i])),
    )
    for i in np.flatnonzero(stopped >= 0)
  )


def _remedy(step: int) -> str:
  """What to try if a member stopped at a step."""
  return _REMEDY if step else f'{_FIRST_REMEDY} {_REMEDY}'


def warn_stopped(name: str, stops: Sequence[Stopped], *, alone: bool) -> None:
  """Warns of each member that stopped."""
  then = 'It keeps its last finite params; the others continue. '
  for stop in stops:
    warnings.warn(
      f'{name}: seed {stop.seed} (member {stop.member}) stopped at step '
      f'{stop.step}: {", ".join(stop.sequences)} became non-finite. '
      f'{"" if alone else then}{_remedy(stop.step)}',
      RuntimeWarning,
      stacklevel=4,
    )


def all_stopped(
  name: str, trained: Trained, where: str
) -> errors.AllStoppedError:
  """Creates the error of a run whose members have all stopped."""
  stops = trained.stopped
  last = max(stops, key=lambda stop: stop.step)
  error = errors.AllStoppedError(
    f'{name}: all {len(stops)} seeds became non-finite, the last at step '
    f'{last.step} ({", ".join(last.sequences)}).{where} '
    f'{_remedy(last.step)}'
  )
  error.trained = trained
  return error
