"""Compares the costs of programs: operations, memory, time.

Operations and memory are the compiler's counts, which are repeatable. Times on
a shared machine are not: two programs are timed in turn, A B A B ..., and
compared pair by pair, so that other load affects both of a pair.

A `Row` is a comparison of the suite. It is a cost divided by another cost, so
less is better, and its bounds are upper bounds.
"""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

import bilevel_jax as bj
from experiments.benchmarks import environment

# Seconds of rest after a turn in another process, whose waiting threads keep a
# core busy for some milliseconds.
_SETTLE = 0.02
Run = Callable[[int], Any]


class Context(NamedTuple):
  """The context of a measurement.

  Attributes:
    rounds: pairs of timings of a comparison.
    seconds: approximate duration of a timing.
    peers: packages to compare with, in a separate environment.
    workdir: folder for files.
    data_dir: folder of data sets, or None.
  """

  rounds: int
  seconds: float
  peers: environment.Peers
  workdir: str
  data_dir: str | None = None

  def few(self) -> dict[str, int]:
    """Returns arguments of `compare` for slow programs: few pairs of a step."""
    return {'rounds': min(self.rounds, 3), 'steps': 1}


class Row(NamedTuple):
  """A comparison.

  Attributes:
    name: unique name, whose first part is the group.
    compared: what is measured / what it is compared with, and the sizes.
    measure: from a `Context` to numbers by name, such as those of `compare`.
    bounds: upper bounds of some of these numbers.
  """

  name: str
  compared: str
  measure: Callable[[Context], Mapping[str, float]]
  bounds: Mapping[str, float] = {}


class Rows(list[Row]):
  """The rows of a module."""

  def add(
    self,
    name: str,
    compared: str,
    function: Callable[..., Any],
    *arguments: Any,
    **bounds: float,
  ) -> None:
    """Adds a row; `function` takes the arguments and a `Context`."""
    measured = functools.partial(function, *arguments)
    self.append(Row(name, compared, measured, bounds))


class Program:
  """A compiled step with its carry, like a training loop.

  Attributes:
    flops: floating-point operations of a step, counted by the compiler.
    memory: bytes of a step: arguments, outputs that do not reuse an argument's
      buffer, and temporary buffers at their peak.
    temporary: bytes of the temporary buffers only.
    carry: the carry after the steps so far.
  """

  def __init__(
    self, step: Callable[[Any, Any], Any], carry: Any, batch: Any = None
  ) -> None:
    """Compiles a step; its carry is donated.

    Args:
      step: `step(carry, batch) -> carry`.
      carry: the first carry, which is copied.
      batch: the batch of every step.
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
    """Runs steps and waits for the last one."""
    for _ in range(steps):
      self.carry = self._compiled(self.carry, self._batch)
    jax.block_until_ready(self.carry)


def solver_program(solver: Any, params: Any, batch: Any = None) -> Program:
  """Compiles a step of a solver: update and apply."""
  return Program(solver_step(solver), (params, solver.init(params)), batch)


def solver_step(solver: Any) -> Callable[[Any, Any], Any]:
  """Makes a step of a solver, whose carry has params and state."""

  def step(carry, batch):
    params, state = carry
    updates, state = solver.update(batch, state, params)
    return bj.apply_updates(params, updates), state

  return step


class Ratio(NamedTuple):
  """The ratio of the times of two programs.

  Attributes:
    wall: median over rounds of the ratio of wall times.
    low: smallest ratio of wall times.
    high: largest ratio of wall times.
    cpu: median of the ratio of CPU times over all threads.
    seconds: median wall time of the first program, s per step.
    base_seconds: median wall time of the second program, s per step.
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
  program: Run,
  base: Run,
  *,
  rounds: int,
  seconds: float = 0.1,
  steps: int | None = None,
  warm: bool = True,
) -> Ratio:
  """Times two programs in turn.

  Args:
    program: runs a number of steps and waits for the last one; in another
      process, it returns the wall and CPU seconds there.
    base: the program to compare with.
    rounds: number of pairs.
    seconds: approximate duration of a timing, which determines its steps.
    steps: number of steps of a timing, instead of `seconds`.
    warm: whether each program runs once before.

  Returns:
    The `Ratio` of program to base.
  """
  if warm:
    program(1)
    base(1)
  if steps is None:
    one = min(_timed(base, 1)[0] for _ in range(2))
    steps = max(1, round(seconds / max(one, 1e-9)))
  pairs = [(_timed(program, steps), _timed(base, steps)) for _ in range(rounds)]
  times = np.array(pairs)  # (rounds, 2 programs, wall and CPU)
  ratios = times[:, 0] / np.maximum(times[:, 1], 1e-12)
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


def compare(
  program: Program | Run,
  base: Program | Run,
  context: Context,
  **how: Any,
) -> dict[str, float]:
  """Measures the ratios of a row.

  Args:
    program: the measured program.
    base: the program to compare with.
    context: rounds and seconds.
    **how: other arguments of `time_ratio`.

  Returns:
    The fields of a `Ratio`; for two `Program`s also `flops` and `memory`.
  """
  runs = [p.run if isinstance(p, Program) else p for p in (program, base)]
  arguments = {'rounds': context.rounds, 'seconds': context.seconds}
  numbers = time_ratio(*runs, **(arguments | how))._asdict()
  if isinstance(program, Program) and isinstance(base, Program):
    numbers['memory'] = program.memory / base.memory
    if base.flops > 0:
      numbers['flops'] = program.flops / base.flops
  return numbers


def compare_to_product(
  program: Program, flops: float, size: int, context: Context
) -> dict[str, float]:
  """Compares a program with a matrix product of as many operations.

  Args:
    program: the measured program.
    flops: operations that it needs.
    size: rows of the square matrices of the product.
    context: rounds and seconds.

  Returns:
    The result of `compare`, and `peak_share`, the inverse of `wall`.
  """
  matrix = jax.random.normal(jax.random.key(0), (size, size)) / size**0.5
  plain = Program(lambda carry, batch: carry @ batch, matrix, matrix)
  each = max(1, round(flops / plain.flops))
  numbers = compare(program.run, lambda steps: plain.run(each * steps), context)
  # Corrects for the rounded number of products.
  scale = each * plain.flops / flops
  for name in ('wall', 'low', 'high', 'cpu'):
    numbers[name] *= scale
  return numbers | {'peak_share': 1 / numbers['wall']}


def judge(numbers: Mapping[str, float], bounds: Mapping[str, float]) -> str:
  """Returns `holds`, `undecided` or `EXCEEDED`, or '' without bounds.

  A wall time is undecided if the median is above the bound and the fastest pair
  is within it.
  """
  verdicts = ['']
  for name, bound in bounds.items():
    if numbers[name] <= bound:
      verdicts.append('holds')
    elif name == 'wall' and numbers.get('low', np.inf) <= bound:
      verdicts.append('undecided')
    else:
      verdicts.append('EXCEEDED')
  return max(verdicts, key=('', 'holds', 'undecided', 'EXCEEDED').index)


def exponent(sizes: Any, values: Any) -> float:
  """Fits the slope of log value over log size by least squares."""
  return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def fastest(program: Program, rounds: int) -> float:
  """Returns the shortest wall time of a step; other load only adds to it."""
  program.run(1)
  return min(_timed(program.run, 1)[0] for _ in range(rounds))


def growth(
  make: Callable[[int], Program], sizes: tuple[int, ...], rounds: int
) -> dict[str, float]:
  """Fits the exponents of time and memory over the size of a program."""
  seconds, memory = [], []
  for size in sizes:
    program = make(size)
    seconds.append(fastest(program, rounds))
    memory.append(program.memory)
  return {
    'time_exponent': exponent(sizes, seconds),
    'memory_exponent': exponent(sizes, memory),
    'seconds': seconds[-1],
    'base_seconds': seconds[0],
  }


def _timed(program, steps):
  wall, cpu = time.perf_counter(), time.process_time()
  elsewhere = program(steps)
  if elsewhere is not None:
    time.sleep(_SETTLE)
    return elsewhere
  return time.perf_counter() - wall, time.process_time() - cpu
