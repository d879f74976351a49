"""Measures what programs cost compared with others: operations, memory, time.

Operations and memory are the compiler's own counts, exact and repeatable. Time
on a shared machine is neither: two programs are timed in turn, A B A B ..., and
compared pair by pair, so that a busy spell hits both of a pair.

A `Row` is one comparison of the suite. It is always a cost over another cost,
so that less is better, and its bounds say how much it may be at most.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

import bilevel_jax as bj
from experiments.benchmarks import environment

# Seconds of rest after a turn in another process: threads that
# wait for work keep a processor busy for some milliseconds.
_SETTLE = 0.02
Run = Callable[[int], Any]


class Context(NamedTuple):
  """What a measurement may use.

  Attributes:
    rounds: pairs of timings of each comparison.
    seconds: about how long one timing lasts.
    peers: packages to compare with, in an environment of their own.
    workdir: for files.
    data_dir: folder of data sets, or None.
  """

  rounds: int
  seconds: float
  peers: environment.Peers
  workdir: str
  data_dir: str | None = None

  def few(self) -> dict[str, int]:
    """Arguments of `compare` for what takes seconds: few pairs of one step."""
    return {'rounds': min(self.rounds, 3), 'steps': 1}


class Row(NamedTuple):
  """One comparison.

  Attributes:
    name: unique; its first word is the group.
    compared: what is measured / what it is compared with, and the sizes.
    measure: from a `Context` to numbers by name, such as those of `compare`.
    bounds: what some of these numbers may be at most.
  """

  name: str
  compared: str
  measure: Callable[[Context], Mapping[str, float]]
  bounds: Mapping[str, float] = {}


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
    self, step: Callable[[Any, Any], Any], carry: Any, batch: Any = None
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
    """Runs the steps and waits for the last."""
    for _ in range(steps):
      self.carry = self._compiled(self.carry, self._batch)
    jax.block_until_ready(self.carry)


def solver_program(solver: Any, params: Any, batch: Any = None) -> Program:
  """A step of a solver: update and apply."""
  return Program(solver_step(solver), (params, solver.init(params)), batch)


def solver_step(solver: Any) -> Callable[[Any, Any], Any]:
  """A step of a carry of params and state."""

  def step(carry, batch):
    params, state = carry
    updates, state = solver.update(batch, state, params)
    return bj.apply_updates(params, updates), state

  return step


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
    program: runs a number of steps and waits for the last; one in another
      process returns the wall and CPU seconds that it took there.
    base: the same, for what `program` is compared with.
    rounds: how many pairs.
    seconds: about how long one timing lasts; it sets how many steps both
      programs run in it.
    steps: the number of steps, in place of `seconds`.
    warm: whether each runs once before: buffers, threads, caches.

  Returns:
    A `Ratio` of program to base.
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
  """The numbers of a row: ratios of two programs.

  Args:
    program: what is measured.
    base: what it is compared with.
    context: rounds and seconds.
    **how: other arguments of `time_ratio`.

  Returns:
    The fields of a `Ratio`; of two `Program`s also `flops` and `memory`.
  """
  runs = [p.run if isinstance(p, Program) else p for p in (program, base)]
  arguments = {'rounds': context.rounds, 'seconds': context.seconds}
  numbers = time_ratio(*runs, **(arguments | how))._asdict()
  if isinstance(program, Program) and isinstance(base, Program):
    numbers['memory'] = program.memory / base.memory
    if base.flops > 0:
      numbers['flops'] = program.flops / base.flops
  return numbers


def beside_product(
  program: Program, flops: float, size: int, context: Context
) -> dict[str, float]:
  """Time of a program over that of a plain product with as many operations.

  Args:
    program: what is measured.
    flops: its operations, at most those that it needs.
    size: rows of the square matrices of the product.
    context: rounds and seconds.

  Returns:
    As `compare`, and `peak_share`, the inverse of `wall`.
  """
  matrix = jax.random.normal(jax.random.key(0), (size, size)) / size**0.5
  plain = Program(lambda carry, batch: carry @ batch, matrix, matrix)
  each = max(1, round(flops / plain.flops))
  numbers = compare(program.run, lambda steps: plain.run(each * steps), context)
  # A whole number of products has nearly as many operations.
  scale = each * plain.flops / flops
  for name in ('wall', 'low', 'high', 'cpu'):
    numbers[name] *= scale
  return numbers | {'peak_share': 1 / numbers['wall']}


def judge(numbers: Mapping[str, float], bounds: Mapping[str, float]) -> str:
  """Whether bounds hold: `holds`, `undecided`, `EXCEEDED`, or '' without any.

  A wall time is undecided where the median is above the bound but the fastest
  pair is within it.
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
  """Slope of log value over log size, by least squares."""
  return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def fastest(program: Program, rounds: int) -> float:
  """The shortest wall time of a step; a shared machine only adds to it."""
  program.run(1)
  return min(_timed(program.run, 1)[0] for _ in range(rounds))


def growth(
  make: Callable[[int], Program], sizes: tuple[int, ...], rounds: int
) -> dict[str, float]:
  """How time and memory of a program grow with its size, as exponents."""
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
