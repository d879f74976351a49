"""Measures what compiled programs cost: operations, memory, time.

Operations and memory are the compiler's own counts, exact and repeatable. Time
on a shared machine is neither: two programs are timed in turn, A B A B ..., and
compared pair by pair, so that a busy spell hits both of a pair.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np


class Program:
  """A compiled step that keeps its carry, like a training loop.

  Attributes:
    flops: floating-point operations of one step, as the compiler counts them.
    memory: bytes of one step: arguments, outputs that do not reuse an
      argument's buffer, and temporary buffers at their peak.
    temporary: bytes of the temporary buffers alone.
    carry: after the steps so far.
  """

  def __init__(
    self, step: Callable[[Any, Any], Any], carry: Any, batch: Any
  ) -> None:
    """Compiles a step; its carry is donated.

    Args:
      step: `step(carry, batch) -> carry`.
      carry: the first carry; copied, the caller's stays valid.
      batch: what every step gets.
    """
    carry = jax.tree.map(lambda x: jax.numpy.array(x, copy=True), carry)
    lowered = jax.jit(step, donate_argnums=0).lower(carry, batch)
    self._compiled = lowered.compile()
    self.carry, self._batch = carry, batch
    self.flops = float(self._compiled.cost_analysis()['flops'])
    sizes = self._compiled.memory_analysis()
    self.temporary = sizes.temp_size_in_bytes
    self.memory = (
      sizes.argument_size_in_bytes
      + sizes.output_size_in_bytes
      - sizes.alias_size_in_bytes
      + self.temporary
    )

  def run(self, steps: int) -> None:
    """Runs so many steps and waits for the last."""
    for _ in range(steps):
      self.carry = self._compiled(self.carry, self._batch)
    jax.block_until_ready(self.carry)


class Ratio(NamedTuple):
  """How the time of one program compares with another's.

  Attributes:
    wall: median over rounds of the ratio of wall times.
    low: the smallest such ratio.
    high: the largest.
    cpu: median of the ratio of CPU times, over all threads.
    seconds: median wall time of the first program, s a call.
    base_seconds: of the second.
  """

  wall: float
  low: float
  high: float
  cpu: float
  seconds: float
  base_seconds: float

  def __str__(self) -> str:
    return f'{self.wall:.3f} ({self.low:.2f} to {self.high:.2f})'


def time_ratio(
  program: Callable[[int], None],
  base: Callable[[int], None],
  *,
  rounds: int,
  seconds: float = 0.1,
  steps: int | None = None,
) -> Ratio:
  """Times two programs in turn in one process.

  Args:
    program: runs a number of steps and waits for the last.
    base: likewise, what `program` is compared with.
    rounds: how many pairs.
    seconds: about how long one timing lasts; it sets how many steps both
      programs run in it.
    steps: so many instead.

  Returns:
    A `Ratio` of program to base.
  """
  program(1)
  base(1)  # Warm: buffers, threads, caches.
  if steps is None:
    one = min(_timed(base, 1)[0] for _ in range(2))
    steps = max(1, round(seconds / one))
  pairs = [(_timed(program, steps), _timed(base, steps)) for _ in range(rounds)]
  times = np.array(pairs)  # (rounds, 2 programs, wall and CPU)
  ratios = times[:, 0] / times[:, 1]
  wall, cpu = np.median(ratios, axis=0)
  each = np.median(times[:, :, 0], axis=0) / steps
  return Ratio(
    wall=float(wall),
    low=float(ratios[:, 0].min()),
    high=float(ratios[:, 0].max()),
    cpu=float(cpu),
    seconds=float(each[0]),
    base_seconds=float(each[1]),
  )


def judge(value: float, low: float, high: float, bound: float) -> str:
  """Whether a bound holds for a measured median and its range."""
  if value <= bound:
    return 'holds'
  return 'undecided' if low <= bound <= high else 'EXCEEDED'


def _timed(program, steps):
  wall, cpu = time.perf_counter(), time.process_time()
  program(steps)
  return time.perf_counter() - wall, time.process_time() - cpu
