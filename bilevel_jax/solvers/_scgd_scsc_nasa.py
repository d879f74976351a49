"""Compositions of expectations with any number of levels."""

from collections.abc import Callable, Sequence
from typing import Any

import optax

from bilevel_jax import _checks, descent, evaluation, oracles, types

Level = Callable[[Any, Any], Any]
Levels = Callable[[Any], Sequence[Any]]


def _level_sequences(count, levels, optimiser):
  """A record for each running mean, from a function to their start values."""

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
  r"""SCGD: the chain rule at running means of the inner levels.

  .. math::
    y^n_{k+1} &= (1 - \beta) \, y^n_k + \beta f^{n-1}(y^{n-1}_k; \xi_k),
      \qquad y^0 = x \\
    x_{k+1} &= x_k - \alpha \nabla f^0(x_k)^\top \nabla f^1(y^1_k)^\top
      \cdots \nabla f^N(y^N_k)

  All sequences move at once; the authors use the new means in the chain rule.

  Args:
    functions: :math:`f^0, \dots, f^N` of (value of the level below, batch).
    main: how :math:`x` moves, an optax optimiser or a `Sequence`.
    tracking: :math:`\beta` in (0, 1], a constant or a schedule.
    levels: from the parameters to the :math:`N` running means at the start,
      for instance values of the functions, or zeros.
    batch_of: the batch of level n, from (batch, n); by default the whole batch.

  Returns:
    A solver for a NamedTuple with the sequence `main`, made by
    `bj.sequences(main=x)`; `bj.auxiliaries` gives the running means.

  Raises:
    ValueError: if `levels` gives another number of values.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp, optax
    >>> solver = bj.solvers.scgd(
    ...   [lambda x, batch: x**2, lambda y, batch: (y - 4) ** 2],
    ...   main=optax.sgd(0.01), tracking=0.5, levels=lambda p: (p.main**2,),
    ... )
    >>> params = bj.sequences(main=jnp.float32(1.0))
    >>> params, _ = bj.testing.run(solver, params, 200)
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
  r"""SCSC: corrected running means of the inner levels, then the main step.

  .. math::
    y^n_{k+1} = (1 - \beta) [ y^n_k + f^{n-1}(y^{n-1}_k; \xi_k)
      - f^{n-1}(y^{n-1}_{k-1}; \xi_k) ] + \beta f^{n-1}(y^{n-1}_k; \xi_k)

  The correction evaluates the same sample at two points and removes the lag, so
  that the tracking step may be of the order of the main step. It is `storm` on
  the difference of a level and its mean. The main sequence uses the new means.

  Args:
    functions: as in `scgd`.
    main: how :math:`x` moves, an optax optimiser or a `Sequence`.
    tracking: :math:`\beta` in (0, 1].
    levels: as in `scgd`; the first update replaces the values.
    batch_of: as in `scgd`.

  Returns:
    A solver, as in `scgd`.

  Raises:
    ValueError: if `levels` gives another number of values, or a constant
      `tracking` is not in [0, 1].

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp, optax
    >>> solver = bj.solvers.scsc(
    ...   [lambda x, batch: x**2, lambda y, batch: (y - 4) ** 2],
    ...   main=optax.sgd(0.02), tracking=0.1, levels=lambda p: (p.main**2,),
    ... )
    >>> params = bj.sequences(main=jnp.float32(1.0))
    >>> params, _ = bj.testing.run(solver, params, 200)
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

  with :math:`d^x` and the means of `scgd`. With the average, all steps may be
  of one order without a correction. With a set, the step along :math:`z` is
  projected; the authors average towards a projected point.

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
    >>> import bilevel_jax as bj, jax.numpy as jnp, optax
    >>> solver = bj.solvers.nasa(
    ...   [lambda x, batch: x**2, lambda y, batch: (y - 4) ** 2],
    ...   main=optax.sgd(0.02), tracking=0.5, averaging=0.5,
    ...   levels=lambda p: (p.main**2,),
    ... )
    >>> params = bj.sequences(main=jnp.float32(1.0))
    >>> params, _ = bj.testing.run(solver, params, 400)
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
