"""V-PBGD and G-PBGD on data hyper-cleaning, against the same by hand.

At its published size, with random data: cost does not depend on the values.

- Against PyTorch, of one seed, and of ten: by `vmap`, the images shared,
  against a loop over seeds.
- Against the same step in plain jax, as rows and fused: operations.
- Against one gradient step on upper + lower with the same batches: what is the
  price of a second level?
- Seeds at once against seeds one after the other. Where one seed fills the
  caches, fewer at once do better: `lax.map` in twos.
- As a part of the speed of one large product of matrices.

What every function of steps makes is a step of (carry, batch) to the next
carry, and the first carry.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.benchmarks import measure

BOUND_FLOPS, BOUND_SINGLE_LEVEL = 1.02, 2.2
SEEDS = 10
# Step sizes and ramp of the published linear run; they do not affect cost.
_UPPER, _LOWER, _VALUE = 0.1, 0.1, 0.01
_RAMP = optax.linear_schedule(0.0, 0.2, 30_000)


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


def _linear(y, images):
  return harness.thin_product(images, y['w']) + y['b']


def _network(y, images):
  hidden = jax.nn.sigmoid(images @ y['w1'] + y['b1'])
  return harness.thin_product(hidden, y['w2']) + y['b2']


MODELS = {'linear': _linear, 'mlp': _network}


def hyper_cleaning(model: str, sizes: Sizes, seed: int = 0) -> Case:
  """Weighs noisy training rows such that the model does well on clean ones.

  Args:
    model: 'linear' or 'mlp'.
    sizes: of the data and the model.
    seed: of labels and parameters; images are the same for all seeds.

  Returns:
    A problem, its start and random data.
  """
  apply = MODELS[model]
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

  carry = case.params, solver.init(case.params)
  return measure.solver_step(solver), carry


def by_hand(case: Case, name: str, *, fused: bool):
  """The same step as `library`'s in plain jax, with the losses it measures."""
  make = {'v_pbgd': _v_pbgd_by_hand, 'g_pbgd': _g_pbgd_by_hand}[name]
  return make(*case.problem[:2], *case.params, fused)


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
  upper, lower = case.problem[:2]

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


def _torch(model, sizes, seeds, context):
  """The library's step, of one seed or several by `vmap`, against PyTorch's."""
  context.peers.require('torch')
  case = functools.partial(hyper_cleaning, model, sizes)
  if seeds == 1:
    first = case(0)
    measured = measure.Program(
      *library(first, 'v_pbgd', fused=True), first.data
    )
  else:
    measured = measure.Program(*seeds_together(case, seeds))
  arguments = sizes._asdict() | {'model': model, 'seeds': seeds}
  with context.peers.process('torch_steps', 'v_pbgd', **arguments) as loop:
    return measure.compare(measured, loop.run, context)


def _by_hand(model, sizes, name, form, context):
  case = hyper_cleaning(model, sizes)
  measured, peer = (
    measure.Program(*make(case, name, fused=form == 'fused'), case.data)
    for make in (library, by_hand)
  )
  return measure.compare(measured, peer, context)


def _single_level(model, sizes, name, context):
  case = hyper_cleaning(model, sizes)
  measured = measure.Program(*library(case, name, fused=True), case.data)
  base = measure.Program(*single_level(case), case.data)
  return measure.compare(measured, base, context)


def _seeds(model, sizes, at_once, context):
  """Seeds at once against seeds one after the other."""
  case = functools.partial(hyper_cleaning, model, sizes)
  first = case(0)
  one = measure.Program(*library(first, 'v_pbgd', fused=True), first.data)
  together = measure.Program(*seeds_together(case, SEEDS, at_once))
  # Which seed it is does not change the cost: the same program, over and over.
  return measure.compare(
    together.run, lambda steps: one.run(SEEDS * steps), context
  ) | {'memory': together.memory / one.memory}


def _forms(model, sizes, context):
  case = hyper_cleaning(model, sizes)
  forward, reverse = (
    measure.Program(*slope_penalty(case, forward=mode), case.data)
    for mode in (True, False)
  )
  return measure.compare(forward, reverse, context)


def _product(model, sizes, size, context):
  """Time beyond that of a plain product with as many operations."""
  case = hyper_cleaning(model, sizes)
  measured = measure.Program(*library(case, 'v_pbgd', fused=True), case.data)
  return measure.beside_product(measured, measured.flops, size, context)


def _growth(sizes, counts, context):
  case = functools.partial(hyper_cleaning, 'linear', sizes)
  make = lambda seeds: measure.Program(*seeds_together(case, seeds))
  return measure.growth(make, counts, context.rounds)


def rows(preset: str) -> Sequence[measure.Row]:
  """The comparisons."""
  small = preset == 'smoke'
  sizes = Sizes(rows=200, features=50, hidden=16) if small else Sizes()
  product = 128 if small else 2048
  partial = functools.partial
  comparisons = []

  def add(name, compared, make, *arguments, **bounds):
    comparisons.append(
      measure.Row(name, compared, partial(make, *arguments), bounds)
    )

  for model, seeds_bound in (('linear', 0.35), ('mlp', 1.0)):
    of = f'{model}, {sizes.rows:,} rows'
    for seeds, bound in ((1, 0.9), (SEEDS, seeds_bound)):
      add(
        f'vpbgd/torch/{model}' + (f'/seeds{seeds}' if seeds > 1 else ''),
        f'V-PBGD, {of}, {seeds} seed{"s" * (seeds > 1)} / PyTorch',
        *(_torch, model, sizes, seeds),
        wall=bound,
      )
    for name in ('v_pbgd', 'g_pbgd'):
      for form in ('rows', 'fused'):
        add(
          f'vpbgd/by_hand/{model}/{name}/{form}',
          f'{name} {form}, {of} / by hand',
          *(_by_hand, model, sizes, name, form),
          flops=BOUND_FLOPS,
        )
    add(
      f'vpbgd/single_level/{model}',
      f'V-PBGD, {of} / a step on f + g',
      *(_single_level, model, sizes, 'v_pbgd'),
      wall=BOUND_SINGLE_LEVEL,
      flops=BOUND_SINGLE_LEVEL,
    )
    add(
      f'vpbgd/single_level/{model}/g_pbgd',
      f'G-PBGD, {of} / a step on f + g',
      *(_single_level, model, sizes, 'g_pbgd'),
    )
    for at_once, how in ((None, 'by vmap'), (2, '2 at a time')):
      add(
        f'vpbgd/seeds/{model}/{"vmap" if at_once is None else "map"}',
        f'{SEEDS} seeds {how}, {of} / one by one',
        *(_seeds, model, sizes, at_once),
        wall=1.0,
      )
    add(
      f'vpbgd/slope/{model}',
      f'slope penalty forward, {of} / reverse over reverse',
      *(_forms, model, sizes),
    )
    add(
      f'vpbgd/product/{model}',
      f'V-PBGD, {of} / a product with as many operations',
      *(_product, model, sizes, product),
    )
  counts = (1, 2, 4) if small else (1, 2, 5, 10, 20)
  add(
    'growth/seeds',
    f'V-PBGD, linear, seeds {counts[0]} to {counts[-1]}',
    *(_growth, sizes, counts),
    time_exponent=1.0,
  )
  return comparisons
