"""Discounted linear systems of a Markov chain, without factorisations."""

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

  Fixed-point sweeps, in which the slow error component that all states share is
  removed in closed form. They converge like :math:`(\gamma |\lambda_2|)^k`, and
  at worst like :math:`\gamma^k`. They use only matrix products, so `jax.vmap`
  is efficient. Derivatives in all three arguments are solves too.

  The transposed system, of visits, is solved to a small relative error in each
  state, even in rarely visited ones; states that b does not reach are exactly
  zero.

  Args:
    matrix: P, (states, states), rows of probabilities.
    right: b, (states,).
    discount: :math:`\gamma` in [0, 1).
    transposed: whether to use the transposed P.

  Returns:
    x, (states,), up to rounding: relative to the largest value, or, if
    transposed and b has one sign, relative in each state.
  """
  # A `jax.shard_map` that checks types needs one type in the whole solve.
  discount = jnp.asarray(discount, right.dtype)
  system = (matrix, right, discount)
  axes = frozenset().union(*map(_sequences.varying_axes, system))
  matrix, right, discount = (_sequences.vary(z, axes) for z in system)

  def product(x):
    moved = matrix.T @ x if transposed else matrix @ x
    return x - discount * moved

  values = functools.partial(_sweeps, matrix, discount, False)
  visits = functools.partial(_sweeps, matrix, discount, True)
  solve, transpose = (visits, values) if transposed else (values, visits)
  return jax.lax.custom_linear_solve(
    product,
    right,
    solve=lambda _, b: solve(b),
    transpose_solve=lambda _, b: transpose(b),
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

  The visits depend only on the chain and :math:`\rho`, so the compiler computes
  them once for all totals of a chain.

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
  d_matrix, d_right, d_discount, d_initial = (
    None if isinstance(t, jax.custom_derivatives.SymbolicZero) else t
    for t in tangents
  )
  values = discounted_solve(matrix, right, discount)
  total = initial @ values
  change = jnp.zeros_like(total)
  gains = jnp.zeros_like(right)
  if d_right is not None:
    gains = gains + d_right
  if d_matrix is not None:
    gains = gains + discount * (d_matrix @ values)
  if d_discount is not None:
    gains = gains + d_discount * (matrix @ values)
  if not all(t is None for t in (d_matrix, d_right, d_discount)):
    visits = discounted_solve(matrix, initial, discount, transposed=True)
    change = change + visits @ gains
  if d_initial is not None:
    change = change + d_initial @ values
  return total, change


discounted_total.defjvp(_total_jvp, symbolic_zeros=True)


def _sweeps(matrix, discount, transposed, right):
  """The fixed point of one of the two systems."""
  matrix, discount = jax.lax.stop_gradient((matrix, discount))
  dtype = right.dtype
  epsilon = float(jnp.finfo(dtype).eps)
  discount = jnp.asarray(discount, dtype)
  rest = 1 - discount
  # Plain sweeps converge within this limit, even for slowly mixing chains.
  limit = _sweeps_for(math.log(epsilon), discount)
  matrix = matrix.T if transposed else matrix
  ones = jnp.ones_like(right)
  ones_product = ones - discount * (matrix @ ones)

  def centred(x):
    """A point and its residual, shifted to a residual of mean zero."""
    residual = right + discount * (matrix @ x) - x
    shift = residual.mean() / rest
    return x + shift, residual - shift * ones_product

  def body(carry):
    x, residual, count = carry
    return *centred(x + residual), count + 1

  def unfinished(carry):
    x, residual, count = carry
    large = jnp.max(jnp.abs(residual)) > 4 * epsilon * jnp.max(jnp.abs(x))
    return large & (count < limit)

  carry = *centred(right), jnp.zeros([], dtype)
  x = jax.lax.while_loop(unfinished, body, carry)[0]
  return _refine_states(matrix, right, discount, x) if transposed else x


def _sweeps_for(log_share, discount):
  """The number of plain sweeps that reduce any error by a factor."""
  epsilon = float(jnp.finfo(discount.dtype).eps)
  rate = jnp.log(jnp.clip(discount, 1e-3, 1 - epsilon))
  return jnp.ceil(log_share / rate) + 2


def _refine_states(matrix, right, discount, x):
  r"""Reduces the relative error of the visits of each state.

  The error of x is the rounding of the *largest* visits. It may exceed the
  visits of a rare state, and a caller that divides by visits would divide noise
  by noise. No threshold can separate the two: the noise depends on the
  processor, and a safe bound, :math:`n \epsilon / (1 - \gamma)` times the sum
  of visits, exceeds the visits of most states of a large process in float32.
  Instead, states that b does not reach become zero by the support of the chain.
  The others are refined by plain sweeps, with stays in a state summed in closed
  form, until the residual of each state is the rounding of its own visits,
  :math:`|\delta_s| \le n \epsilon |x_s|`. The sweeps add products of
  nonnegative numbers and so keep relative accuracy: by
  :math:`|x - x^*| \le n \epsilon (I - \gamma P^\top)^{-1} |x|`, the relative
  error is at most :math:`n \epsilon` times the mean time of a state's visits.

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

  # The closure of b's support, by one product per step of the longest shortest
  # path; no product if b is nonzero in every state.
  first = right != 0
  reached, _ = jax.lax.while_loop(growing, grow, (first, jnp.any(first)))
  # Each of the n products and a few more operations round once.
  tolerance = (len(right) + 4) * float(info.eps)
  # From the rounding of the largest visits to that of the smallest float.
  log_share = math.log(float(info.tiny)) + math.log(tolerance)
  limit = _sweeps_for(log_share, discount)
  stay = discount * jnp.diagonal(matrix)
  moves = discount * (matrix - jnp.diag(jnp.diagonal(matrix)))

  def sweep(carry):
    x, _, count = carry
    # If b has one sign, `size` equals the absolute value of `swept`.
    both = jnp.stack([x, jnp.abs(x)], axis=1)
    signed = jnp.stack([right, jnp.abs(right)], axis=1)
    swept, size = jnp.moveaxis(
      (signed + moves @ both) / (1 - stay)[:, None], 1, 0
    )
    large = jnp.any(jnp.abs(swept - x) > tolerance * size)
    return swept, large, count + 1

  carry = jnp.where(reached, x, 0), jnp.any(reached), jnp.zeros([], x.dtype)
  return jax.lax.while_loop(lambda c: c[1] & (c[2] < limit), sweep, carry)[0]
