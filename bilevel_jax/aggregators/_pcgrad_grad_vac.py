"""PCGrad and GradVac: conflicts removed pair by pair, in random order."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _checks, _keys, _trees
from bilevel_jax.aggregators import _by_weights, _rows

MAX_COSINE = 0.99  # Largest target cosine of GradVac.


def _orders(key: chex.PRNGKey, objectives: int) -> tuple[Any, Any]:
  """The next key, and a random order of the objectives for each objective."""
  key, now = jax.random.split(key)
  drawn = jax.random.bits(now, (objectives, objectives))
  return key, jnp.argsort(drawn, axis=1)


def _total(gram: Any, parts: chex.Array) -> chex.Array:
  """Weights of the sum of the changed gradients.

  Args:
    gram: lengths and cosines of the rows.
    parts: each changed gradient, divided by its original length, as weights of
      unit rows, (objectives, objectives).
  """
  longest = jnp.max(gram.lengths)
  unit_weights = _trees.ratio(gram.lengths, longest) @ parts
  return _rows.row_weights(gram, unit_weights, longest)


def project_conflicts(cosines: chex.Array, orders: chex.Array) -> chex.Array:
  """The gradients after PCGrad, as `parts` of `_total`; one order per row."""
  rows = jnp.arange(cosines.shape[0])

  def step(parts, others):
    inner = jnp.sum(cosines[others] * parts, axis=1)
    push = jnp.where(others != rows, jnp.minimum(inner, 0), 0)
    return parts.at[rows, others].add(-push), None

  start = jnp.eye(len(rows), dtype=cosines.dtype)
  return jax.lax.scan(step, start, orders.T)[0]


def pcgrad(
  objectives: int, *, key: chex.PRNGKey | int
) -> optax.GradientTransformationExtraArgs:
  r"""PCGrad: removes from each gradient its conflicts with the others.

  .. math::
    g_i \leftarrow g_i - \frac{\min(g_i^\top \nabla f_j, 0)}{\|\nabla f_j\|^2}
      \nabla f_j \quad \text{for } j \ne i \text{ in random order}, \qquad
    d = \sum_i g_i

  Args:
    objectives: the number of rows.
    key: PRNG key of the random orders, or a whole number.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` to one gradient; a sum,
    not a mean.

  Raises:
    TypeError: if the incoming gradients are not a `Jacobian` or a `Gramian`, or
      the key is missing.
    ValueError: if they have another number of rows.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp
    >>> link = bj.aggregators.pcgrad(2, key=jax.random.key(0))
    >>> params = jnp.zeros(2)
    >>> jacobian = bj.Jacobian(jnp.array([[1.0, 0.0], [-1.0, 1.0]]))
    >>> direction, _ = link.update(jacobian, link.init(params), params)
    >>> print((2 * direction).round())
    [1. 3.]

  References:
    Yu, Kumar, Gupta, Levine, Hausman and Finn, `Gradient Surgery for Multi-Task
    Learning <https://arxiv.org/abs/2001.06782>`_, 2020.
  """

  def choose(gramian, state):
    key, orders = _orders(state.inner, objectives)
    return _total(gramian, project_conflicts(gramian.cosines, orders)), key

  start = lambda params, dtype: _keys.as_key(key, 'pcgrad')
  return _by_weights.by_gramian('pcgrad', objectives, choose, start)


def vaccinate(
  cosines: chex.Array, targets: chex.Array, orders: chex.Array, rate: Any
) -> tuple[chex.Array, chex.Array]:
  """The gradients after GradVac, as `parts` of `_total`, and new targets."""
  rows = jnp.arange(cosines.shape[0])
  sine = lambda c: jnp.sqrt(jnp.maximum(1 - c**2, 0))

  def step(carry, others):
    parts, targets = carry
    products = parts @ cosines
    own = jnp.sqrt(jnp.maximum(jnp.sum(products * parts, axis=1), 0))
    cosine = _trees.ratio(products[rows, others], own)
    target = targets[rows, others]
    goal = jnp.minimum(target, MAX_COSINE)
    push = own * (goal * sine(cosine) / sine(goal) - cosine)
    differs = others != rows
    push = jnp.where(differs & (cosine < goal), push, 0)
    moved = jnp.where(differs, target + rate * (cosine - target), target)
    parts = parts.at[rows, others].add(push)
    return (parts, targets.at[rows, others].set(moved)), None

  start = (jnp.eye(len(rows), dtype=cosines.dtype), targets)
  return jax.lax.scan(step, start, orders.T)[0]


def grad_vac(
  objectives: int, *, key: chex.PRNGKey | int, rate: float = 0.5
) -> optax.GradientTransformationExtraArgs:
  r"""GradVac: turns each gradient until its cosines reach their running means.

  The running mean :math:`\hat\phi_{ij}` of the cosine between objectives is the
  target. If the cosine :math:`\phi_{ij}` is below it,

  .. math::
    g_i \leftarrow g_i + \frac{\|g_i\| \left( \hat\phi_{ij}
      \sqrt{1 - \phi_{ij}^2} - \phi_{ij} \sqrt{1 - \hat\phi_{ij}^2} \right)}
      {\|\nabla f_j\| \sqrt{1 - \hat\phi_{ij}^2}} \nabla f_j, \qquad
    d = \sum_i g_i

  The target in this formula is at most 0.99, so that a turn makes a gradient at
  most 7.1 times as long. For a target of one, which equal gradients reach, the
  factor would be infinite.

  Args:
    objectives: the number of rows.
    key: PRNG key of the random orders, or a whole number.
    rate: rate of the running mean, in [0, 1].

  Returns:
    A transformation from a `Jacobian` or a `Gramian` to one gradient.

  Raises:
    TypeError: if the incoming gradients are not a `Jacobian` or a `Gramian`, or
      the key is missing.
    ValueError: if they have another number of rows, or `rate` is outside
      [0, 1].

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp
    >>> link = bj.aggregators.grad_vac(2, key=jax.random.key(0))
    >>> params = jnp.zeros(2)
    >>> jacobian = bj.Jacobian(jnp.array([[1.0, 0.0], [-1.0, 1.0]]))
    >>> print(link.update(jacobian, link.init(params), params)[0].round(2))
    [0.5 1.5]

  References:
    Wang, Tsvetkov, Firat and Cao, `Gradient Vaccine: Investigating and
    Improving Multi-task Optimization in Massively Multilingual Models
    <https://arxiv.org/abs/2010.05874>`_, 2021.
  """
  _checks.within('grad_vac', 'rate', rate, 0, 1)

  def choose(gramian, state):
    key, targets = state.inner
    key, orders = _orders(key, objectives)
    parts, targets = vaccinate(gramian.cosines, targets, orders, rate)
    return _total(gramian, parts), (key, targets)

  def start(params, dtype):
    del params
    zeros = jnp.zeros((objectives, objectives), dtype)
    return _keys.as_key(key, 'grad_vac'), zeros

  return _by_weights.by_gramian('grad_vac', objectives, choose, start)
