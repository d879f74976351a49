"""Discounted linear systems of a Markov chain, without a factorisation."""

import functools
import math

import chex
import jax
import jax.numpy as jnp


def discounted_solve(
  matrix: chex.Array,
  right: chex.Array,
  discount: chex.Numeric,
  *,
  transposed: bool = False,
) -> chex.Array:
  r"""Solves :math:`(I - \gamma P) x = b` for a stochastic matrix P.

  By sweeps of the fixed point. The slow part of their error, which all states
  share, is taken off in closed form, so that they converge like
  :math:`(\gamma |\lambda_2|)^k`, and at worst like :math:`\gamma^k`. There are
  products alone in it, no factorisation: it may be mapped. Derivatives in all
  three arguments are solves themselves.

  Args:
    matrix: P, (states, states), rows of probabilities.
    right: b, (states,).
    discount: :math:`\gamma` in [0, 1).
    transposed: whether the system is of the transposed P.

  Returns:
    x, (states,), to rounding.
  """

  def product(x):
    moved = matrix.T @ x if transposed else matrix @ x
    return x - discount * moved

  values = functools.partial(_sweeps, matrix, discount, False)
  visits = functools.partial(_sweeps, matrix, discount, True)
  one, two = (visits, values) if transposed else (values, visits)
  return jax.lax.custom_linear_solve(
    product,
    right,
    solve=lambda _, b: one(b),
    transpose_solve=lambda _, b: two(b),
  )


def _sweeps(matrix, discount, transposed, right):
  """The fixed point of one of the two systems."""
  matrix, discount = jax.lax.stop_gradient((matrix, discount))
  dtype = right.dtype
  epsilon = float(jnp.finfo(dtype).eps)
  discount = jnp.asarray(discount, dtype)
  rest = 1 - discount
  # Plain sweeps would be done by then, however slowly the chain mixes.
  limit = jnp.ceil(
    math.log(epsilon) / jnp.log(jnp.clip(discount, 1e-3, 1 - epsilon))
  ) + 2  # fmt: skip
  matrix = matrix.T if transposed else matrix
  ones = jnp.ones_like(right)
  of_ones = ones - discount * (matrix @ ones)

  def settled(x):
    """A point and its residual, shifted until the latter's mean is zero."""
    residual = right + discount * (matrix @ x) - x
    shift = residual.mean() / rest
    return x + shift, residual - shift * of_ones

  def body(carry):
    x, residual, count = carry
    return *settled(x + residual), count + 1

  def unfinished(carry):
    x, residual, count = carry
    large = jnp.max(jnp.abs(residual)) > 4 * epsilon * jnp.max(jnp.abs(x))
    return large & (count < limit)

  carry = *settled(right), jnp.zeros([], dtype)
  return jax.lax.while_loop(unfinished, body, carry)[0]
