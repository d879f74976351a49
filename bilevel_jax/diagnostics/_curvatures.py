"""Curvatures of both losses at the points of a walk."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _trees, linear_solvers
from bilevel_jax.diagnostics import _spectrum
from bilevel_jax.oracles import base


class Facts(NamedTuple):
  """Measurements at one point.

  Attributes:
    upper_curvature: the largest curvature of the upper loss in y.
    lower_curvature: the largest curvature of the lower loss in y.
    highest: the largest eigenvalue of the lower Hessian, with its sign.
    pull: q.
    lag: the lag in units of one over the curvature of the lower loss.
    grip: G, the curvature in x of the penalty at a fixed y, per weight.
  """

  upper_curvature: chex.Array
  lower_curvature: chex.Array
  highest: chex.Array
  pull: chex.Array
  lag: chex.Array
  grip: chex.Array


def largest(loss, at, key, steps):
  """The largest curvature of a loss."""
  _, product = jax.linearize(jax.grad(loss), at)
  noise = optax.tree.random_like(key, at, jax.random.normal)
  return jnp.max(jnp.abs(_spectrum.spectrum(product, noise, steps).values))


def measure(problem, batch, key, steps):
  """The function that measures at each point of the walk."""
  above, below = base.checked_losses(problem)
  solve = linear_solvers.conjugate_gradient(steps, tolerance=1e-3)

  def look(params, slope):
    x, y = params
    pull = jax.grad(above, 1)(x, y, batch)
    _, both = jax.linearize(lambda y: jax.grad(below, (0, 1))(x, y, batch), y)
    product = lambda v: both(v)[1]
    across = lambda v: jax.jvp(
      lambda x: jax.grad(below, 1)(x, y, batch), (x,), (v,)
    )[1]
    way = _spectrum.normalised(slope)[0]
    noise = optax.tree.random_like(key, y, jax.random.normal)
    rows = jax.tree.map(lambda *z: jnp.stack(z), noise, pull, across(way))
    spectra = jax.vmap(lambda v: _spectrum.spectrum(product, v, steps))(rows)
    top = jnp.max(jnp.abs(spectra.values))
    _, pulled, moved = (_spectrum.Spectrum(*row) for row in zip(*spectra))

    # The minimiser moves by -H^-1 grad_yx g times the step of x, and its lag is
    # H^-1 times that.
    far, near = (moved.inverse_power(n, top) for n in (4, 2))

    def hold(_, carry):
      back = both(solve(product, across(carry[0])))[0]
      return _spectrum.normalised(back)

    grip = jax.lax.fori_loop(0, 4, hold, (way, jnp.zeros_like(top)))[1]
    return Facts(
      upper_curvature=largest(lambda y: above(x, y, batch), y, key, steps),
      lower_curvature=top,
      highest=jnp.max(spectra.values),
      pull=pulled.inverse_power(1, top),
      lag=jnp.sqrt(_trees.ratio(far, near)),
      grip=grip,
    )

  return look
