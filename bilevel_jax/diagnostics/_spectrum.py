"""The eigenvalues of a Hessian, as one vector sees them, by few products."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _trees


class Spectrum(NamedTuple):
  r"""Quadrature nodes and weights of a vector v in a symmetric matrix H.

  .. math::
    v^\top \phi(H) \, v \approx \sum_i weights_i \, \phi(values_i)

  Attributes:
    values: approximate eigenvalues, ascending; zeros of weight 0 fill up.
    weights: squared lengths of the vector's parts that belong to them.
  """

  values: chex.Array
  weights: chex.Array

  def inverse_power(self, power: int, largest: chex.Array) -> chex.Array:
    r"""The form :math:`v^\top |H|^{-p} v` over the range of H.

    Args:
      power: p.
      largest: the largest eigenvalue in absolute value. What is zero up to
        rounding beside it is left out, as in a pseudo-inverse.
    """
    sizes = jnp.abs(self.values)
    # The products' rounding, and that of the eigenvalues of a tridiagonal
    # matrix, which grows with its size.
    room = (100 + 4 * sizes.shape[-1]) * jnp.finfo(sizes.dtype).eps
    kept = sizes > room * largest
    terms = self.weights / jnp.where(kept, sizes, 1) ** power
    return jnp.sum(jnp.where(kept, terms, 0))


def norm(tree: Any) -> chex.Array:
  """The Euclidean norm, summed in at least float32."""
  return jnp.sqrt(_trees.dot(tree, tree))


def normalised(tree: Any) -> tuple[Any, chex.Array]:
  """The vector of length one, zero for a zero vector, and the length."""
  size = norm(tree)
  return _trees.scaled(_trees.ratio(1, size), tree), size


def spectrum(product: Callable[[Any], Any], v: Any, steps: int) -> Spectrum:
  """Sees a matrix from a vector, by the Lanczos process.

  Without a second orthogonalisation: its three vectors are all the memory, and
  the copies of eigenvalues that rounding makes share one weight.

  Args:
    product: multiplies a pytree by the symmetric matrix.
    v: the vector.
    steps: products.
  """
  unit, size = normalised(v)
  eps = jnp.finfo(size.dtype).eps
  zero = jnp.zeros_like(size)

  def step(carry, _):
    before, now, joint, largest = carry
    new = product(now)
    own = _trees.dot(now, new)
    new = _trees.add_scaled(new, -own, now)
    new = _trees.add_scaled(new, -joint, before)
    length = norm(new)
    largest = jnp.maximum(largest, jnp.abs(own) + length)
    # Within rounding of zero: the space is complete, the rest is noise.
    length = jnp.where(length > 10 * eps * largest, length, 0)
    new = _trees.scaled(_trees.ratio(1, length), new)
    return (now, new, length, largest), (own, length)

  carry = (optax.tree.zeros_like(unit), unit, zero, zero)
  _, (own, joint) = jax.lax.scan(step, carry, length=steps)
  matrix = jnp.diag(own) + jnp.diag(joint[:-1], 1) + jnp.diag(joint[:-1], -1)
  values, vectors = jnp.linalg.eigh(matrix)
  return Spectrum(values, (size * vectors[0]) ** 2)
