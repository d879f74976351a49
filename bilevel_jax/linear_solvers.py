"""Matrix-free linear solvers for implicit differentiation.

A solver is any function `solve(operator, right, start) -> solution`, where
`operator` multiplies a pytree by a symmetric positive definite matrix and
`start` is a first guess, or None for zero. Solvers of other libraries fit too:

    def solve(operator, right, start):  # lineax
      matrix = lineax.FunctionLinearOperator(
        operator, jax.eval_shape(lambda: right),
        lineax.positive_semidefinite_tag)
      return lineax.linear_solve(matrix, right, lineax.CG(1e-6, 1e-6)).value

The solvers of this module are `LinearSolver`s: they count their products and
may draw random numbers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from bilevel_jax import _checks, _keys, _sequences, _trees

# The product of a matrix with a pytree.
Operator = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class SampledOperator:
  """A product with a matrix that is an expectation, and with its samples.

  Attributes:
    product: from a vector to its product with the matrix.
    at: from (vector, t) to its product with sample t of the matrix.
  """

  product: Operator
  at: Callable[[Any, chex.Numeric], Any]

  def __call__(self, vector: Any) -> Any:
    """The product with the matrix."""
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
      products is a whole number, or an int32 scalar if it depends on the data.
    random: whether it draws from its key; if not, the key is None.
  """

  solve: Callable[..., tuple[Any, chex.Numeric]]
  random: bool = False

  def __call__(
    self, operator: Operator, right: Any, start: Any = None, key: Any = None
  ) -> Any:
    """The solution."""
    return self.solve(operator, right, start, key)[0]


class LinearSystem(NamedTuple):
  """How the linear system of a hypergradient is solved.

  A bare solver is converted to a record. None means that a field is unset; then
  the default of the method holds.

  Attributes:
    solve: any function from (operator, right, start) to the solution, for
      instance of this module. Unset, ten conjugate gradients.
    batch_at: the batch of product t, from (batch, t), for solvers that take
      fresh samples (`neumann`, `random_neumann`). Unset, each product sees the
      whole batch.
    warm_start: whether the solver starts from the last update's solution, which
      is then in the state.
    key: PRNG key of a random solver, or a whole number.
  """

  solve: Any = None
  batch_at: Callable[[Any, Any], Any] | None = None
  warm_start: bool | None = None
  key: Any = None


def as_system(solve: Any, *, warm_start: bool) -> LinearSystem:
  """Converts a solver to a `LinearSystem` and fills in its unset fields.

  Example:
    >>> import bilevel_jax as bj
    >>> solve = bj.linear_solvers.dense_solve()
    >>> bj.linear_solvers.as_system(solve, warm_start=True).warm_start
    True
  """
  system = solve if isinstance(solve, LinearSystem) else LinearSystem(solve)
  warm = warm_start if system.warm_start is None else system.warm_start
  return system._replace(
    solve=system.solve or conjugate_gradient(), warm_start=warm
  )


def _scaled(solve: Callable[..., Any]) -> Callable[..., Any]:
  """Scales the right-hand side to size 1 and solves in at least float32.

  Then squares of entries neither overflow nor underflow, and sums over steps do
  not stall in bfloat16. Products take vectors in the original dtypes.
  """

  def wrapped(operator, right, start, key):
    widen = lambda tree: jax.tree.map(
      lambda a: jnp.asarray(a).astype(_trees.wide(jnp.asarray(a).dtype)), tree
    )
    call = lambda product: (
      lambda v, *t: widen(product(_trees.cast_like(v, right), *t))
    )
    if isinstance(operator, SampledOperator):
      operator = SampledOperator(call(operator.product), call(operator.at))
    else:
      operator = call(operator)
    b, start = widen(right), widen(start)
    largest = [jnp.max(jnp.abs(a), initial=0) for a in jax.tree.leaves(b)]
    size = functools.reduce(jnp.maximum, largest, jnp.zeros([]))
    size = jnp.where(size == 0, 1, size)
    over = lambda tree: jax.tree.map(lambda a: a / size.astype(a.dtype), tree)
    solution, products = solve(operator, over(b), over(start), key)
    solution = _trees.scaled(size, solution)
    return _trees.cast_like(solution, right), products

  return wrapped


def _where(condition: chex.Array, x: Any, y: Any) -> Any:
  return jax.tree.map(lambda a, b: jnp.where(condition, a, b), x, y)


def _check_step_size(caller: str, step_size: Any) -> None:
  largest = float(jnp.finfo(jnp.float32).max)
  _checks.within(caller, 'step_size', step_size, 0, largest, open_low=True)


def conjugate_gradient(
  steps: int = 10, *, tolerance: float | None = None, unroll: int = 1
) -> LinearSolver:
  """Conjugate gradients, the most accurate solver per product.

  The iteration stops once the residual is at rounding level, and at a direction
  without positive curvature above rounding, where the matrix is singular or
  indefinite. In the latter case, and where the residual has grown to ten times
  its minimum, the solver returns the point with the smallest residual in the
  search space; of these, the one of smallest norm if the right-hand side is
  outside the range of a singular matrix.

  Args:
    steps: the largest number of steps, one product each; a start costs one
      product more.
    tolerance: the relative residual at which to stop, in [0, 1]. None takes all
      products, in a program without a data-dependent loop.
    unroll: steps in one body of the compiled loop.

  Returns:
    A `LinearSolver` for pytrees, with the memory of five of them.

  Raises:
    ValueError: if `steps` or `unroll` is below 1, or the tolerance is not in
      [0, 1].

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> matrix = jnp.array([[2.0, 1.0], [1.0, 3.0]])
    >>> solve = bj.linear_solvers.conjugate_gradient(2)
    >>> print(solve(lambda v: matrix @ v, jnp.array([3.0, 4.0])).round(4))
    [1. 1.]

  References:
    Hestenes and Stiefel, `Methods of conjugate gradients for solving linear
    systems <https://doi.org/10.6028/jres.049.044>`_, 1952.

    Weiss, `Properties of generalized conjugate gradient methods
    <https://doi.org/10.1002/nla.1680010106>`_, 1994, for the point of smallest
    residual as a mean of the iterates.
  """
  name = 'conjugate_gradient'
  steps = _checks.whole_number(name, 'steps', steps)
  unroll = min(_checks.whole_number(name, 'unroll', unroll), steps)
  if tolerance is not None:
    _checks.within(name, 'tolerance', tolerance, 0, 1)

  def solve(operator, right, start, key):
    del key
    if start is None:
      zero = optax.tree.zeros_like(right)
      x, residual, first = _sequences.vary_like(zero, right), right, 0
    else:
      x, first = start, 1
      residual = optax.tree.sub(right, operator(start))
    leaves = jax.tree.leaves(right)
    eps = max((float(jnp.finfo(a.dtype).eps) for a in leaves), default=0.0)
    square = lambda v: _trees.dot(v, v)
    aim = eps if tolerance is None else jnp.maximum(tolerance, eps)
    enough = aim**2 * square(right)

    # Squared norms: `size` of the residual, `length` of the direction,
    # `smallest` of the residual of `best`. On the diagonal of Lanczos's matrix:
    # `past` is a part of the next entry, `top` the largest entry, as a norm.
    def step(carry):
      (x, residual, direction, best), numbers = carry
      size, length, smallest, past, top, flat = numbers
      product = operator(direction)
      curvature = _trees.dot(direction, product)
      top = jnp.maximum(top, jnp.abs(curvature / size + past))
      room = 4 * eps * top * length
      # With these comparisons, a NaN in a product reaches the solution.
      going = ~(size <= enough)
      flat = jnp.where(going, jnp.abs(curvature) <= room, flat)
      moving = going & ~(curvature <= room)
      scale = jnp.where(moving, size / curvature, 0)
      x = _trees.add_scaled(x, scale, direction)
      residual = _trees.add_scaled(residual, -scale, product)
      new = square(residual)
      # Residuals are orthogonal: weights 1 / size give the smallest mean.
      share = jnp.where(moving, _trees.ratio(smallest, smallest + new), 0)
      best = _trees.add_scaled(best, share, optax.tree.sub(x, best))
      turn = new / size
      ahead = _trees.add_scaled(residual, turn, direction)
      direction = _where(moving, ahead, direction)
      # A negative size marks a direction without curvature.
      ended = (jnp.where(going, -1, size), length, smallest, past)
      moved = (
        new,
        new + turn**2 * length,
        share * new,
        curvature / size * turn,
      )
      numbers = _where(moving, moved, ended)
      return (x, residual, direction, best), (*numbers, top, flat)

    size = square(residual)
    zero = 0 * size
    numbers = (size, size, size, zero, zero, size < 0)
    carry: Any = ((x, residual, residual, x), numbers)
    if tolerance is None:
      carry, _ = jax.lax.scan(
        lambda carry, _: (step(carry), None), carry, None, steps, unroll=unroll
      )
      taken = steps
    else:
      carry, taken = jax.lax.while_loop(
        lambda loop: (loop[1] < steps) & ~(loop[0][1][0] <= enough),
        lambda loop: (step(loop[0]), loop[1] + 1),
        (carry, jnp.int32(0)),
      )
    (x, _, direction, best), (size, length, smallest, *_, flat) = carry
    # The residual is outside the range, along the flat direction.
    outside = flat & (smallest > eps * square(right))
    along = _trees.ratio(_trees.dot(best, direction), length)
    best = _trees.add_scaled(best, jnp.where(outside, -along, 0), direction)
    worse = (size < 0) | (size > 100 * smallest)
    return _where(worse, best, x), first + taken

  return LinearSolver(_scaled(solve))


def neumann(steps: int, step_size: float) -> LinearSolver:
  r"""A truncated Neumann series, that is gradient descent.

  .. math::
    q \leftarrow q + \eta \, (b - H q) \quad \text{(steps times)}, \qquad
    q_0 = \eta b \text{ without a start}

  Without a start, the solution is the sum of the first `steps` + 1 terms.

  Args:
    steps: products with the matrix, at least 0.
    step_size: :math:`\eta > 0`, below 2 / (largest eigenvalue of H).

  Returns:
    A `LinearSolver`; with a batch for each product, step t uses batch t.

  Raises:
    ValueError: if `steps` is negative, or the step size is not positive.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> solve = bj.linear_solvers.neumann(2, 0.5)
    >>> print(solve(lambda v: v, jnp.float32(1.0)))
    0.875
  """
  steps = _checks.whole_number('neumann', 'steps', steps, 0)
  _check_step_size('neumann', step_size)

  def solve(operator, right, start, key):
    del key
    first = _trees.scaled(step_size, right) if start is None else start

    def step(q, t):
      residual = optax.tree.sub(right, _product_at(operator, q, t))
      return _trees.add_scaled(q, step_size, residual), None

    q, _ = jax.lax.scan(step, first, jnp.arange(steps, dtype=jnp.int32))
    return q, steps

  return LinearSolver(_scaled(solve))


def random_neumann(bound: int, step_size: float) -> LinearSolver:
  r"""One random, scaled term of a Neumann series, without bias.

  .. math::
    q = \eta N \prod_{n=1}^{N'} (I - \eta H_n) \, b, \qquad
    N' \sim \text{uniform on } \{0, \dots, N - 1\}

  Its mean over :math:`N'`, and over independent samples :math:`H_n` with mean
  H, is the sum of the first N terms of the series.

  Args:
    bound: N, at least 1; the start is not used.
    step_size: :math:`\eta > 0`, below 2 / (largest eigenvalue of H).

  Returns:
    A random `LinearSolver` that takes :math:`N'` products. Its key is a PRNG
    key or a whole number.

  Raises:
    TypeError: at the call, without a key.
    ValueError: if `bound` is below 1, or the step size is not positive.

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
  bound = _checks.whole_number('random_neumann', 'terms', bound)
  _check_step_size('random_neumann', step_size)

  def solve(operator, right, start, key):
    del start
    key = _keys.as_key(key, 'random_neumann')
    length = jax.random.randint(key, (), 0, bound, jnp.int32)
    shrink = lambda t, q: _trees.add_scaled(
      q, -step_size, _product_at(operator, q, t)
    )
    q = jax.lax.fori_loop(0, length, shrink, right)
    return _trees.scaled(step_size * bound, q), length

  return LinearSolver(_scaled(solve), random=True)


def nystrom(rank: int, damping: float, *, seed: int = 0) -> LinearSolver:
  r"""Inverts a low-rank sketch of the matrix in closed form.

  .. math::
    q = (H_r + \rho I)^{-1} b, \qquad
    H_r = (H \Omega) (\Omega^\top H \Omega)^+ (H \Omega)^\top

  with a matrix :math:`\Omega` of `rank` random columns. It has no loop and no
  step size. Use it where few eigenvalues of H are above the damping.

  Args:
    rank: columns of the sketch; their products are evaluated at once.
    damping: :math:`\rho > 0`, in units of the matrix.
    seed: a whole number or a PRNG key of the random columns, which are the same
      in each call.

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
  rank = _checks.whole_number('nystrom', 'columns', rank)
  _checks.within('nystrom', 'damping', damping, 0, open_low=True)

  def solve(operator, right, start, key):
    del start, key
    b, unravel = ravel_pytree(right)
    drawn = jax.random.normal(
      _keys.as_key(seed, 'nystrom'), (rank, b.size), jnp.float32
    )
    # Orthonormal columns keep the small system well conditioned.
    columns = jnp.linalg.qr(drawn.T.astype(b.dtype))[0]
    multiply = lambda v: ravel_pytree(operator(unravel(v)))[0]
    sketch = jax.vmap(multiply, 1, 1)(columns)  # (n, rank)
    core = columns.T @ sketch
    # Eigenvalues, because the sketch may have more columns than the rank of H.
    sizes, vectors = jnp.linalg.eigh((core + core.T) / 2)
    room = jnp.finfo(b.dtype).eps * sizes.size * jnp.max(jnp.abs(sizes))
    roots = jnp.sqrt(jnp.where(sizes > room, sizes, jnp.inf))
    # H_r = factor factor' = basis diag(lengths^2) basis'. Its eigenvalues have
    # no cancellation, unlike a difference of inverses.
    factor = sketch @ (vectors / roots)
    basis, lengths, _ = jnp.linalg.svd(factor, full_matrices=False)
    inside = basis.T @ b
    outside = b - basis @ inside
    # Projected twice, because rounding errors are divided by the damping.
    outside = (outside - basis @ (basis.T @ outside)) / damping
    q = basis @ (inside / (lengths**2 + damping)) + outside
    return unravel(q.astype(b.dtype)), sizes.size

  return LinearSolver(_scaled(solve))


def gmres(steps: int) -> LinearSolver:
  r"""Generalised minimal residuals (GMRES), for matrices without symmetry.

  .. math::
    q = q_0 + \arg\min_{d \in K_m} \| b - H (q_0 + d) \|

  over the Krylov space of m = `steps` products.

  Args:
    steps: the number of products, and of copies of the solution in memory; a
      start costs one product more.

  Returns:
    A `LinearSolver`.

  Raises:
    ValueError: if `steps` is below 1.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> turn = jnp.array([[0.0, 1.0], [-1.0, 0.0]])
    >>> solve = bj.linear_solvers.gmres(2)
    >>> print(solve(lambda v: turn @ v, jnp.array([1.0, 2.0])).round(4))
    [-2.  1.]

  References:
    Saad and Schultz, `GMRES: A Generalized Minimal Residual Algorithm for
    Solving Nonsymmetric Linear Systems
    <https://doi.org/10.1137/0907058>`_, 1986.
  """
  steps = _checks.whole_number('gmres', 'steps', steps)

  def solve(operator, right, start, key):
    del key
    b, unravel = ravel_pytree(right)
    multiply = lambda v: ravel_pytree(operator(unravel(v)))[0]
    first, q0 = 0, jnp.zeros_like(b)
    if start is not None:
      first, q0 = 1, ravel_pytree(start)[0]
      b = b - multiply(q0)
    size = jnp.linalg.norm(b)
    unit = _trees.ratio(b, size)
    zeros = lambda *shape: _sequences.vary_like(jnp.zeros(shape, b.dtype), b)
    basis = zeros(steps + 1, b.size).at[0].set(unit)
    hessenberg = zeros(steps + 1, steps)
    eps = jnp.finfo(b.dtype).eps

    def step(i, carry):
      basis, hessenberg = carry
      product = multiply(basis[i])
      scale = jnp.linalg.norm(product)
      # The second pass removes the rounding errors of the first one.
      along = basis @ product
      rest = product - along @ basis
      again = basis @ rest
      rest = rest - again @ basis
      length = jnp.linalg.norm(rest)
      # Within rounding, the Krylov space is complete and the rest is noise.
      length = jnp.where(length > 10 * eps * scale, length, 0)
      column = (along + again).at[i + 1].set(length)
      next_unit = _trees.ratio(rest, length)
      return basis.at[i + 1].set(next_unit), hessenberg.at[:, i].set(column)

    basis, hessenberg = jax.lax.fori_loop(0, steps, step, (basis, hessenberg))
    target = jnp.zeros(steps + 1, b.dtype).at[0].set(size)
    weights = jnp.linalg.lstsq(hessenberg, target)[0]
    return unravel(q0 + weights @ basis[:-1]), first + steps

  return LinearSolver(_scaled(solve))


def dense_solve() -> LinearSolver:
  """Forms and factors the matrix: exact, for small problems.

  Returns:
    A `LinearSolver` that evaluates one product for each number in the solution,
    all at once. For a singular matrix it gives the solution of smallest norm.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> solve = bj.linear_solvers.dense_solve()
    >>> print(solve(lambda v: 2 * v, jnp.array([2.0, 4.0])).round(4))
    [1. 2.]
  """

  def solve(operator, right, start, key):
    del start, key
    b, unravel = ravel_pytree(right)
    if not b.size:
      return right, 0
    multiply = lambda v: ravel_pytree(operator(unravel(v)))[0]
    matrix = jax.vmap(multiply, out_axes=1)(jnp.eye(b.size, dtype=b.dtype))
    return unravel(jnp.linalg.lstsq(matrix, b)[0]), b.size

  return LinearSolver(_scaled(solve))
