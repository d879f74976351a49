"""What a penalty step costs beside the same step written by hand.

    python -m experiments.benchmarks.penalty --models=linear,mlp --rounds=5

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
wide. Takes two to three minutes on two cores.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.benchmarks import measure

BOUND_BY_HAND = 1.02
BOUND_SINGLE_LEVEL = 2.2
BOUND_SEEDS = 1.0

# Step sizes and ramp of the published linear run; they do not affect cost.
_UPPER, _LOWER, _VALUE = 0.1, 0.1, 0.01
_RAMP = optax.linear_schedule(0.0, 0.2, 30_000)


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
  """Raises ValueError for settings that no run can have."""
  for model in settings.models:
    if model not in _MODELS:
      raise ValueError(f'models are {", ".join(_MODELS)}, got {model!r}.')
  for name in ('rows', 'rounds', 'seeds'):
    if getattr(settings, name) < 1:
      raise ValueError(f'{name} is at least 1, got {getattr(settings, name)}.')


class Sizes(NamedTuple):
  """Sizes of the problem; by default the published ones."""

  rows: int = 5_000  # Of each of the two data sets.
  features: int = 784
  hidden: int = 300
  classes: int = 10


class Data(NamedTuple):
  """Both data sets; images are shared by seeds, labels are not."""

  train_images: Any
  train_labels: Any
  val_images: Any
  val_labels: Any


class Case(NamedTuple):
  """A problem with a start and data."""

  problem: bj.BilevelProblem
  params: bj.BilevelParams
  data: Data


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


def _linear(y, images):
  return images @ y['w'] + y['b']


def _network(y, images):
  hidden = jax.nn.sigmoid(images @ y['w1'] + y['b1'])
  return hidden @ y['w2'] + y['b2']


_MODELS = {'linear': _linear, 'mlp': _network}


def hyper_cleaning(model: str, sizes: Sizes, seed: int = 0) -> Case:
  """Weighs noisy training rows such that the model does well on clean ones.

  Args:
    model: 'linear' or 'mlp'.
    sizes: of the data and the model.
    seed: of labels and parameters; images are the same for all seeds.

  Returns:
    A problem, its start and random data.
  """
  apply = _MODELS[model]
  cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels

  def upper(x, y, data):
    del x
    return jnp.mean(cross_entropy(apply(y, data.val_images), data.val_labels))

  def lower(x, y, data):
    losses = cross_entropy(apply(y, data.train_images), data.train_labels)
    return jnp.mean(jax.nn.sigmoid(x) * losses)

  rows, features, hidden, classes = sizes
  images = functools.partial(jax.random.uniform, shape=(rows, features))
  labels = functools.partial(
    jax.random.randint, shape=(rows,), minval=0, maxval=classes
  )
  normal = lambda key, *shape: 0.05 * jax.random.normal(key, shape)
  keys = jax.random.split(jax.random.key(seed + 2), 5)
  data = Data(
    train_images=images(jax.random.key(0)),
    train_labels=labels(keys[0]),
    val_images=images(jax.random.key(1)),
    val_labels=labels(keys[1]),
  )
  if model == 'linear':
    y = {'w': normal(keys[3], features, classes), 'b': jnp.zeros(classes)}
  else:
    y = {
      'w1': normal(keys[3], features, hidden),
      'b1': jnp.zeros(hidden),
      'w2': normal(keys[4], hidden, classes),
      'b2': jnp.zeros(classes),
    }
  params = bj.BilevelParams(upper=normal(keys[2], rows), lower=y)
  return Case(bj.BilevelProblem(upper, lower), params, data)


def library(case: Case, name: str, *, fused: bool):
  """A step of a named solver: update and apply.

  Args:
    case: the problem and its start.
    name: 'v_pbgd' or 'g_pbgd'.
    fused: as in the solver.

  Returns:
    A step of (carry, batch) and its first carry.
  """
  rates = {'upper': optax.sgd(_UPPER), 'lower': optax.sgd(_LOWER)}
  if name == 'v_pbgd':
    rates['value'] = optax.sgd(_VALUE)
  solver = getattr(bj, name)(case.problem, penalty=_RAMP, fused=fused, **rates)

  def step(carry, batch):
    params, state = carry
    updates, state = solver.update(batch, state, params)
    return optax.apply_updates(params, updates), state

  return step, (case.params, solver.init(case.params))


def by_hand(case: Case, name: str, *, fused: bool):
  """The same step as `library`'s in plain jax, with the losses it measures."""
  make = {'v_pbgd': _v_pbgd_by_hand, 'g_pbgd': _g_pbgd_by_hand}[name]
  return make(*case.problem, *case.params, fused)


def _descend(params, gradients, *rates):
  return tuple(
    jax.tree.map(lambda z, d, rate=rate: z - rate * d, z, d)
    for z, d, rate in zip(params, gradients, rates, strict=True)
  )


def _penalised_by_hand(upper, penalty, x, y, batch, count, fused):
  """Gradients of c (upper + gamma penalty), and the losses."""
  gamma = _RAMP(count)
  scale = 1 / jnp.maximum(gamma, 1)
  if fused:

    def loss(x, y):
      above = upper(x, y, batch)
      height, below = penalty(x, y)
      return scale * above + scale * gamma * height, (above, below, height)

    return jax.grad(loss, (0, 1), has_aux=True)(x, y)
  above, first = jax.value_and_grad(upper, (0, 1))(x, y, batch)
  (height, below), second = jax.value_and_grad(penalty, (0, 1), has_aux=True)(
    x, y
  )
  weigh = lambda a, b: scale * a + scale * gamma * b
  return jax.tree.map(weigh, first, second), (above, below, height)


def _v_pbgd_by_hand(upper, lower, x, y, fused):
  def step(carry, batch):
    x, y, w, count, _ = carry
    least, slope = jax.value_and_grad(lower, 1)(x, w, batch)
    (w,) = _descend((w,), (slope,), _VALUE)

    def gap(x, y):
      below = lower(x, y, batch)
      return below - lower(x, w, batch), below

    gradients, losses = _penalised_by_hand(
      upper, gap, x, y, batch, count, fused
    )
    x, y = _descend((x, y), gradients, _UPPER, _LOWER)
    return x, y, w, count + 1, (least, *losses)

  return step, (x, y, y, jnp.int32(0), (jnp.float32(0),) * 4)


def _g_pbgd_by_hand(upper, lower, x, y, fused):
  def step(carry, batch):
    x, y, count, _ = carry

    def half_squared_slope(x, y):
      below, slope = jax.value_and_grad(lower, 1)(x, y, batch)
      squares = [jnp.sum(s * s) for s in jax.tree.leaves(slope)]
      return sum(squares) / 2, below

    gradients, losses = _penalised_by_hand(
      upper, half_squared_slope, x, y, batch, count, fused
    )
    x, y = _descend((x, y), gradients, _UPPER, _LOWER)
    return x, y, count + 1, losses

  return step, (x, y, jnp.int32(0), (jnp.float32(0),) * 3)


def single_level(case: Case):
  """One gradient step on upper + lower in both variables."""
  upper, lower = case.problem

  def step(carry, batch):
    (x, y), _ = carry
    loss = lambda x, y: upper(x, y, batch) + lower(x, y, batch)
    value, gradients = jax.value_and_grad(loss, (0, 1))(x, y)
    return _descend((x, y), gradients, _UPPER, _LOWER), value

  return step, (tuple(case.params), jnp.float32(0))


def slope_penalty(case: Case, *, forward: bool):
  """A step on half the squared slope alone, in either mode.

  Args:
    case: the problem and its start.
    forward: forward over reverse, the slope's linearisation applied to the
      slope; else reverse over reverse, the gradient of the squared norm.

  Returns:
    A step of (carry, batch) and its first carry.
  """
  lower = case.problem.lower

  def step(carry, batch):
    x, y = carry
    if forward:
      slopes = lambda y: jax.grad(lower, (0, 1))(x, y, batch)
      (_, slope), product = jax.linearize(slopes, y)
      gradients = product(slope)
    else:
      half = lambda x, y: (
        optax.tree.norm(jax.grad(lower, 1)(x, y, batch), squared=True) / 2
      )
      gradients = jax.grad(half, (0, 1))(x, y)
    return _descend((x, y), gradients, _UPPER, _LOWER)

  return step, tuple(case.params)


def seeds_together(
  case: Callable[[int], Case], seeds: int, at_once: int | None = None
):
  """One step of all seeds, and the data that it takes.

  Args:
    case: the case of a seed.
    seeds: how many.
    at_once: how many by `vmap`, one such batch after the other; all if None.

  Returns:
    A step of (carry, batch), its first carry and its batch.
  """
  cases = [case(seed) for seed in range(seeds)]
  step, _ = library(cases[0], 'v_pbgd', fused=True)
  carries = [library(one, 'v_pbgd', fused=True)[1] for one in cases]
  stack = lambda *leaves: jnp.stack(leaves)
  carry = jax.tree.map(stack, *carries)
  labels = [(one.data.train_labels, one.data.val_labels) for one in cases]
  train_labels, val_labels = jax.tree.map(stack, *labels)
  batch = cases[0].data._replace(
    train_labels=train_labels, val_labels=val_labels
  )

  def one_seed(images, carry, train_labels, val_labels):
    train, val = images
    return step(carry, Data(train, train_labels, val, val_labels))

  def all_seeds(carry, batch):
    images = (batch.train_images, batch.val_images)
    mapped = (carry, batch.train_labels, batch.val_labels)
    if at_once is None:
      return jax.vmap(one_seed, in_axes=(None, 0, 0, 0))(images, *mapped)
    return jax.lax.map(
      lambda mine: one_seed(images, *mine), mapped, batch_size=at_once
    )

  return all_seeds, carry, batch


def compare_forms(model: str, sizes: Sizes, rounds: int) -> list[Line]:
  """Library, hand and single-level steps of one model, pair by pair."""
  case = hyper_cleaning(model, sizes)
  programs = {}
  for name in ('v_pbgd', 'g_pbgd'):
    for form in ('rows', 'fused'):
      for who, make in (('library', library), ('hand', by_hand)):
        step, carry = make(case, name, fused=form == 'fused')
        key = (name, form, who)
        programs[key] = measure.Program(step, carry, case.data)
  single = measure.Program(*single_level(case), case.data)
  reverse, forward = (
    measure.Program(*slope_penalty(case, forward=mode), case.data)
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
  model: str, sizes: Sizes, rounds: int, seeds: int
) -> list[Line]:
  """Seeds at once against seeds one after the other."""
  case = functools.partial(hyper_cleaning, model, sizes)
  first = case(0)
  one = measure.Program(*library(first, 'v_pbgd', fused=True), first.data)
  # Which seed it is does not change the cost: the same program, over and over.
  one_by_one = lambda steps: one.run(seeds * steps)
  lines = []
  for at_once in (None, 2):
    step, carry, batch = seeds_together(case, seeds, at_once)
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


def judge(value: float, low: float, high: float, bound: float) -> str:
  """Whether a bound holds for a measured median and its range."""
  if value <= bound:
    return 'holds'
  return 'undecided' if low <= bound <= high else 'EXCEEDED'


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
      verdicts.append(f'{what} <= {bound}: {judge(*numbers, bound)}')
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
  check(settings)
  lines = []
  for model in settings.models:
    sizes = Sizes(rows=settings.rows)
    lines += compare_forms(model, sizes, settings.rounds)
    lines += compare_seeds(model, sizes, settings.rounds, settings.seeds)
  harness.write_table(options.workdir, [as_row(line) for line in lines])
  harness.write_results(
    options,
    metrics=as_metrics(lines),
    seconds=time.perf_counter() - start,
  )


if __name__ == '__main__':
  harness.run(main, PRESETS, paper='benchmarks', binary='penalty')
