"""BSA, TTSA, stocBiO, ALSET and AmIGO: `aid_bilevel` by a Neumann series."""

from collections.abc import Callable
from typing import Any, NamedTuple

from bilevel_jax import descent, linear_solvers, oracles, types


class _Row(NamedTuple):
  """What sets one method apart.

  Attributes:
    title: its name, and what it is.
    words: what is to say of it.
    solve: makes the linear solver from (terms, step_size).
    steps: steps of the lower variable in an update, where its record has none.
    warm_start: whether the linear solver starts from its last solution.
    source: authors, title, year.
  """

  title: str
  words: str
  solve: Callable[..., linear_solvers.LinearSolver]
  steps: int
  warm_start: bool
  source: str


_DOC = r"""{title}

  .. math::
    y &\leftarrow y - \beta \nabla_y g(x_k, y) \quad \text{{(T times)}} \\
    x_{{k+1}} &= x_k - \alpha (\nabla_x f - \nabla_{{xy}} g \, q), \qquad
    q \approx [\nabla_{{yy}} g]^{{-1}} \nabla_y f

  {words}

  Args:
    problem: the upper and the lower loss, the lower one strongly convex.
    upper: how the upper variable moves, an optax optimiser or a `Sequence`.
    lower: how the lower variable moves, an optax optimiser or a `Sequence`. Its
      `steps` are T; unset, {steps}.
    terms: products of the series, or the bound of its random length; the bias
      that it leaves falls geometrically with it.
    step_size: of the series, at most 1 / (largest lower curvature).
    linear_batch: the batch of product t, from (batch, t).
    key: PRNG key of random lengths, or a whole number; only for these.

  Returns:
    A solver for `BilevelParams`.

  Raises:
    ValueError: if `terms` is too small or the step size not positive.
    TypeError: without a key for random lengths.

  Example:
    >>> import bilevel_jax as bj, optax
    >>> square = lambda x, y, batch: (x - y) ** 2
    >>> solver = bj.solvers.{name}(
    ...   bj.BilevelProblem(square, square), terms=5, step_size=0.4, key=0,
    ...   upper=optax.sgd(0.1), lower=bj.Sequence(optax.sgd(0.1), steps=3),
    ... )

  References:
    {source}
  """

_ROWS = {
  'bsa': _Row(
    'BSA: an inner loop, then one random term of the Neumann series.',
    r"""On average it takes half the products of a truncated series with the
  same bias, at the price of noise: :math:`q = \eta N \prod_{n=1}^{N'} (I - \eta
  \nabla_{yy} g) \nabla_y f` with :math:`N'` uniform on 0, ..., N - 1.""",
    linear_solvers.random_neumann,
    10,
    False,
    """Ghadimi and Wang, `Approximation Methods for Bilevel Programming
    <https://arxiv.org/abs/1802.02246>`_, 2018.""",
  ),
  'ttsa': _Row(
    'TTSA: `bsa` with one lower step, whose size falls more slowly.',
    r"""The lower variable keeps up by larger steps, for instance with the
  exponents 2/5 below and 3/5 above, in place of an inner loop.""",
    linear_solvers.random_neumann,
    1,
    False,
    """Hong, Wai, Wang and Yang, `A Two-Timescale Framework for Bilevel
    Optimization <https://arxiv.org/abs/2007.05170>`_, 2020.""",
  ),
  'stocbio': _Row(
    'stocBiO: an inner loop, then a truncated Neumann series.',
    r"""The series starts anew in each update, with fresh samples in each of its
  products if `linear_batch` draws them. Its truncation leaves a bias.""",
    linear_solvers.neumann,
    10,
    False,
    """Ji, Yang and Liang, `Bilevel Optimization: Convergence Analysis and
    Enhanced Design <https://arxiv.org/abs/2010.07962>`_, 2021.""",
  ),
  'alset': _Row(
    'ALSET: alternating steps of one order, a constant number of lower ones.',
    r"""The smoothness of the lower solution in x makes steps of one order
  enough, :math:`\alpha_k \sim \beta_k`. Where the authors draw the length of
  the series, here it is fixed.""",
    linear_solvers.neumann,
    1,
    False,
    """Chen, Sun and Yin, `Closing the Gap: Tighter Analysis of Alternating
    Stochastic Gradient Methods for Bilevel Problems
    <https://arxiv.org/abs/2106.13781>`_, 2021.""",
  ),
  'amigo': _Row(
    'AmIGO: inner loops for the lower problem and for its linear system.',
    r"""Both start from where they ended, so that a few steps of each do, and no
  truncated series leaves a bias.""",
    linear_solvers.neumann,
    10,
    True,
    """Arbel and Mairal, `Amortized Implicit Differentiation for Stochastic
    Bilevel Optimization <https://arxiv.org/abs/2111.14580>`_, 2021.""",
  ),
}


def _method(name: str, row: _Row) -> Callable[..., Any]:
  def method(
    problem: types.BilevelProblem,
    *,
    upper: types.SequenceLike,
    lower: types.SequenceLike,
    terms: int,
    step_size: float,
    linear_batch: Callable[[Any, Any], Any] | None = None,
    key: Any = None,
  ) -> descent.Solver:
    return descent.descend(
      oracles.lower_gradient(problem),
      oracles.implicit(
        problem,
        solve=linear_solvers.LinearSystem(
          row.solve(terms, step_size), linear_batch, row.warm_start, key
        ),
      ),
      upper=upper,
      lower=types.as_sequence(lower, 'lower', steps=row.steps),
    )

  method.__name__ = method.__qualname__ = name
  method.__doc__ = _DOC.format(name=name, **row._asdict())
  return method


bsa = _method('bsa', _ROWS['bsa'])
ttsa = _method('ttsa', _ROWS['ttsa'])
stocbio = _method('stocbio', _ROWS['stocbio'])
alset = _method('alset', _ROWS['alset'])
amigo = _method('amigo', _ROWS['amigo'])
