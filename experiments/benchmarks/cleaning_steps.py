"""Steps of V-PBGD and G-PBGD on data hyper-cleaning, and baselines.

A function of a step returns a function from (carry, batch) to the next carry,
and the first carry.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.benchmarks import measure

# Step sizes and ramp of the published linear run; they do not affect the cost.
_UPPER, _LOWER, _VALUE = 0.1, 0.1, 0.01
_RAMP = optax.linear_schedule(0.0, 0.2, 30_000)


class Sizes(NamedTuple):
  """Sizes of the problem; by default the published ones."""

  rows: int = 5_000  # Rows of each of the two data sets.
  features: int = 784
  hidden: int = 300
  classes: int = 10


class Data(NamedTuple):
  """Both data sets; seeds share the images, not the labels."""

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
  """Makes the problem of weighting noisy rows by the loss on clean rows.

  Args:
    model: 'linear' or 'mlp'.
    sizes: sizes of the data and the model.
    seed: seed of labels and parameters; all seeds have the same images.

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
  """Makes a step of a solver of the library.

  Args:
    case: the problem and its start.
    name: 'v_pbgd' or 'g_pbgd'.
    fused: argument of the solver.

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
  """Makes the same step as `library` in plain jax, with its losses."""
  make = {'v_pbgd': _v_pbgd_by_hand, 'g_pbgd': _g_pbgd_by_hand}[name]
  return make(*case.problem[:2], *case.params, fused)


def _descend(params, gradients, *rates):
  return tuple(
    jax.tree.map(lambda z, d, rate=rate: z - rate * d, z, d)
    for z, d, rate in zip(params, gradients, rates, strict=True)
  )


def _penalised_by_hand(upper, penalty, x, y, batch, count, fused):
  """Computes gradients of c (upper + gamma penalty), and the losses."""
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
    value, slope = jax.value_and_grad(lower, 1)(x, w, batch)
    (w,) = _descend((w,), (slope,), _VALUE)

    def gap(x, y):
      below = lower(x, y, batch)
      return below - lower(x, w, batch), below

    gradients, losses = _penalised_by_hand(
      upper, gap, x, y, batch, count, fused
    )
    x, y = _descend((x, y), gradients, _UPPER, _LOWER)
    return x, y, w, count + 1, (value, *losses)

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
  """Makes a gradient step on upper + lower in both variables."""
  upper, lower = case.problem[:2]

  def step(carry, batch):
    (x, y), _ = carry
    loss = lambda x, y: upper(x, y, batch) + lower(x, y, batch)
    value, gradients = jax.value_and_grad(loss, (0, 1))(x, y)
    return _descend((x, y), gradients, _UPPER, _LOWER), value

  return step, (tuple(case.params), jnp.float32(0))


def slope_penalty(case: Case, *, forward: bool):
  """Makes a step on half the squared gradient norm of the lower loss.

  Args:
    case: the problem and its start.
    forward: whether to use forward over reverse mode, the gradient's
      linearisation applied to the gradient; otherwise reverse over reverse, the
      gradient of the squared norm.

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
  """Makes a step of all seeds, and its data.

  Args:
    case: from a seed to its case.
    seeds: number of seeds.
    at_once: number of seeds in a `vmap`; None for all.

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
      lambda seed: one_seed(images, *seed), mapped, batch_size=at_once
    )

  return all_seeds, carry, batch
