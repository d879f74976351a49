"""Gradient surgery: conflicts are taken out pair by pair, or by coordinate."""

import chex
import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _trees
from bilevel_jax.aggregators import _quadratic, _rows, _weighted


def _orders(key: chex.PRNGKey, objectives: int) -> chex.Array:
  """A random order of all objectives for each, (objectives, objectives)."""
  draw = lambda k: jax.random.permutation(k, objectives)
  return jax.vmap(draw)(jax.random.split(key, objectives))


def project_conflicts(gramian: chex.Array, orders: chex.Array) -> chex.Array:
  """The weights of PCGrad, from a Gram matrix and an order for each row."""
  size = gramian.shape[0]
  rows = jnp.arange(size)
  diagonal = jnp.diagonal(gramian)

  def step(coefficients, others):
    inner = jnp.sum(gramian[others] * coefficients, axis=1)
    norm = diagonal[others]
    push = jnp.where(
      (inner < 0) & (others != rows) & (norm > 0),
      inner / jnp.where(norm > 0, norm, 1),
      0,
    )
    return coefficients.at[rows, others].add(-push), None

  start = jnp.eye(size, dtype=gramian.dtype)
  coefficients, _ = jax.lax.scan(step, start, orders.T)
  return jnp.sum(coefficients, axis=0)


def pcgrad(
  objectives: int, *, key: chex.PRNGKey
) -> optax.GradientTransformationExtraArgs:
  r"""PCGrad: each gradient gives up what opposes the others, one by one.

  .. math::
    g_i \leftarrow g_i - \frac{\min(g_i^\top \nabla f_j, 0)}{\|\nabla f_j\|^2}
      \nabla f_j \quad \text{for } j \ne i \text{ in random order}, \qquad
    d = \sum_i g_i

  Args:
    objectives: the number of rows.
    key: of the random orders.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` to one gradient; a sum,
    not a mean.

  Raises:
    TypeError: if the incoming gradients are no Jacobian.
    ValueError: if they have another number of rows.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp
    >>> link = bj.aggregators.pcgrad(2, key=jax.random.key(0))
    >>> params = jnp.zeros(2)
    >>> jacobian = bj.Jacobian(jnp.array([[1.0, 0.0], [-1.0, 1.0]]))
    >>> print(link.update(jacobian, link.init(params), params)[0])
    [0.5 1.5]

  References:
    Yu, Kumar, Gupta, Levine, Hausman and Finn, `Gradient Surgery for Multi-Task
    Learning <https://arxiv.org/abs/2001.06782>`_, 2020.
  """

  def choose(seen):
    key, now = jax.random.split(seen.state.inner)
    return project_conflicts(seen.gramian(), _orders(now, objectives)), key

  start = lambda dtype: jax.random.clone(key)
  return _weighted.by_weights('pcgrad', objectives, choose, start)


def vaccinate(
  gramian: chex.Array, targets: chex.Array, orders: chex.Array, rate: float
) -> tuple[chex.Array, chex.Array]:
  """The weights of GradVac and its new targets; orders as in PCGrad."""
  size = gramian.shape[0]
  rows = jnp.arange(size)
  norms = jnp.sqrt(jnp.diagonal(gramian))
  tiny = 1e-8

  def step(carry, others):
    coefficients, targets = carry
    products = coefficients @ gramian
    inner = products[rows, others]
    own = jnp.sqrt(jnp.maximum(jnp.sum(products * coefficients, axis=1), 0))
    other = norms[others]
    cosine = inner / (own * other + tiny)
    target = targets[rows, others]
    sine = lambda c: jnp.sqrt(jnp.maximum(1 - c**2, 0))
    push = own * (target * sine(cosine) - cosine * sine(target))
    push = push / (other * sine(target) + tiny)
    differs = others != rows
    push = jnp.where(differs & (cosine < target), push, 0)
    moved = jnp.where(differs, target + rate * (cosine - target), target)
    return (
      coefficients.at[rows, others].add(push),
      targets.at[rows, others].set(moved),
    ), None

  start = (jnp.eye(size, dtype=gramian.dtype), targets)
  (coefficients, targets), _ = jax.lax.scan(step, start, orders.T)
  return jnp.sum(coefficients, axis=0), targets


def grad_vac(
  objectives: int, *, key: chex.PRNGKey, rate: float = 0.5
) -> optax.GradientTransformationExtraArgs:
  r"""GradVac: each gradient is turned until its cosines reach their average.

  A running mean :math:`\hat\phi_{ij}` of the cosine between objectives is the
  target; where the cosine :math:`\phi_{ij}` is below it,

  .. math::
    g_i \leftarrow g_i + \frac{\|g_i\| \left( \hat\phi_{ij}
      \sqrt{1 - \phi_{ij}^2} - \phi_{ij} \sqrt{1 - \hat\phi_{ij}^2} \right)}
      {\|\nabla f_j\| \sqrt{1 - \hat\phi_{ij}^2}} \nabla f_j, \qquad
    d = \sum_i g_i

  Args:
    objectives: the number of rows.
    key: of the random orders.
    rate: of the running mean, in [0, 1].

  Returns:
    A transformation from a `Jacobian` or a `Gramian` to one gradient.

  Raises:
    TypeError: if the incoming gradients are no Jacobian.
    ValueError: if they have another number of rows, or `rate` is no share.

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
  if not isinstance(rate, jax.core.Tracer) and not 0 <= rate <= 1:
    raise ValueError(f'grad_vac: rate is a share in [0, 1], got {rate}.')

  def choose(seen):
    key, targets = seen.state.inner
    key, now = jax.random.split(key)
    orders = _orders(now, objectives)
    # Its guards against zero are absolute: the matrix is of the order of one.
    gramian = _quadratic.normalised(seen.gramian())
    weights, targets = vaccinate(gramian, targets, orders, rate)
    return weights, (key, targets)

  def start(dtype):
    return jax.random.clone(key), jnp.zeros((objectives, objectives), dtype)

  return _weighted.by_weights('grad_vac', objectives, choose, start)


def drop_signs(rows: chex.Array, uniform: chex.Array) -> chex.Array:
  """The sum of the rows' entries of one sign, drawn for each coordinate."""
  total = jnp.sum(jnp.abs(rows), axis=0)
  lean = jnp.sum(rows, axis=0) / jnp.where(total > 0, total, 1)
  positive = uniform < (1 + lean) / 2
  kept = jnp.where(positive, rows > 0, rows < 0)
  return jnp.sum(jnp.where(kept, rows, 0), axis=0)


def grad_drop(
  objectives: int, *, key: chex.PRNGKey
) -> optax.GradientTransformationExtraArgs:
  r"""GradDrop: in each coordinate, only entries of one random sign are kept.

  .. math::
    d_j = \sum_m J_{mj} \, 1[\operatorname{sign} J_{mj} = s_j], \qquad
    P(s_j = +1) = \tfrac{1}{2} \left( 1 +
      \frac{\sum_m J_{mj}}{\sum_m |J_{mj}|} \right)

  Args:
    objectives: the number of rows.
    key: of the signs.

  Returns:
    A transformation from a `Jacobian` to one gradient. No weights: those in
    its state stay equal.

  Raises:
    TypeError: if the incoming gradients are no Jacobian, or only a Gramian.
    ValueError: if they have another number of rows.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp
    >>> link = bj.aggregators.grad_drop(2, key=jax.random.key(0))
    >>> params = jnp.zeros(2)
    >>> jacobian = bj.Jacobian(jnp.array([[1.0, -2.0], [3.0, -1.0]]))
    >>> print(link.update(jacobian, link.init(params), params)[0])
    [ 4. -3.]

  References:
    Chen, Ngiam, Huang, Luong, Kretzschmar, Chai and Anguelov, `Just Pick a
    Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout
    <https://arxiv.org/abs/2010.06808>`_, 2020.
  """
  _weighted.require_objectives(objectives, 'grad_drop')

  def init_fn(params):
    dtype = _trees.dtype_of(params)
    return _weighted.WeightsState(
      count=jnp.zeros([], jnp.int32),
      weights=jnp.full([objectives], 1 / objectives, dtype),
      inner=jax.random.clone(key),
    )

  def update_fn(jacobian, state, params=None, **extra_args):
    del params, extra_args
    _rows.require_jacobian(jacobian, 'grad_drop')
    _rows.require_rows(jacobian, 'grad_drop', objectives)
    key, now = jax.random.split(state.inner)
    leaves, structure = jax.tree.flatten(jacobian.rows)
    drawn = [
      drop_signs(leaf, jax.random.uniform(k, leaf.shape[1:], leaf.dtype))
      for leaf, k in zip(leaves, jax.random.split(now, len(leaves)))
    ]
    gradients = jax.tree.unflatten(structure, drawn)
    state = state._replace(count=optax.safe_increment(state.count), inner=key)
    return _rows.with_rest(gradients, jacobian), state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
