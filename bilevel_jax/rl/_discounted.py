"""Discounted linear systems of a Markov chain, without a factorisation."""

import functools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp

from bilevel_jax import _sequences


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

  The transposed system, of visits, is solved to a relative error in each state,
  however seldom it is visited: states that b does not reach are exactly zero.

  Args:
    matrix: P, (states, states), rows of probabilities.
    right: b, (states,).
    discount: :math:`\gamma` in [0, 1).
    transposed: whether the system is of the transposed P.

  Returns:
    x, (states,), to rounding: relative to the largest value, or, if transposed
    and b has one sign, relative in each state.
  """
  # In a `jax.shard_map` that checks types, a solve is of one type throughout.
  discount = jnp.asarray(discount, right.dtype)
  system = (matrix, right, discount)
  axes = frozenset().union(*map(_sequences.varying_axes, system))
  matrix, right, discount = (_sequences.vary(z, axes) for z in system)

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


@jax.custom_jvp
def discounted_total(
  matrix: chex.Array,
  right: chex.Array,
  discount: chex.Numeric,
  initial: chex.Array,
) -> chex.Array:
  r"""Computes :math:`\rho^\top (I - \gamma P)^{-1} b`.

  Its derivatives in all arguments share the values of b and the visits from
  :math:`\rho`, :math:`\mu`:

  .. math::
    dJ = d\rho^\top V + \mu^\top (db + d\gamma \, P V + \gamma \, dP \, V)

  The visits are a function of the chain and of :math:`\rho` alone, so the
  compiler computes them once for all totals of one chain.

  Args:
    matrix: P, (states, states).
    right: b, (states,).
    discount: :math:`\gamma` in [0, 1).
    initial: :math:`\rho`, (states,).

  Returns:
    A scalar.
  """
  return initial @ discounted_solve(matrix, right, discount)


def _total_jvp(primals: Any, tangents: Any) -> tuple[chex.Array, chex.Array]:
  matrix, right, discount, initial = primals
  moved, gained, faster, shifted = (
    None if isinstance(t, jax.custom_derivatives.SymbolicZero) else t
    for t in tangents
  )
  values = discounted_solve(matrix, right, discount)
  total = initial @ values
  change = jnp.zeros_like(total)
  earned = jnp.zeros_like(right)
  if gained is not None:
    earned = earned + gained
  if moved is not None:
    earned = earned + discount * (moved @ values)
  if faster is not None:
    earned = earned + faster * (matrix @ values)
  if not all(t is None for t in (moved, gained, faster)):
    visits = discounted_solve(matrix, initial, discount, transposed=True)
    change = change + visits @ earned
  if shifted is not None:
    change = change + shifted @ values
  return total, change


discounted_total.defjvp(_total_jvp, symbolic_zeros=True)


def _sweeps(matrix, discount, transposed, right):
  """The fixed point of one of the two systems."""
  matrix, discount = jax.lax.stop_gradient((matrix, discount))
  dtype = right.dtype
  epsilon = float(jnp.finfo(dtype).eps)
  discount = jnp.asarray(discount, dtype)
  rest = 1 - discount
  # Plain sweeps would be done by then, however slowly the chain mixes.
  limit = _sweeps_for(math.log(epsilon), discount)
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
  x = jax.lax.while_loop(unfinished, body, carry)[0]
  return _in_each_state(matrix, right, discount, x) if transposed else x


def _sweeps_for(log_share, discount):
  """The number of plain sweeps that reduce any error to a share of itself."""
  epsilon = float(jnp.finfo(discount.dtype).eps)
  rate = jnp.log(jnp.clip(discount, 1e-3, 1 - epsilon))
  return jnp.ceil(log_share / rate) + 2


def _in_each_state(matrix, right, discount, x):
  r"""Makes the relative error of the visits of each state small.

  The error of x is rounding of the *largest* visits, which may be more than all
  visits of a rare state, and a caller that divides by visits then divides noise
  by noise. The size of the noise depends on the processor. A bound that holds
  for all of them, :math:`n \epsilon / (1 - \gamma)` times the sum of visits,
  exceeds the visits of most states of a large process in float32. So no
  threshold decides here. States that b does not reach are set to zero by the
  chain's support. For the others, plain sweeps with the stays in a state summed
  in closed form continue until the residual of each state is rounding of its
  own visits, :math:`|\delta_s| \le n \epsilon |x_s|`. They add products of
  nonnegative numbers and so keep relative accuracy: the relative error is at
  most :math:`n \epsilon` times the mean time at which a state is visited, by
  :math:`|x - x^*| \le n \epsilon (I - \gamma P^\top)^{-1} |x|`.

  Args:
    matrix: the transposed chain, (states, states).
    right: b, (states,).
    discount: gamma.
    x: an approximate solution.
  """
  info = jnp.finfo(right.dtype)

  def growing(carry):
    reached, changed = carry
    return changed & ~jnp.all(reached)

  def grow(carry):
    reached, _ = carry
    after = reached | (matrix @ reached.astype(matrix.dtype) > 0)
    return after, jnp.any(after != reached)

  # The closure of b's support: as many products as the longest shortest path,
  # and none if b reaches every state.
  first = right != 0
  reached, _ = jax.lax.while_loop(growing, grow, (first, jnp.any(first)))
  # Each of the n products, and the few operations more, rounds once.
  share = (len(right) + 4) * float(info.eps)
  # From the rounding of the largest visits to that of the smallest float.
  limit = _sweeps_for(math.log(float(info.tiny)) + math.log(share), discount)
  stay = discount * jnp.diagonal(matrix)
  moves = discount * (matrix - jnp.diag(jnp.diagonal(matrix)))

  def sweep(carry):
    x, _, count = carry
    # For a b of one sign, the size of `swept` itself.
    both = jnp.stack([x, jnp.abs(x)], axis=1)
    signed = jnp.stack([right, jnp.abs(right)], axis=1)
    swept, size = jnp.moveaxis(
      (signed + moves @ both) / (1 - stay)[:, None], 1, 0
    )
    large = jnp.any(jnp.abs(swept - x) > share * size)
    return swept, large, count + 1

  carry = jnp.where(reached, x, 0), jnp.any(reached), jnp.zeros([], x.dtype)
  return jax.lax.while_loop(lambda c: c[1] & (c[2] < limit), sweep, carry)[0]
