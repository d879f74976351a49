"""What is noted at a record: metrics of device and host, best params, stops."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from experiments.harness.store import records as metrics_lib
from experiments.harness.train import compiled, host
from experiments.harness.train import placement as placement_lib
from experiments.harness.train import program as program_lib
from experiments.harness.train import trained as outcome


class Recorder:
  """Adds records to those of a run; see `train` for the arguments.

  Args:
    records: those so far.
    runner: has the program's functions.
    places: where a carry is.
    seeds: one for each member.
    steps: at the last of which the host measures too.
    evaluate_host: of the user.
    host_every: likewise.
    select: likewise.
  """

  def __init__(
    self,
    records: metrics_lib.Records,
    runner: compiled.Compiled,
    places: placement_lib.Placement,
    seeds: Sequence[int],
    *,
    steps: int,
    evaluate_host: Callable[..., Any] | None,
    host_every: int,
    select: str | None,
  ):
    self.records = records
    self._runner, self._places, self._seeds = runner, places, seeds
    self._steps, self._every = steps, host_every
    self._evaluate_host, self._select = evaluate_host, select

  def stops(self, carry: program_lib.Carry) -> tuple[outcome.Stopped, ...]:
    """The members that have stopped."""
    return outcome.stops_of(carry, self._seeds, self._runner.culprits)

  def add(
    self, carry: program_lib.Carry, measured: dict[str, Any], before: int
  ) -> program_lib.Carry:
    """Adds a record.

    Args:
      carry: with the params that were measured.
      measured: metrics of the device.
      before: the step of the record before.

    Returns:
      The carry, with the best params so far.

    Raises:
      ValueError: if the metric that selects is not there.
    """
    step, count = int(carry.step), len(self._seeds)
    stopped = [stop.member for stop in self.stops(carry)]
    rows = jax.device_get(measured)
    passed = step // self._every > before // self._every
    on_host = self._evaluate_host is not None and len(stopped) < count
    on_host = on_host and (passed or step >= self._steps)
    if on_host:
      params, state = self._places.local((carry.params, carry.state))
      found = host.measure(
        self._evaluate_host, params, step, state, count=count
      )
      program_lib.check_metrics(dict.fromkeys(found, 0.0), rows)
      rows |= found
    rows = {name: np.array(row, np.float64) for name, row in rows.items()}
    for row in rows.values():
      row[stopped] = np.nan
    if self._select in rows:
      carry = self._keep_best(carry, step, rows[self._select])
    elif self._select and (on_host or self._evaluate_host is None):
      known = ', '.join(sorted(rows))
      raise ValueError(
        f'select={self._select!r} is none of the metrics: {known}.'
      )
    self.records.write(step, rows)
    return carry

  def _keep_best(self, carry, step, score):
    score = score.astype(np.float32)
    if not (score > np.asarray(carry.best.score)).any():
      return carry
    return self._runner.choose(carry, np.int32(step), score)
