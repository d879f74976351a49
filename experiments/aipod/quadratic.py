"""Synthetic problem with equality constraints at both levels.

The lower minimiser is a linear function of the upper variable, so the exact
hypergradient has a closed form.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

import bilevel_jax as bj
from experiments import harness


class Instance(NamedTuple):
  """One draw of the problem; leaves may have a leading axis of seeds.

  Attributes:
    upper_factors: factors of B; the upper set is B x = 0.
    lower_factors: factors of A.
    h: (rows, n); the lower set is A y + h x = 0.
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
  """Draws a problem, on the host in float64.

  Args:
    seed: seed of the draw.
    matrices: 'uniform' entries in (0, 1), as published, or 'orthonormal' rows,
      for which the norm of A^+ h is 1 instead of about 17.
    objective: 'published', or 'released', whose sine does not depend on x.
    size: dimension n; the matrices have 9 n / 10 rows, and B has rank 8 n / 10.

  Returns:
    An `Instance` of NumPy arrays.
  """
  harness.require_memory(8 * 3 * size**2, 'matrices of this size')
  rng = np.random.default_rng(seed)
  rows, rank = 9 * size // 10, 8 * size // 10
  a, h, b = (rng.uniform(size=(rows, size)) for _ in range(3))
  if matrices == 'orthonormal':
    a, h, b = (
      np.linalg.qr(rng.normal(size=(size, rows)))[0].T for _ in range(3)
    )
  # The last rows are combinations of the others: B is rank deficient.
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
  """Stacks instances along a leading axis, in float32."""
  return jax.tree.map(
    lambda *leaves: jnp.asarray(np.stack(leaves), jnp.float32), *instances
  )


def make_sets(instance: Instance) -> dict[str, bj.projections.AffineSet]:
  """Makes the upper and the lower set of an instance."""
  return {
    'upper': bj.projections.affine_set(instance.upper_factors),
    'lower': bj.projections.affine_set(
      instance.lower_factors, coupling=lambda x: instance.h @ x
    ),
  }


class Noise(NamedTuple):
  """Batch: coefficients, and noise of each gradient of one update.

  Attributes:
    c: coefficients of x, as in `Instance`.
    d: coefficients of y, as in `Instance`.
    upper: noise of grad_x f and grad_y f in the hypergradient, (2, n).
    steps: noise of grad_x f and grad_y f per upper step, (T, 2, n).
    lower: noise of grad_y g per lower step, (S, n).
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
  """Draws normal noise of standard deviation `scale` per coordinate."""
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
  """Selects the noise of upper step t."""
  return noise._replace(upper=noise.steps[t])


def lower_batch(noise: Noise, t: Any) -> Noise:
  """Selects the noise of lower step t."""
  return noise._replace(lower=noise.lower[t])


def smooth_loss(x, y, c, d):
  """The noiseless upper loss, sin(c x + d y) + log(|x + y|^2 + 1)."""
  total = x + y
  return jnp.sin(jnp.vdot(c, x) + jnp.vdot(d, y)) + jnp.log1p(total @ total)


def upper_loss(x, y, noise: Noise):
  """The upper loss plus a linear term, whose gradient is the noise."""
  tilt = jnp.vdot(noise.upper[0], x) + jnp.vdot(noise.upper[1], y)
  return smooth_loss(x, y, noise.c, noise.d) + tilt


def lower_loss(x, y, noise: Noise):
  """|x - y|^2 / 2 plus a linear term, whose gradient is the noise."""
  gap = y - x
  return gap @ gap / 2 + jnp.sum(noise.lower @ y)


PROBLEM = bj.BilevelProblem(upper=upper_loss, lower=lower_loss)


def minimiser(instance: Instance, x: Any) -> Any:
  """The lower minimiser: the projection of x onto the lower set."""
  return make_sets(instance)['lower'](x, x)


def hypergradient(instance: Instance, x: Any, *, released: bool = False) -> Any:
  """The exact hypergradient at x, by the chain rule through `minimiser`.

  Args:
    instance: the problem.
    x: the upper variable, (n,).
    released: whether to omit the dependence of the lower set on x, as the
      released code does.
  """
  y, back = jax.vjp(lambda x: minimiser(instance, x), x)
  slope_x, slope_y = jax.grad(smooth_loss, (0, 1))(x, y, instance.c, instance.d)
  if released:
    # The lower Hessian is the identity.
    return slope_x + make_sets(instance)['lower'].tangent(slope_y)
  return slope_x + back(slope_y)[0]


def stationarity(
  instance: Instance, x: chex.Array, y: chex.Array
) -> chex.Array:
  r"""Stationarity of an update from x with the lower variable y after it.

  .. math::
    \| (I - B^+ B) \nabla F(x_k, y^*(x_k)) \|^2 + \| y_{k+1} - y^*(x_k) \|^2
  """
  slope = make_sets(instance)['upper'].tangent(hypergradient(instance, x))
  gap = y - minimiser(instance, x)
  return slope @ slope + gap @ gap
