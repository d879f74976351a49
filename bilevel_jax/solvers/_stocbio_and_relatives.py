"""BSA, TTSA, stocBiO, ALSET and AmIGO: `aid_bilevel` by Neumann series."""

from collections.abc import Callable
from typing import Any

from bilevel_jax import descent, linear_solvers, oracles, types

_DOC = r"""{title}

  .. math::
    y &\leftarrow y - \beta \nabla_y g(x_k, y) \quad \text{{(T times)}} \\
    x_{{k+1}} &= x_k - \alpha (\nabla_x f - \nabla_{{xy}} g \, q), \qquad
    q \approx [\nabla_{{yy}} g]^{{-1}} \nabla_y f

  {text}

  Args:
    problem: the upper and the lower loss; the lower loss is strongly convex.
    upper: how the upper variable moves, an optax optimiser or a `Sequence`.
    lower: how the lower variable moves, an optax optimiser or a `Sequence`. Its
      `steps` are T; unset, {steps}.
    terms: products of the series, or the bound of its random length. The bias
      falls geometrically with it.
    step_size: step size of the series, at most 1 / (largest lower curvature).
    linear_batch: the batch of product t, from (batch, t).
    key: PRNG key of a random length, or a whole number.

  Returns:
    A solver for `BilevelParams`.

  Raises:
    ValueError: if `terms` is too small or the step size not positive.
    TypeError: without a key for a random length.

  Example:
    >>> import bilevel_jax as bj, optax
    >>> toy = bj.testing.toy_problem()
    >>> solver = bj.solvers.{name}(
    ...   toy.problem, terms=5, step_size=0.4, key=0,
    ...   upper=optax.sgd(0.1), lower=bj.Sequence(optax.sgd(0.1), steps=3),
    ... )

  References:
    {source}
  """


def _method(
  name: str,
  title: str,
  text: str,
  solver: Callable[..., linear_solvers.LinearSolver],
  steps: int,
  warm_start: bool,
  source: str,
) -> Callable[..., Any]:
  """Makes a method from its documentation and its settings.

  Args:
    name: name of the function.
    title: the first line of the documentation.
    text: the description.
    solver: from (terms, step_size) to the linear solver.
    steps: the default steps of the lower variable in an update.
    warm_start: whether the linear solver starts from its last solution.
    source: authors, title, year.
  """

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
          solver(terms, step_size), linear_batch, warm_start, key
        ),
      ),
      upper=upper,
      lower=types.as_sequence(lower, 'lower', steps=steps),
    )

  method.__name__ = method.__qualname__ = name
  method.__doc__ = _DOC.format(
    name=name, title=title, text=text, steps=steps, source=source
  )
  return method


bsa = _method(
  'bsa',
  'BSA: an inner loop, then one random term of a Neumann series.',
  r"""On average it takes half the products of a truncated series with the
  same bias, but it adds noise: :math:`q = \eta N \prod_{n=1}^{N'} (I - \eta
  \nabla_{yy} g) \nabla_y f` with :math:`N'` uniform on 0, ..., N - 1.""",
  linear_solvers.random_neumann,
  10,
  False,
  """Ghadimi and Wang, `Approximation Methods for Bilevel Programming
    <https://arxiv.org/abs/1802.02246>`_, 2018.""",
)
ttsa = _method(
  'ttsa',
  'TTSA: `bsa` with one lower step, whose size falls more slowly.',
  r"""Instead of an inner loop, the lower variable takes larger steps, for
  instance with the exponents 2/5 for the lower and 3/5 for the upper steps.""",
  linear_solvers.random_neumann,
  1,
  False,
  """Hong, Wai, Wang and Yang, `A Two-Timescale Framework for Bilevel
    Optimization <https://arxiv.org/abs/2007.05170>`_, 2020.""",
)
stocbio = _method(
  'stocbio',
  'stocBiO: an inner loop, then a truncated Neumann series.',
  r"""The series restarts in each update, with fresh samples in each product
  if `linear_batch` draws them. Its truncation leaves a bias.""",
  linear_solvers.neumann,
  10,
  False,
  """Ji, Yang and Liang, `Bilevel Optimization: Convergence Analysis and
    Enhanced Design <https://arxiv.org/abs/2010.07962>`_, 2021.""",
)
alset = _method(
  'alset',
  'ALSET: alternating steps of one order, a fixed number of lower steps.',
  r"""Because the lower solution is smooth in x, steps of one order are
  enough, :math:`\alpha_k \sim \beta_k`. The authors draw the length of the
  series; here it is fixed.""",
  linear_solvers.neumann,
  1,
  False,
  """Chen, Sun and Yin, `Closing the Gap: Tighter Analysis of Alternating
    Stochastic Gradient Methods for Bilevel Problems
    <https://arxiv.org/abs/2106.13781>`_, 2021.""",
)
amigo = _method(
  'amigo',
  'AmIGO: inner loops for the lower problem and for its linear system.',
  r"""Both continue from their last values, so that a few steps of each are
  enough, and there is no bias of a truncated series.""",
  linear_solvers.neumann,
  10,
  True,
  """Arbel and Mairal, `Amortized Implicit Differentiation for Stochastic
    Bilevel Optimization <https://arxiv.org/abs/2111.14580>`_, 2021.""",
)
