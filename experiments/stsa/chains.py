"""Chains of coupled sequences with known solutions.

    x -> y^1 -> y^2 -> ... -> y^N -> x

The equilibrium of an inner sequence depends on the previous sequence.
`check_assumptions` asserts the conditions of a rate: a stable joint system, a
constant c of the step size c / (k + k_0) large enough for the fast rate, and
k_0 large enough for the first steps.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

import bilevel_jax as bj


class AssumptionError(ValueError):
  """A problem or its step sizes violate the assumptions of a theorem."""


def sequence_names(inner: int) -> tuple[str, ...]:
  """Names of the main sequence and N inner ones."""
  return ('x', *(f'y{n}' for n in range(1, inner + 1)))


class Chain(NamedTuple):
  """Coupled sequences with measures of their error.

  Attributes:
    names: names of the sequences, the main one first.
    increments: functions of (sequences, batch), by name of the sequence; a
      batch is the noise of all sequences.
    start: PRNG key -> initial sequences.
    errors: sequences -> errors by name.
    jacobian: minus the derivative of all increments by all sequences, at the
      solution or where it is steepest.
    sizes: dimensions of the sequences.
    draw: PRNG key -> a batch.
  """

  names: tuple[str, ...]
  increments: Mapping[str, Callable[[Any, Any], chex.Array]]
  start: Callable[[chex.PRNGKey], Any]
  errors: Callable[[Any], dict[str, chex.Array]]
  jacobian: np.ndarray
  sizes: tuple[int, ...]
  draw: Callable[[chex.PRNGKey], Any]


def minimise(loss: Callable[[Any], Any], start: np.ndarray) -> chex.Array:
  """Minimises a loss by BFGS; requires that float64 is enabled."""
  both = jax.jit(jax.value_and_grad(loss))
  result: Any = scipy.optimize.minimize(
    lambda x: tuple(np.asarray(z) for z in both(x)),
    start,
    jac=True,
    options={'gtol': 1e-10},
  )
  return jnp.asarray(result.x)


def orthogonal(
  draw: np.random.Generator, rows: int, columns: int | None = None
) -> np.ndarray:
  """Draws a matrix with orthonormal columns, square by default."""
  q, r = np.linalg.qr(draw.normal(size=(rows, columns or rows)))
  return q * np.sign(np.diag(r))


def _symmetric(draw, size, low, high):
  q = orthogonal(draw, size)
  return q @ np.diag(np.linspace(low, high, size)) @ q.T


def draw_noise(key: chex.PRNGKey, names: tuple[str, ...], size: int) -> Any:
  """Draws independent noise with mean squared norm 1 per sequence."""
  drawn = jax.random.normal(key, (len(names), size)) / jnp.sqrt(size)
  return bj.sequences(**dict(zip(names, drawn, strict=True)))


def _chain(moves, start, errors, jacobian, size):
  """A chain of sequences with equal sizes and independent noise."""
  names = tuple(moves)
  draw = lambda key: draw_noise(key, names, size)
  sizes = (size,) * len(names)
  return Chain(names, moves, start, errors, jacobian, sizes, draw)


def monotone_chain(inner: int, *, size: int = 10, seed: int = 0) -> Chain:
  r"""Makes a chain of linear, strongly monotone sequences.

  .. math::
    h^n = -A_n (y^n - \tfrac{1}{2} Q_n y^{n-1} - b_n), \qquad
    v = -(A_0 x + \tfrac{1}{N} \sum_n C_n y^n + a)

  Args:
    inner: number N of inner sequences, at least 1.
    size: dimension d of each sequence.
    seed: seed of the matrices; A has eigenvalues from 1 to 2, Q is orthogonal,
      C has norm 1/2.

  Returns:
    A `Chain`. Its errors are squared distances: `main` to the solution, `inner`
    to the inner equilibria given the previous sequences, and their `sum`.
  """
  draw = np.random.default_rng(seed)
  names = sequence_names(inner)
  main = _symmetric(draw, size, 1, 2)
  curvature = [_symmetric(draw, size, 1, 2) for _ in range(inner)]
  follow = [orthogonal(draw, size) / 2 for _ in range(inner)]
  couple = [orthogonal(draw, size) / 2 for _ in range(inner)]
  shift = draw.normal(size=(inner + 1, size))
  # Minus the increments are J z - r, with all sequences in the vector z.
  jacobian = np.zeros((size * (inner + 1),) * 2)
  right = np.zeros(size * (inner + 1))
  block = lambda n: slice(n * size, (n + 1) * size)
  jacobian[block(0), block(0)], right[block(0)] = main, -shift[0]
  for n in range(1, inner + 1):
    jacobian[block(0), block(n)] = couple[n - 1] / inner
    jacobian[block(n), block(n)] = curvature[n - 1]
    jacobian[block(n), block(n - 1)] = -curvature[n - 1] @ follow[n - 1]
    right[block(n)] = curvature[n - 1] @ shift[n]
  solution = np.linalg.solve(jacobian, right).reshape(inner + 1, size)
  # Converts to float32, because NumPy arrays would be float64 constants.
  main, curvature, follow, couple, shift, solved = jax.tree.map(
    lambda x: jnp.asarray(x, jnp.float32),
    (main, curvature, follow, couple, shift, solution),
  )

  def equilibrium(z, n):
    return follow[n - 1] @ z[n - 1] + shift[n]

  def move_main(z, batch):
    pull = sum(c @ y for c, y in zip(couple, z[1:], strict=True)) / inner
    return -(main @ z[0] + pull + shift[0]) + batch.x

  def inner_move(n):
    def move(z, batch):
      gap = z[n] - equilibrium(z, n)
      return -curvature[n - 1] @ gap + batch[n]

    return move

  def errors(z):
    main = jnp.sum((z[0] - solved[0]) ** 2)
    lag = sum(
      jnp.sum((z[n] - equilibrium(z, n)) ** 2) for n in range(1, inner + 1)
    )
    return {'main': main, 'inner': lag, 'sum': main + lag}

  def start(key):
    error = draw_noise(key, names, size)
    return type(error)(*(s + e for s, e in zip(solved, error, strict=True)))

  moves = {'x': move_main}
  moves |= {name: inner_move(n) for n, name in enumerate(names[1:], 1)}
  return _chain(moves, start, errors, jacobian, size)


def nonmonotone_chain(inner: int, *, size: int = 10, seed: int = 0) -> Chain:
  r"""Makes a chain whose main sequence descends a non-convex function.

  .. math::
    F(x) = \sum_i \phi((P x)_i), \qquad \phi(w) = w^2 / 20 - \cos w

  The inner sequences track rotations of x, :math:`h^n = Q_n y^{n-1} - y^n`. The
  main one descends F with its gradient at the x that the last one implies.

  Args:
    inner: number N of inner sequences, at least 1.
    size: dimension of each sequence.
    seed: seed of the rotations P and Q.

  Returns:
    A `Chain`. Its errors are `main`, the squared gradient norm of F at x, and
    `inner`, as in `monotone_chain`. Its Jacobian is at the largest curvature.
  """
  draw = np.random.default_rng(seed)
  names = sequence_names(inner)
  mix = orthogonal(draw, size)
  turns = [orthogonal(draw, size) for _ in range(inner)]
  product = np.eye(size)
  for turn in turns:
    product = turn @ product
  steepest = 1.1
  jacobian = np.eye(size * (inner + 1))
  block = lambda n: slice(n * size, (n + 1) * size)
  jacobian[block(0), block(0)] = 0
  jacobian[block(0), block(inner)] = steepest * product.T
  for n in range(1, inner + 1):
    jacobian[block(n), block(n - 1)] = -turns[n - 1]
  mix, turns, product = jax.tree.map(
    lambda x: jnp.asarray(x, jnp.float32), (mix, turns, product)
  )

  def gradient(x):
    w = mix @ x
    return mix.T @ (w / 10 + jnp.sin(w))

  def inner_move(n):
    return lambda z, batch: turns[n - 1] @ z[n - 1] - z[n] + batch[n]

  def errors(z):
    lag = sum(
      jnp.sum((z[n] - turns[n - 1] @ z[n - 1]) ** 2)
      for n in range(1, inner + 1)
    )
    return {'main': jnp.sum(gradient(z[0]) ** 2), 'inner': lag}

  def start(key):
    # Inner sequences at their equilibria, x away from the minimum at zero.
    values = [3 * jax.random.normal(key, (size,)) / jnp.sqrt(size)]
    for turn in turns:
      values.append(turn @ values[-1])
    return bj.sequences(**dict(zip(names, values, strict=True)))

  moves = {'x': lambda z, batch: -gradient(product.T @ z[inner]) + batch.x}
  moves |= {name: inner_move(n) for n, name in enumerate(names[1:], 1)}
  return _chain(moves, start, errors, jacobian, size)


class Spectrum(NamedTuple):
  """Spectrum of a chain's Jacobian, scaled by the ratios of step sizes.

  Attributes:
    rate: smallest real part of its eigenvalues.
    largest: its norm.
  """

  rate: float
  largest: float


def check_assumptions(
  chain: Chain,
  *,
  ratio: float = 1.0,
  scale: float | None = None,
  offset: float | None = None,
  fast: bool = True,
) -> Spectrum:
  r"""Raises unless problem and step sizes satisfy the theorem's assumptions.

  Args:
    chain: the problem.
    ratio: inner step sizes over the main one.
    scale: c of the main step size c / (k + k_0), if it has this form.
    offset: :math:`k_0`.
    fast: whether c must be large enough for the rate 1 / k; false for controls.

  Returns:
    The spectrum of the scaled Jacobian.

  Raises:
    AssumptionError: if the joint system is unstable, the first steps are too
      large, or c is too small.
  """
  weights = np.repeat([1.0] + [ratio] * (len(chain.names) - 1), chain.sizes)
  scaled = weights[:, None] * chain.jacobian
  rate = float(np.linalg.eigvals(scaled).real.min())
  largest = float(np.linalg.norm(scaled, 2))
  if rate <= 0:
    raise AssumptionError(
      f'the joint system of {len(chain.names)} sequences is unstable at the '
      f'ratio {ratio} of steps: an eigenvalue has the real part {-rate:.3g}. '
      'Increase the inner step sizes.'
    )
  if scale is not None and offset is not None:
    if scale / offset > 1 / largest:
      raise AssumptionError(
        f'the first step {scale / offset:.3g} is above 1 / L = '
        f'{1 / largest:.3g}: use a larger offset.'
      )
    if fast and scale <= 1 / (2 * rate):
      raise AssumptionError(
        f'the rate 1 / k needs c > 1 / (2 lambda) = {1 / (2 * rate):.3g}, got '
        f'{scale:.3g}.'
      )
  return Spectrum(rate, largest)
