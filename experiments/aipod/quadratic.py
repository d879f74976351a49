"""A synthetic problem with equations at both levels, solved in closed form.

The lower minimiser is a linear function of the upper variable, so the exact
hypergradient is known at every iterate.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

import bilevel_jax as bj


class Instance(NamedTuple):
  """One draw of the problem; leaves may have a leading axis of seeds.

  Attributes:
    upper_factors: of B, whose kernel is the upper set.
    lower_factors: of A.
    h: the lower set is A y + h x = 0, (rows, n).
    c: coefficients of x in the sine, (n,).
    d: coefficients of y, (n,).
  """

  upper_factors: bj.projections.AffineFactors
  lower_factors: bj.projections.AffineFactors
  h: Any
  c: Any
  d: Any


def draw_instance(
  seed: int, matrices: str, objective: str, size: int
) -> Instance:
  """Draws matrices, on the host in float64.

  Args:
    seed: of the draw.
    matrices: 'uniform', entries in (0, 1) as published; or 'orthonormal' rows,
      for which the norm of A^+ h is 1 instead of about 17.
    objective: 'published', or 'released', where the sine has lost its
      coefficients of x.
    size: n; the matrices have 9 n / 10 rows, B the rank 8 n / 10.

  Returns:
    An `Instance` of numpy arrays.
  """
  rng = np.random.default_rng(seed)
  rows, rank = 9 * size // 10, 8 * size // 10
  a, h, b = (rng.uniform(size=(rows, size)) for _ in range(3))
  if matrices == 'orthonormal':
    a, h, b = (
      np.linalg.qr(rng.normal(size=(size, rows)))[0].T for _ in range(3)
    )
  # Rows that repeat sums of others: B is rank deficient.
  b[rank:] = rng.uniform(size=(rows - rank, rank)) @ b[:rank] / rank
  c, d = rng.uniform(size=(2, size))
  if objective == 'released':
    c = np.zeros(size)
  return Instance(
    bj.projections.affine_factors(b, rank_tolerance=1e-10),
    bj.projections.affine_factors(a),
    h,
    c,
    d,
  )


def stack_instances(instances: list[Instance]) -> Instance:
  """Instances with a leading axis, in single precision."""
  return jax.tree.map(
    lambda *leaves: jnp.asarray(np.stack(leaves), jnp.float32), *instances
  )


def sets_of(instance: Instance) -> dict[str, bj.projections.AffineSet]:
  """The sets of an instance's sequences, by name."""
  return {
    'upper': bj.projections.affine_set(instance.upper_factors),
    'lower': bj.projections.affine_set(
      instance.lower_factors, coupling=lambda x: instance.h @ x
    ),
  }


class Noise(NamedTuple):
  """A batch: the coefficients, and noise on each gradient of one update.

  Attributes:
    c: as in `Instance`.
    d: likewise.
    upper: noise of grad_x f and grad_y f in the hypergradient, (2, n).
    steps: of grad_x f and grad_y f in each upper step, (T, 2, n).
    lower: of grad_y g in each lower step, (S, n).
  """

  c: Any
  d: Any
  upper: Any
  steps: Any
  lower: Any


def draw_noise(
  key: chex.PRNGKey,
  instance: Instance,
  scale: float,
  *,
  lower_steps: int,
  upper_steps: int,
) -> Noise:
  """Normal noise of standard deviation `scale` in each coordinate."""
  one, two, three = jax.random.split(key, 3)
  size = instance.c.shape[0]
  normal = lambda key, *shape: scale * jax.random.normal(key, (*shape, size))
  return Noise(
    instance.c,
    instance.d,
    upper=normal(one, 2),
    steps=normal(two, upper_steps, 2),
    lower=normal(three, lower_steps),
  )


def upper_batch(noise: Noise, t: Any) -> Noise:
  """The batch of upper step t."""
  return noise._replace(upper=noise.steps[t])


def lower_batch(noise: Noise, t: Any) -> Noise:
  """The batch of lower step t."""
  return noise._replace(lower=noise.lower[t])


def smooth_loss(x, y, c, d):
  """sin(c x + d y) + log(|x + y|^2 + 1), the upper loss without noise."""
  total = x + y
  return jnp.sin(jnp.vdot(c, x) + jnp.vdot(d, y)) + jnp.log1p(total @ total)


def upper_loss(x, y, noise: Noise):
  """The upper loss, tilted so that its gradients have the noise."""
  tilt = jnp.vdot(noise.upper[0], x) + jnp.vdot(noise.upper[1], y)
  return smooth_loss(x, y, noise.c, noise.d) + tilt


def lower_loss(x, y, noise: Noise):
  """|x - y|^2 / 2, tilted likewise."""
  gap = y - x
  return gap @ gap / 2 + jnp.sum(noise.lower @ y)


PROBLEM = bj.BilevelProblem(upper=upper_loss, lower=lower_loss)


def minimiser(instance: Instance, x: Any) -> Any:
  """The lower minimiser: the point of the lower set nearest to x."""
  return sets_of(instance)['lower'](x, x)


def hypergradient(instance: Instance, x: Any, *, released: bool = False) -> Any:
  """The exact hypergradient at x, by the chain rule through `minimiser`.

  Args:
    instance: of the problem.
    x: the upper variable, (n,).
    released: leaves out that the lower set moves with x, as the released code
      does.
  """
  y, back = jax.vjp(lambda x: minimiser(instance, x), x)
  above_x, above_y = jax.grad(smooth_loss, (0, 1))(x, y, instance.c, instance.d)
  if released:
    # grad_xy g q of a Hessian that is the identity.
    return above_x + sets_of(instance)['lower'].tangent(above_y)
  return above_x + back(above_y)[0]


def stationarity(
  instance: Instance, x: chex.Array, y: chex.Array
) -> chex.Array:
  r"""How far an update from x to the lower variable y is from stationary.

  .. math::
    \| (I - B^+ B) \nabla F(x_k, y^*(x_k)) \|^2 + \| y_{k+1} - y^*(x_k) \|^2
  """
  slope = sets_of(instance)['upper'].tangent(hypergradient(instance, x))
  gap = y - minimiser(instance, x)
  return slope @ slope + gap @ gap
