"""Bilevel quadratics on finite data with closed-form hypergradient."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

import bilevel_jax as bj
from experiments import harness
from experiments.stsa import chains, zoo_problem


class Quadratic(NamedTuple):
  """A bilevel quadratic and its closed forms.

  Attributes:
    problem: losses of (x, y, batch); `batch['upper']` and `batch['lower']` are
      indices of fixed batches.
    batches: number of fixed batches.
    hypergradient: x -> the hypergradient on all data.
    solution: the minimiser, (dimension,).
    series_floor: (terms, step size) -> the final squared hypergradient norm of
      a noiseless method with a truncated Neumann series.
    start: PRNG key -> initial params.
  """

  problem: bj.BilevelProblem
  batches: int
  hypergradient: Any
  solution: chex.Array
  series_floor: Any
  start: Any


class _Form(NamedTuple):
  """Factors of a quadratic form of (x, y), per sample."""

  x: np.ndarray  # (samples, d); the Hessian is the mean of outer products.
  y: np.ndarray
  left: np.ndarray  # The cross term is the mean of left (x) times right (y).
  right: np.ndarray
  linear_x: np.ndarray
  linear_y: np.ndarray


def _form(draw, samples, size, coupling):
  def white():
    # Uncorrelated columns of unit variance give exact second moments.
    return chains.orthogonal(draw, samples, size) * samples**0.5

  def curved():
    turn = chains.orthogonal(draw, size)
    root = turn @ np.diag(np.linspace(0.1, 1, size) ** 0.5) @ turn.T
    return white() @ root

  left = white()
  values = np.diag(coupling * np.linspace(0.1, 1, size))
  one, two = (chains.orthogonal(draw, size) for _ in range(2))
  right = left @ (one @ values @ two.T)
  noise = lambda: draw.normal(size=(samples, size))
  return _Form(curved(), curved(), left, right, noise(), noise())


def make_quadratic(
  *,
  coupling: float,
  upper_coupling: float = 0.05,
  samples: int = 1_024,
  size: int = 100,
  batch_size: int = 64,
  seed: int = 0,
) -> Quadratic:
  r"""Makes a problem with Hessians and cross terms of rank one per sample.

  .. math::
    f, g = \tfrac{1}{n} \sum_i \tfrac{1}{2} (a_i^\top x)^2
      + \tfrac{1}{2} (b_i^\top y)^2 + (l_i^\top x)(r_i^\top y)
      + p_i^\top x + q_i^\top y

  Args:
    coupling: norm of the lower cross term, whose singular values are from a
      tenth of it up.
    upper_coupling: norm of the upper cross term.
    samples: samples n per loss, a multiple of the batch size.
    size: dimension of each variable; Hessians have eigenvalues 0.1 to 1.
    batch_size: samples per fixed batch.
    seed: seed of the samples.

  Returns:
    A `Quadratic`.
  """
  harness.require_memory(
    8 * 2 * size * (6 * samples + 5 * size), 'samples of this number and size'
  )
  draw = np.random.default_rng(seed)
  forms = (
    _form(draw, samples, size, upper_coupling),
    _form(draw, samples, size, coupling),
  )
  batches = samples // batch_size
  split = lambda a: jnp.asarray(
    a.reshape(batches, batch_size, size), jnp.float32
  )
  above, below = (_Form(*map(split, form)) for form in forms)

  def make_loss(form, level):
    def loss(x, y, batch):
      a = jax.tree.map(lambda z: z[batch[level]], form)
      cross = (a.left @ x) * (a.right @ y)
      square = ((a.x @ x) ** 2 + (a.y @ y) ** 2) / 2
      return jnp.mean(square + cross + a.linear_x @ x + a.linear_y @ y)

    return loss

  f, g = forms
  second = lambda a, b: a.T @ b / samples
  # The lower minimiser is y(x) = response x + rest.
  hessian = second(g.y, g.y)
  response = -np.linalg.solve(hessian, second(g.left, g.right).T)
  rest = -np.linalg.solve(hessian, g.linear_y.mean(0))
  cross = second(f.left, f.right)  # (x, y)
  f_yy, f_y = second(f.y, f.y), f.linear_y.mean(0)
  matrix = second(f.x, f.x) + cross @ response + response.T @ cross.T
  matrix = matrix + response.T @ f_yy @ response
  slope = f.linear_x.mean(0) + cross @ rest + response.T @ (f_yy @ rest + f_y)
  solution = np.linalg.solve(matrix, -slope)
  matrix32 = jnp.asarray(matrix, jnp.float32)
  solution32 = jnp.asarray(solution, jnp.float32)

  def series_floor(terms, step_size):
    shrink = np.eye(size) - step_size * hessian
    # The truncated series times the cross term.
    partial = np.linalg.solve(
      hessian, np.eye(size) - np.linalg.matrix_power(shrink, terms)
    )
    short = -second(g.left, g.right) @ partial
    above_y = f_yy @ response + cross.T
    truncated = second(f.x, f.x) + cross @ response + short @ above_y
    right = f.linear_x.mean(0) + cross @ rest + short @ (f_yy @ rest + f_y)
    end = np.linalg.solve(truncated, -right)
    return float(np.sum((matrix @ (end - solution)) ** 2))

  def start(key):
    x = jax.random.normal(key, (size,))
    return bj.BilevelParams(x, jnp.zeros(size))

  return Quadratic(
    problem=bj.BilevelProblem(
      make_loss(above, 'upper'), make_loss(below, 'lower')
    ),
    batches=batches,
    # The form M (x - solution) avoids cancellation near the solution.
    hypergradient=lambda x: matrix32 @ (x - solution32),
    solution=solution32,
    series_floor=series_floor,
    start=start,
  )


def as_problem(
  quadratic: Quadratic, title: str, series_floor: float
) -> zoo_problem.Problem:
  """Converts a quadratic to a problem of the comparison."""

  def measure(params, data):
    del data
    slope = quadratic.hypergradient(params.upper)
    return {'hypergradient': jnp.vdot(slope, slope)}

  return zoo_problem.Problem(
    name='',
    title=title,
    losses=quadratic.problem,
    data=(),
    batches=(quadratic.batches,) * 2,
    start=quadratic.start,
    measure=measure,
    tune_by='hypergradient',
    judge_by='hypergradient',
    label='squared hypergradient norm',
    lower_size=quadratic.solution.size,
    references={'series_floor': series_floor},
  )
