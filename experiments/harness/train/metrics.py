"""Metrics of a run: at every step, and at records on device and host."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from experiments.harness.store import files, records
from experiments.harness.train import compiled, placement, program, task
from experiments.harness.train.trained import Stopped, find_stops


class MetricsState(NamedTuple):
  """State of `with_metrics`.

  Attributes:
    inner: state of the solver.
    values: metrics of the last update.
  """

  inner: Any
  values: dict[str, chex.Array]


def with_metrics(
  solver: optax.GradientTransformationExtraArgs,
  measure: Callable[[Any, Any], dict[str, chex.Array]],
) -> optax.GradientTransformationExtraArgs:
  """Adds metrics of every step to a solver; `evaluate` measures at records.

  Args:
    solver: the solver.
    measure: from `(params, updates)` to scalars by name, which `train` records
      like losses: as means over the steps of a chunk, `loss/name`.

  Returns:
    A solver with the same updates.
  """

  def init_fn(params):
    shapes = jax.eval_shape(measure, params, params)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return MetricsState(solver.init(params), zeros)

  def update_fn(batch, state, params=None, **extra_args):
    updates, inner = solver.update(batch, state.inner, params, **extra_args)
    return updates, MetricsState(inner, measure(params, updates))

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class Recorder:
  """Measures and records.

  Args:
    history: the records so far.
    runner: the compiled program.
    places: devices of the carry.
    seeds: one for each member.
    steps: total number of steps; the host also measures at the last one.
    measure: see `train`.
  """

  def __init__(
    self,
    history: records.Records,
    runner: compiled.Compiled,
    places: placement.Placement,
    seeds: Sequence[int],
    steps: int,
    measure: task.Measure,
  ):
    self.history = history
    self._runner, self._places, self._seeds = runner, places, seeds
    self._steps, self._measure = steps, measure

  def stops(self, carry: program.Carry) -> tuple[Stopped, ...]:
    """Returns the members that have stopped."""
    return find_stops(carry, self._seeds, self._runner.culprits)

  def add(
    self, carry: program.Carry, on_device: dict[str, Any], before: int
  ) -> program.Carry:
    """Adds a record.

    Args:
      carry: carry with the measured params.
      on_device: metrics measured on the device.
      before: step of the previous record.

    Returns:
      The carry with the best params so far.

    Raises:
      ValueError: if the metric `select` is missing, or a metric of
        `evaluate_host` has a wrong shape or a name that is in use.
      TypeError: if `evaluate_host` does not return a dict.
    """
    step, select = int(carry.step), self._measure.select
    stopped = [stop.member for stop in self.stops(carry)]
    rows = jax.device_get(on_device)
    every, evaluate_host = self._measure.host_every, self._measure.evaluate_host
    due = step // every > before // every or step >= self._steps
    due = due and len(stopped) < len(self._seeds)
    if evaluate_host is not None and due:
      params, state = self._places.local((carry.params, carry.state))
      on_host = evaluate_host(params, step, state)
      rows |= _check_host_metrics(on_host, rows, len(self._seeds))
    rows = {name: np.array(row, np.float64) for name, row in rows.items()}
    for row in rows.values():
      row[stopped] = np.nan
    if select in rows:
      score = rows[select].astype(np.float32)
      if (score > np.asarray(carry.best.score)).any():
        carry = self._runner.choose(carry, np.int32(step), score)
    elif select and (due or evaluate_host is None):
      known = ', '.join(sorted(rows))
      raise ValueError(
        f'select={select!r} is unknown; the metrics are {known}.'
      )
    self.history.write(step, rows)
    if self._measure.on_record is not None and files.is_writer():
      self._measure.on_record(step, rows)
    return carry


def _check_host_metrics(
  metrics: Any, taken: Mapping[str, Any], count: int
) -> dict[str, np.ndarray]:
  """Returns the first process's values by metric, one per member."""
  if not isinstance(metrics, Mapping):
    raise TypeError(
      'evaluate_host returns a dict from metric to numbers, got '
      f'{type(metrics).__name__}.'
    )
  program.check_metrics(dict.fromkeys(metrics, 0.0), taken)
  rows = {}
  for name in sorted(metrics):
    value = np.asarray(metrics[name], np.float64)
    if value.shape not in ((), (count,)):
      raise ValueError(
        f'metric {name!r} of evaluate_host is one number, or one for each of '
        f'{count} seeds, got shape {value.shape}.'
      )
    rows[name] = np.broadcast_to(value, (count,))
  if jax.process_count() > 1:
    # Sends bits: jax would round to float32.
    bits = {name: row.copy().view(np.uint32) for name, row in rows.items()}
    bits = multihost_utils.broadcast_one_to_all(bits)
    rows = {n: np.asarray(x).copy().view(np.float64) for n, x in bits.items()}
  return rows
