"""The spectrum of a Hessian for one vector, by few products."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _trees


class Spectrum(NamedTuple):
  r"""Quadrature nodes and weights of a vector v for a symmetric matrix H.

  .. math::
    v^\top \phi(H) \, v \approx \sum_i weights_i \, \phi(values_i)

  Attributes:
    values: approximate eigenvalues in ascending order, padded with zeros of
      weight 0.
    weights: squared lengths of the vector's components for them.
  """

  values: chex.Array
  weights: chex.Array

  def inverse_power(self, power: int, largest: chex.Array) -> chex.Array:
    r"""The form :math:`v^\top |H|^{-p} v` over the range of H.

    Args:
      power: p.
      largest: the largest eigenvalue in absolute value. Eigenvalues that are
        zero relative to it, up to rounding, are left out as in a
        pseudo-inverse.
    """
    sizes = jnp.abs(self.values)
    # Rounding of the products, and of the eigenvalues of a tridiagonal matrix,
    # which grows with its size.
    room = (100 + 4 * sizes.shape[-1]) * jnp.finfo(sizes.dtype).eps
    nonzero = sizes > room * largest
    terms = self.weights / jnp.where(nonzero, sizes, 1) ** power
    return jnp.sum(jnp.where(nonzero, terms, 0))


def norm(tree: Any) -> chex.Array:
  """The Euclidean norm, summed in at least float32."""
  return jnp.sqrt(_trees.dot(tree, tree))


def normalised(tree: Any) -> tuple[Any, chex.Array]:
  """The unit vector, or zero for a zero vector, and the length."""
  size = norm(tree)
  return _trees.scaled(_trees.ratio(1, size), tree), size


def spectrum(product: Callable[[Any], Any], v: Any, steps: int) -> Spectrum:
  """The spectrum of a matrix for a vector, by the Lanczos process.

  Vectors are not orthogonalised again, so that three vectors are all the
  memory. Copies of eigenvalues due to rounding share one weight.

  Args:
    product: multiplies a pytree by the symmetric matrix.
    v: the vector.
    steps: the number of products.
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
    # Within rounding, the Krylov space is complete and the rest is noise.
    length = jnp.where(length > 10 * eps * largest, length, 0)
    new = _trees.scaled(_trees.ratio(1, length), new)
    return (now, new, length, largest), (own, length)

  carry = (optax.tree.zeros_like(unit), unit, zero, zero)
  _, (own, joint) = jax.lax.scan(step, carry, length=steps)
  matrix = jnp.diag(own) + jnp.diag(joint[:-1], 1) + jnp.diag(joint[:-1], -1)
  values, vectors = jnp.linalg.eigh(matrix)
  return Spectrum(values, (size * vectors[0]) ** 2)
