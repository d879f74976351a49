"""What a penalty step costs beside the same step written by hand.

    python -m experiments.benchmarks.penalty --models=linear,mlp --rounds=5

Expected: V-PBGD 1.000 times the operations by hand, and 1.7 to 2.0 times the
time of a gradient step on both losses. Time: two to three minutes on 2 cores.

Data hyper-cleaning at its published size, with random data: cost does not
depend on the values. Four questions, for a linear model and a small network:

1. Does the library cost more than plain jax? V-PBGD and G-PBGD, as rows and
   fused, each against the same step by hand. Bound: 1.02 times the operations.
2. What does bilevel cost at all? Against one gradient step on upper + lower
   with the same batches. Bound for V-PBGD: 2.2 times.
3. What do seeds at once save? One step of ten seeds by `vmap`, their images
   shared, against ten steps one after the other. Bound: 1.0 times. Where one
   seed fills the caches, fewer at once do better: `lax.map` in twos.
4. Which form is cheaper? Rows or fused; and for the gradient norm, reverse over
   reverse or forward over reverse.

Operations and memory are the compiler's counts. Times are medians of paired
ratios with their range, see `measure`; compare the CPU ratio where the range is
wide.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from experiments import harness
from experiments.benchmarks import cleaning_steps as steps
from experiments.benchmarks import measure

BOUND_BY_HAND = 1.02
BOUND_SINGLE_LEVEL = 2.2
BOUND_SEEDS = 1.0


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    models: which of linear (784-10) and mlp (784-300-10).
    rows: of each of the two data sets; 5,000 is the published size.
    rounds: pairs of timings of each comparison.
    seeds: how many are mapped at once.
  """

  models: tuple[str, ...] = ('linear', 'mlp')
  rows: int = 5_000
  rounds: int = 5
  seeds: int = 10


PRESETS = {'paper': Settings()}


def check(settings: Settings) -> None:
  """Raises SettingsError for settings that no run can have."""
  for model in settings.models:
    if model not in steps.MODELS:
      raise harness.SettingsError(
        f'models are {", ".join(steps.MODELS)}, got {model!r}.'
      )


class Line(NamedTuple):
  """One comparison: ratios of a program to its base.

  Attributes:
    model: 'linear' or 'mlp'.
    what: the two programs.
    flops: ratio of operations.
    memory: bytes of the program and of its base.
    time: ratio of times.
    flops_bound: what `flops` may be at most, if anybody said so.
    wall_bound: likewise, of the wall time.
  """

  model: str
  what: str
  flops: float
  memory: tuple[float, float]
  time: measure.Ratio
  flops_bound: float | None = None
  wall_bound: float | None = None


def compare_forms(model: str, sizes: steps.Sizes, rounds: int) -> list[Line]:
  """Library, hand and single-level steps of one model, pair by pair."""
  case = steps.hyper_cleaning(model, sizes)
  programs = {}
  for name in ('v_pbgd', 'g_pbgd'):
    for form in ('rows', 'fused'):
      for who, make in (('library', steps.library), ('hand', steps.by_hand)):
        step, carry = make(case, name, fused=form == 'fused')
        key = (name, form, who)
        programs[key] = measure.Program(step, carry, case.data)
  single = measure.Program(*steps.single_level(case), case.data)
  reverse, forward = (
    measure.Program(*steps.slope_penalty(case, forward=mode), case.data)
    for mode in (False, True)
  )

  def line(what, program, base, **bounds):
    ratio = measure.time_ratio(program.run, base.run, rounds=rounds)
    flops = program.flops / base.flops
    memory = (program.memory, base.memory)
    return Line(model, what, flops, memory, ratio, **bounds)

  lines = []
  for name in ('v_pbgd', 'g_pbgd'):
    for form in ('rows', 'fused'):
      ours, theirs = (programs[name, form, who] for who in ('library', 'hand'))
      what = f'{name} {form} / by hand'
      lines.append(line(what, ours, theirs, flops_bound=BOUND_BY_HAND))
  for name in ('v_pbgd', 'g_pbgd'):
    what = f'{name} fused / step on f + g'
    bounds = {}
    if name == 'v_pbgd':
      bounds = dict.fromkeys(('flops_bound', 'wall_bound'), BOUND_SINGLE_LEVEL)
    ours = programs[name, 'fused', 'library']
    lines.append(line(what, ours, single, **bounds))
  for name in ('v_pbgd', 'g_pbgd'):
    rows, fused = (programs[name, f, 'library'] for f in ('rows', 'fused'))
    lines.append(line(f'{name} rows / fused', rows, fused))
  what = 'slope penalty forward / reverse over reverse'
  lines.append(line(what, forward, reverse))
  return lines


def compare_seeds(
  model: str, sizes: steps.Sizes, rounds: int, seeds: int
) -> list[Line]:
  """Seeds at once against seeds one after the other."""
  case = functools.partial(steps.hyper_cleaning, model, sizes)
  first = case(0)
  one = measure.Program(*steps.library(first, 'v_pbgd', fused=True), first.data)
  # Which seed it is does not change the cost: the same program, over and over.
  one_by_one = lambda steps: one.run(seeds * steps)
  lines = []
  for at_once in (None, 2):
    step, carry, batch = steps.seeds_together(case, seeds, at_once)
    together = measure.Program(step, carry, batch)
    ratio = measure.time_ratio(together.run, one_by_one, rounds=rounds)
    how = 'by vmap' if at_once is None else f'{at_once} at a time'
    # The compiler counts the body of a loop once: no operations for the latter.
    flops = together.flops / (seeds * one.flops)
    lines.append(
      Line(
        model,
        f'{seeds} seeds {how} / one by one',
        flops if at_once is None else math.nan,
        (together.memory, one.memory),
        ratio,
        wall_bound=BOUND_SEEDS,
      )
    )
  return lines


def as_row(line: Line) -> dict[str, Any]:
  """A row of the printed table."""
  verdicts = []
  exact = (line.flops,) * 3
  measured = line.time.wall, line.time.low, line.time.high
  for what, numbers, bound in (
    ('FLOPs', exact, line.flops_bound),
    ('wall', measured, line.wall_bound),
  ):
    if bound is not None:
      verdicts.append(f'{what} <= {bound}: {measure.judge(*numbers, bound)}')
  pair = lambda a, b: f'{a:.1f} / {b:.1f}'
  return {
    'model': line.model,
    'compared': line.what,
    'FLOPs': '-' if math.isnan(line.flops) else f'{line.flops:.4f}',
    'wall (range)': str(line.time),
    'CPU': f'{line.time.cpu:.3f}',
    'MB': pair(*(size / 1e6 for size in line.memory)),
    'ms': pair(1e3 * line.time.seconds, 1e3 * line.time.base_seconds),
    'bound': ', '.join(verdicts),
  }


def as_metrics(lines: Sequence[Line]) -> dict[str, float]:
  """A flat map from names to numbers, for `results.json`."""
  metrics = {}
  for line in lines:
    words = f'{line.model} {line.what}'.replace('/', 'over').replace('+', '')
    name = '_'.join(words.lower().split())
    metrics[f'{name}_flops'] = line.flops
    metrics[f'{name}_memory'] = line.memory[0] / line.memory[1]
    metrics[f'{name}_wall'] = line.time.wall
    metrics[f'{name}_wall_low'] = line.time.low
    metrics[f'{name}_wall_high'] = line.time.high
    metrics[f'{name}_cpu'] = line.time.cpu
  return metrics


def main(options: harness.Options) -> None:
  """Runs the comparisons, prints them and writes them down."""
  start = time.perf_counter()
  settings = options.settings
  lines = []
  for model in settings.models:
    sizes = steps.Sizes(rows=settings.rows)
    lines += compare_forms(model, sizes, settings.rounds)
    lines += compare_seeds(model, sizes, settings.rounds, settings.seeds)
  harness.write_table(options.workdir, [as_row(line) for line in lines])
  harness.write_results(
    options,
    metrics=as_metrics(lines),
    seconds=time.perf_counter() - start,
  )


STUDY = harness.Study(
  main, PRESETS, paper='benchmarks', binary='penalty', check=check
)


if __name__ == '__main__':
  harness.run(STUDY)
