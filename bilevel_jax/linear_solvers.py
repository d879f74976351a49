"""Linear solvers for implicit differentiation: products with a matrix go in.

A solver is any function `solve(operator, right, start) -> solution`, where
`operator` multiplies a pytree by a symmetric positive definite matrix and
`start` is a guess, or None for zero. So other libraries' solvers fit:

    def solve(operator, right, start):  # lineax
      matrix = lineax.FunctionLinearOperator(
        operator, jax.eval_shape(lambda: right),
        lineax.positive_semidefinite_tag)
      return lineax.linear_solve(matrix, right, lineax.CG(1e-6, 1e-6)).value

Those of this module are `LinearSolver`s: they also say how many products they
took, and may draw random numbers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from bilevel_jax import _sequences

Operator = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class SampledOperator:
  """A product whose matrix is an expectation, with samples of it.

  Attributes:
    product: vector to vector.
    at: (vector, t) to vector, with the t-th sample of the matrix.
  """

  product: Operator
  at: Callable[[Any, chex.Numeric], Any]

  def __call__(self, vector: Any) -> Any:
    """The product with the matrix itself."""
    return self.product(vector)


def _product_at(operator: Operator, vector: Any, t: chex.Numeric) -> Any:
  if isinstance(operator, SampledOperator):
    return operator.at(vector, t)
  return operator(vector)


@dataclasses.dataclass(frozen=True)
class LinearSolver:
  """A linear solver that counts its products.

  Attributes:
    solve: `solve(operator, right, start, key) -> (solution, products)`;
      products is a whole number, an int32 scalar if it depends on the data.
    random: whether it draws from its key; the others get None.
  """

  solve: Callable[..., tuple[Any, chex.Numeric]]
  random: bool = False

  def __call__(
    self, operator: Operator, right: Any, start: Any = None, key: Any = None
  ) -> Any:
    """The solution alone."""
    return self.solve(operator, right, start, key)[0]


def _check_whole(who: str, what: str, number: Any, least: int) -> None:
  if isinstance(number, bool) or not isinstance(number, int) or number < least:
    raise ValueError(
      f'{who} takes a whole number of {what} >= {least}, got {number}.'
    )


def _ratio(above: chex.Array, below: chex.Array) -> chex.Array:
  """A quotient, 0 where the divisor is not positive: there all is solved."""
  return jnp.where(below > 0, above / jnp.where(below > 0, below, 1), 0)


def _add_scaled(x: Any, scale: chex.Numeric, y: Any) -> Any:
  """X + scale y, in the types of x."""
  return jax.tree.map(
    lambda a, b: a + jnp.asarray(scale, a.dtype) * b.astype(a.dtype), x, y
  )


def _scaled(scale: chex.Numeric, x: Any) -> Any:
  return jax.tree.map(lambda a: jnp.asarray(scale, a.dtype) * a, x)


def conjugate_gradient(
  steps: int = 10, *, tolerance: float | None = None, unroll: int = 1
) -> LinearSolver:
  """Conjugate gradients: the most accurate for a given number of products.

  Args:
    steps: at most so many, one product each; and one for the start, if any.
    tolerance: relative residual at which to end. None takes all steps, in a
      program without a data-dependent loop.
    unroll: steps in one body of the compiled loop.

  Returns:
    A `LinearSolver`. Works on pytrees, with the memory of four of them.

  Raises:
    ValueError: if `steps` is below 1.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> matrix = jnp.array([[2.0, 1.0], [1.0, 3.0]])
    >>> solve = bj.linear_solvers.conjugate_gradient(2)
    >>> print(solve(lambda v: matrix @ v, jnp.array([3.0, 4.0])).round(4))
    [1. 1.]

  References:
    Hestenes and Stiefel, `Methods of conjugate gradients for solving linear
    systems <https://doi.org/10.6028/jres.049.044>`_, 1952.
  """
  _check_whole('conjugate_gradient', 'steps', steps, 1)

  def solve(operator, right, start, key):
    del key
    if start is None:
      zero = optax.tree.zeros_like(right)
      x, residual, first = _sequences.vary_like(zero, right), right, 0
    else:
      x, first = start, 1
      residual = optax.tree.sub(right, operator(start))
    square = lambda v: optax.tree.norm(v, squared=True)

    def step(carry):
      x, residual, direction, size = carry
      product = operator(direction)
      length = _ratio(size, optax.tree.vdot(direction, product))
      x = _add_scaled(x, length, direction)
      residual = _add_scaled(residual, -length, product)
      new = square(residual)
      direction = _add_scaled(residual, _ratio(new, size), direction)
      return x, residual, direction, new

    carry = (x, residual, residual, square(residual))
    if tolerance is None:
      carry, _ = jax.lax.scan(
        lambda carry, _: (step(carry), None),
        carry,
        length=steps,
        unroll=min(unroll, steps),
      )
      return carry[0], first + steps
    least = tolerance**2 * square(right)
    going = lambda loop: (loop[1] < steps) & (loop[0][3] > least)
    carry, taken = jax.lax.while_loop(
      going, lambda loop: (step(loop[0]), loop[1] + 1), (carry, jnp.int32(0))
    )
    return carry[0], first + taken

  return LinearSolver(solve)


def neumann(steps: int, step_size: float) -> LinearSolver:
  r"""A truncated Neumann series, that is, gradient descent.

  .. math::
    q \leftarrow q + \eta \, (b - H q) \quad \text{(steps times)}, \qquad
    q_0 = \eta b \text{ without a start}

  Without a start, the sum of the series' first terms, one more than steps.

  Args:
    steps: products with the matrix, at least 0.
    step_size: :math:`\eta`, below 2 / (largest eigenvalue of H).

  Returns:
    A `LinearSolver`; with a batch for each product, step t uses the t-th.

  Raises:
    ValueError: if `steps` is negative.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> print(bj.linear_solvers.neumann(2, 0.5)(lambda v: v, jnp.float32(1.0)))
    0.875
  """
  _check_whole('neumann', 'steps', steps, 0)

  def solve(operator, right, start, key):
    del key
    first = _scaled(step_size, right) if start is None else start

    def step(q, t):
      residual = optax.tree.sub(right, _product_at(operator, q, t))
      return _add_scaled(q, step_size, residual), None

    q, _ = jax.lax.scan(step, first, jnp.arange(steps, dtype=jnp.int32))
    return q, steps

  return LinearSolver(solve)


def random_neumann(bound: int, step_size: float) -> LinearSolver:
  r"""One term of a Neumann series, drawn at random and scaled: unbiased.

  .. math::
    q = \eta N \prod_{n=1}^{N'} (I - \eta H_n) \, b, \qquad
    N' \sim \text{uniform on } \{0, \dots, N - 1\}

  Its mean over :math:`N'`, and over samples :math:`H_n` that are independent
  with mean H, is the sum of the series' first N terms.

  Args:
    bound: N, at least 1; the start is not used.
    step_size: :math:`\eta`, below 2 / (largest eigenvalue of H).

  Returns:
    A random `LinearSolver`; it takes :math:`N'` products.

  Raises:
    ValueError: if `bound` is below 1.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp
    >>> solve, half = bj.linear_solvers.random_neumann(2, 0.5), lambda v: v
    >>> keys = jax.random.split(jax.random.key(0), 2_000)
    >>> drawn = jax.vmap(lambda k: solve(half, jnp.float32(1.0), None, k))(keys)
    >>> print(drawn.min(), drawn.max(), drawn.mean().round(1))
    0.5 1.0 0.8

  References:
    Ghadimi and Wang, `Approximation Methods for Bilevel Programming
    <https://arxiv.org/abs/1802.02246>`_, 2018.
  """
  _check_whole('random_neumann', 'terms', bound, 1)

  def solve(operator, right, start, key):
    del start
    if key is None:
      raise ValueError('random_neumann draws its length: give it a key.')
    length = jax.random.randint(key, (), 0, bound, jnp.int32)
    shrink = lambda t, q: _add_scaled(
      q, -step_size, _product_at(operator, q, t)
    )
    q = jax.lax.fori_loop(0, length, shrink, right)
    return _scaled(step_size * bound, q), length

  return LinearSolver(solve, random=True)


def nystrom(rank: int, damping: float, *, seed: int = 0) -> LinearSolver:
  r"""A low-rank sketch of the matrix, inverted in closed form.

  .. math::
    q = (H_r + \rho I)^{-1} b, \qquad
    H_r = (H \Omega) (\Omega^\top H \Omega)^+ (H \Omega)^\top

  with a matrix :math:`\Omega` of `rank` random columns. No loop, and no
  convergence to wait for: good where few eigenvalues of H are above the damping
  and step sizes for `neumann` are hard to find.

  Args:
    rank: columns of the sketch, one product each, all at once.
    damping: :math:`\rho > 0`, in units of the matrix.
    seed: of the random columns, the same in each call.

  Returns:
    A `LinearSolver`; the start is not used.

  Raises:
    ValueError: if `rank` is below 1 or the damping is not positive.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> solve = bj.linear_solvers.nystrom(2, 1.0)
    >>> print(solve(lambda v: 3 * v, jnp.array([4.0, 8.0])).round(3))
    [1. 2.]

  References:
    Hataya and Yamada, `Nystrom Method for Accurate and Scalable Implicit
    Differentiation <https://arxiv.org/abs/2302.09726>`_, 2023.
  """
  _check_whole('nystrom', 'columns', rank, 1)
  if not isinstance(damping, jax.Array) and not damping > 0:
    raise ValueError(f'damping is positive, got {damping}.')

  def solve(operator, right, start, key):
    del start, key
    flat, unravel = ravel_pytree(right)
    wide = jnp.promote_types(flat.dtype, jnp.float32)
    columns = jax.random.normal(
      jax.random.key(seed), (rank, flat.size), jnp.float32
    )
    # Orthonormal columns keep the small system well conditioned.
    columns = jnp.linalg.qr(columns.T.astype(wide))[0].T
    multiply = lambda v: ravel_pytree(operator(unravel(v.astype(flat.dtype))))[
      0
    ]
    sketch = jax.vmap(multiply)(columns).astype(wide)  # (rank, n)
    core = sketch @ columns.T
    core = (core + core.T) / 2 + sketch @ sketch.T / damping
    # Eigenvalues: also where the sketch is larger than the matrix's rank.
    sizes, vectors = jnp.linalg.eigh(core)
    room = jnp.finfo(wide).eps * sizes.shape[0] * jnp.max(jnp.abs(sizes))
    inverse = _ratio(jnp.ones_like(sizes), jnp.where(sizes > room, sizes, 0))
    b = flat.astype(wide)
    inside = vectors @ (inverse * (vectors.T @ (sketch @ b)))
    q = (b - sketch.T @ inside / damping) / damping
    return unravel(q.astype(flat.dtype)), min(rank, flat.size)

  return LinearSolver(solve)


def gmres(steps: int) -> LinearSolver:
  r"""Generalised minimal residuals: no symmetry asked, at the cost of memory.

  .. math::
    q = q_0 + \arg\min_{d \in K_m} \| b - H (q_0 + d) \|

  over the Krylov space of m = `steps` products.

  Args:
    steps: products, and as many copies of the solution; one product more for
      the start, if any.

  Returns:
    A `LinearSolver`.

  Raises:
    ValueError: if `steps` is below 1.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> turn = jnp.array([[0.0, 1.0], [-1.0, 0.0]])
    >>> print(bj.linear_solvers.gmres(2)(lambda v: turn @ v, jnp.array([1.0, 2.0])).round(4))
    [-2.  1.]

  References:
    Saad and Schultz, `GMRES: A Generalized Minimal Residual Algorithm for
    Solving Nonsymmetric Linear Systems
    <https://doi.org/10.1137/0907058>`_, 1986.
  """
  _check_whole('gmres', 'steps', steps, 1)

  def solve(operator, right, start, key):
    del key
    flat, unravel = ravel_pytree(right)
    wide = jnp.promote_types(flat.dtype, jnp.float32)
    narrow = lambda v: unravel(v.astype(flat.dtype))
    multiply = lambda v: ravel_pytree(operator(narrow(v)))[0].astype(wide)
    b = flat.astype(wide)
    first, q0 = 0, jnp.zeros_like(b)
    if start is not None:
      first, q0 = 1, ravel_pytree(start)[0].astype(wide)
      b = b - multiply(q0)
    size = jnp.linalg.norm(b)
    unit = _ratio(jnp.ones([], wide), size) * b
    zeros = lambda *shape: _sequences.vary_like(jnp.zeros(shape, wide), b)
    basis = zeros(steps + 1, b.size).at[0].set(unit)
    hessenberg = zeros(steps + 1, steps)

    def step(i, carry):
      basis, hessenberg = carry
      product = multiply(basis[i])
      scale = jnp.linalg.norm(product)
      # Twice is enough: the second removes what the first left by rounding.
      along = basis @ product
      rest = product - along @ basis
      again = basis @ rest
      rest = rest - again @ basis
      length = jnp.linalg.norm(rest)
      # Within rounding of the space: it is complete, the rest is noise.
      length = jnp.where(length > 10 * jnp.finfo(wide).eps * scale, length, 0)
      column = (along + again).at[i + 1].set(length)
      next_unit = _ratio(jnp.ones([], wide), length) * rest
      return basis.at[i + 1].set(next_unit), hessenberg.at[:, i].set(column)

    basis, hessenberg = jax.lax.fori_loop(0, steps, step, (basis, hessenberg))
    target = jnp.zeros(steps + 1, wide).at[0].set(size)
    weights = jnp.linalg.lstsq(hessenberg, target)[0]
    return narrow(q0 + weights @ basis[:-1]), first + steps

  return LinearSolver(solve)


def dense_solve() -> LinearSolver:
  """Writes the matrix down and factors it: exact, for small problems.

  Returns:
    A `LinearSolver`; it takes one product for each number in the solution, all
    at once, and gives the solution of least norm where the matrix is singular.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> print(bj.linear_solvers.dense_solve()(lambda v: 2 * v, jnp.array([2.0, 4.0])).round(4))
    [1. 2.]
  """

  def solve(operator, right, start, key):
    del start, key
    flat, unravel = ravel_pytree(right)
    wide = jnp.promote_types(flat.dtype, jnp.float32)
    if not flat.size:
      return right, 0
    multiply = lambda v: ravel_pytree(operator(unravel(v)))[0].astype(wide)
    matrix = jax.vmap(multiply, out_axes=1)(
      jnp.eye(flat.size, dtype=flat.dtype)
    )
    q = jnp.linalg.lstsq(matrix, flat.astype(wide))[0]
    return unravel(q.astype(flat.dtype)), flat.size

  return LinearSolver(solve)
