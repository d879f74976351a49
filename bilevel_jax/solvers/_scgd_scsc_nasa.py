"""Compositions of expectations: SCGD, SCSC, NASA, at any number of levels."""

from collections.abc import Callable, Sequence
from typing import Any

import optax

from bilevel_jax import _checks, descent, evaluation, oracles, types

Level = Callable[[Any, Any], Any]
Levels = Callable[[Any], Sequence[Any]]


def _level_sequences(count, levels, optimiser):
  """A record for each running mean, all made by one function."""

  def start(n):
    def make(params):
      values = tuple(levels(params))
      if len(values) != count:
        raise ValueError(
          f'{count + 1} functions have {count} inner levels, but `levels` '
          f'gives {len(values)} values.'
        )
      return values[n]

    return make

  return {
    f'level_{n + 1}': types.Sequence(optimiser, start=start(n))
    for n in range(count)
  }


def scgd(
  functions: Sequence[Level],
  *,
  main: types.SequenceLike,
  tracking: types.ScalarOrSchedule,
  levels: Levels,
  batch_of: Callable[[Any, int], Any] | None = None,
) -> descent.Solver:
  r"""SCGD: running means of the inner levels, the chain rule at them.

  .. math::
    y^n_{k+1} &= (1 - \beta) \, y^n_k + \beta f^{n-1}(y^{n-1}_k; \xi_k),
      \qquad y^0 = x \\
    x_{k+1} &= x_k - \alpha \nabla f^0(x_k)^\top \nabla f^1(y^1_k)^\top
      \cdots \nabla f^N(y^N_k)

  All move at once; the authors take the chain rule at the new means.

  Args:
    functions: :math:`f^0, \dots, f^N` of (value of the level below, batch).
    main: how :math:`x` moves, an optax optimiser or a `Sequence`.
    tracking: :math:`\beta` in (0, 1], a constant or a schedule.
    levels: the running means at the start, :math:`N` of them, from the
      parameters; values of the functions at the start, or zeros.
    batch_of: what level n sees, from (batch, n); by default the whole batch.

  Returns:
    A solver for a NamedTuple with the sequence `main`, made by
    `bj.sequences(main=x)`; `bj.auxiliaries` gives the running means.

  Raises:
    ValueError: if `levels` gives another number of values.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> solver = bj.solvers.scgd(
    ...   [lambda x, batch: x**2, lambda y, batch: (y - 4) ** 2],
    ...   main=optax.sgd(0.01), tracking=0.5, levels=lambda p: (p.main**2,),
    ... )
    >>> params = bj.sequences(main=jnp.float32(1.0))
    >>> state, step = solver.init(params), jax.jit(solver.update)
    >>> for _ in range(200):
    ...   updates, state = step(None, state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> print(params.main.round(2))
    2.0

  References:
    Wang, Fang and Liu, `Stochastic Compositional Gradient Descent
    <https://arxiv.org/abs/1411.3803>`_, 2014.
  """
  follow = _level_sequences(len(functions) - 1, levels, optax.sgd(tracking))
  directions = oracles.compositional(functions, batch_of=batch_of)
  return descent.descend(directions, main=main, **follow)


def scsc(
  functions: Sequence[Level],
  *,
  main: types.SequenceLike,
  tracking: types.ScalarOrSchedule,
  levels: Levels,
  batch_of: Callable[[Any, int], Any] | None = None,
) -> descent.Solver:
  r"""SCSC: running means that move with what they track, then the main step.

  .. math::
    y^n_{k+1} = (1 - \beta) [ y^n_k + f^{n-1}(y^{n-1}_k; \xi_k)
      - f^{n-1}(y^{n-1}_{k-1}; \xi_k) ] + \beta f^{n-1}(y^{n-1}_k; \xi_k)

  The correction, by the same sample at two points, takes out the lag, so that
  the tracking needs no step of a larger order than the main sequence's. It is
  `storm` on the difference of a level and its mean; the main sequence then sees
  the new means.

  Args:
    functions: as in `scgd`.
    main: how :math:`x` moves, an optax optimiser or a `Sequence`.
    tracking: :math:`\beta` in (0, 1].
    levels: as in `scgd`; only their shapes matter, as the first update replaces
      them.
    batch_of: as in `scgd`.

  Returns:
    A solver, as in `scgd`.

  Raises:
    ValueError: if `levels` gives another number of values, or a constant
      `tracking` is not in [0, 1].

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> solver = bj.solvers.scsc(
    ...   [lambda x, batch: x**2, lambda y, batch: (y - 4) ** 2],
    ...   main=optax.sgd(0.02), tracking=0.1, levels=lambda p: (p.main**2,),
    ... )
    >>> params = bj.sequences(main=jnp.float32(1.0))
    >>> state, step = solver.init(params), jax.jit(solver.update)
    >>> for _ in range(200):
    ...   updates, state = step(None, state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> print(params.main.round(2))
    2.0

  References:
    Chen, Sun and Yin, `Solving Stochastic Compositional Optimization is Nearly
    as Easy as Solving Stochastic Optimization
    <https://arxiv.org/abs/2008.10847>`_, 2020.
  """
  make = lambda of: oracles.compositional(functions, of=of, batch_of=batch_of)
  if len(functions) == 1:
    return descent.descend(make('main'), main=main)
  return descent.descend(
    evaluation.storm(make('levels'), tracking),
    make('main'),
    main=main,
    **_level_sequences(len(functions) - 1, levels, optax.sgd(1.0)),
  )


def nasa(
  functions: Sequence[Level],
  *,
  main: types.SequenceLike,
  tracking: types.ScalarOrSchedule,
  averaging: float,
  levels: Levels,
  batch_of: Callable[[Any, int], Any] | None = None,
) -> descent.Solver:
  r"""NASA: averages the gradient as well as the inner levels.

  .. math::
    z_{k+1} = (1 - a) \, z_k + a \, d^x_k, \qquad x_{k+1} = x_k - \alpha z_{k+1}

  with :math:`d^x` and the means of `scgd`. The average lets all steps be of one
  order without a correction. In a set, the step along :math:`z` is projected;
  the authors average towards a projected point.

  Args:
    functions: as in `scgd`.
    main: how :math:`x` moves, an optax optimiser or a `Sequence`.
    tracking: as in `scgd`.
    averaging: :math:`a` in (0, 1].
    levels: as in `scgd`.
    batch_of: as in `scgd`.

  Returns:
    A solver, as in `scgd`.

  Raises:
    ValueError: if `levels` gives another number of values.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> solver = bj.solvers.nasa(
    ...   [lambda x, batch: x**2, lambda y, batch: (y - 4) ** 2],
    ...   main=optax.sgd(0.02), tracking=0.5, averaging=0.5,
    ...   levels=lambda p: (p.main**2,),
    ... )
    >>> params = bj.sequences(main=jnp.float32(1.0))
    >>> state, step = solver.init(params), jax.jit(solver.update)
    >>> for _ in range(400):
    ...   updates, state = step(None, state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> print(params.main.round(2))
    2.0

  References:
    Ghadimi, Ruszczynski and Wang, `A Single Time-Scale Stochastic Approximation
    Method for Nested Stochastic Optimization
    <https://arxiv.org/abs/1812.01094>`_, 2018.
  """
  _checks.within('nasa', 'the averaging', averaging, 0, 1, open_low=True)
  record = types.as_sequence(main, 'main')
  mean = optax.ema(1 - averaging, debias=False)
  return scgd(
    functions,
    main=record._replace(optimiser=optax.chain(mean, record.optimiser)),
    tracking=tracking,
    levels=levels,
    batch_of=batch_of,
  )
