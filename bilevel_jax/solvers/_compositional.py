"""Compositions of expectations: SCGD, SCSC, NASA, at any number of levels."""

from collections.abc import Callable, Sequence
from typing import Any

import optax

from bilevel_jax import combinators, evaluation, oracles, projections, types
from bilevel_jax.oracles import _compositional
from bilevel_jax.solvers import _pbgd

Levels = Callable[[Any], Sequence[Any]]


def _with_levels(solver, functions, levels):
  """Keeps the levels' sequences in state."""
  names = _compositional.level_names(len(functions) - 1)

  def start(n):
    def make(params):
      values = tuple(levels(params))
      if len(values) != len(names):
        raise ValueError(
          f'{len(functions)} functions have {len(names)} inner levels, but '
          f'`levels` gives {len(values)} values.'
        )
      return values[n]

    return make

  starts = {name: start(n) for n, name in enumerate(names)}
  return combinators.auxiliary(solver, **starts)


def scgd(
  functions: Sequence[_compositional.Level],
  *,
  main: optax.GradientTransformation,
  tracking: types.ScalarOrSchedule,
  levels: Levels,
  main_set: projections.Projection | None = None,
  batch_of: Callable[[Any, int], Any] = _compositional.same_batch,
  wrap: _pbgd.Wrapper = _pbgd.same,
) -> optax.GradientTransformationExtraArgs:
  r"""SCGD: running means of the inner levels, the chain rule at them.

  .. math::
    y^n_{k+1} &= (1 - \beta) \, y^n_k + \beta f^{n-1}(y^{n-1}_k; \xi_k),
      \qquad y^0 = x \\
    x_{k+1} &= x_k - \alpha \nabla f^0(x_k)^\top \nabla f^1(y^1_k)^\top
      \cdots \nabla f^N(y^N_k)

  Args:
    functions: :math:`f^0, \dots, f^N` of (value of the level below, batch).
    main: optimiser of :math:`x`.
    tracking: :math:`\beta` in (0, 1], a constant or a schedule.
    levels: the running means at the start, :math:`N` of them, from the
      parameters; values of the functions at the start, or zeros.
    main_set: projects :math:`x`.
    batch_of: what level n sees, from (batch, n); by default the whole batch.
    wrap: wraps each oracle.

  Returns:
    A solver for a NamedTuple with the sequence `main`, made by
    `bj.sequences(main=x)`; `bj.auxiliaries` gives the running means.

  Raises:
    ValueError: if `levels` gives another number of values.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> solver = bj.scgd(
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
  names = _compositional.level_names(len(functions) - 1)
  follow = {name: optax.sgd(tracking) for name in names}
  solver = optax.chain(
    wrap(oracles.compositional(functions, batch_of=batch_of)),
    combinators.per_sequence(main=main, **follow),
    projections.project(main=main_set),
  )
  return _with_levels(solver, functions, levels)


def scsc(
  functions: Sequence[_compositional.Level],
  *,
  main: optax.GradientTransformation,
  tracking: types.ScalarOrSchedule,
  levels: Levels,
  main_set: projections.Projection | None = None,
  batch_of: Callable[[Any, int], Any] = _compositional.same_batch,
  wrap: _pbgd.Wrapper = _pbgd.same,
) -> optax.GradientTransformationExtraArgs:
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
    main: optimiser of :math:`x`.
    tracking: :math:`\beta` in (0, 1].
    levels: as in `scgd`; only their shapes matter, as the first update replaces
      them.
    main_set: projects :math:`x`.
    batch_of: as in `scgd`.
    wrap: wraps each oracle.

  Returns:
    A solver, as in `scgd`.

  Raises:
    ValueError: if `levels` gives another number of values, or a constant
      `tracking` is not in [0, 1].

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> solver = bj.scsc(
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
  names = _compositional.level_names(len(functions) - 1)
  make = lambda of: wrap(
    oracles.compositional(functions, of=of, batch_of=batch_of)
  )
  descend = optax.chain(
    make('main'),
    combinators.per_sequence(main=main),
    projections.project(main=main_set),
  )
  if not names:
    return descend
  like = lambda params: params._replace(main=None)
  follow = optax.chain(
    evaluation.storm(make('levels'), tracking, like=like),
    combinators.per_sequence(**{name: optax.sgd(1.0) for name in names}),
  )
  return _with_levels(combinators.alternate(follow, descend), functions, levels)


def nasa(
  functions: Sequence[_compositional.Level],
  *,
  main: optax.GradientTransformation,
  tracking: types.ScalarOrSchedule,
  averaging: float,
  levels: Levels,
  main_set: projections.Projection | None = None,
  batch_of: Callable[[Any, int], Any] = _compositional.same_batch,
  wrap: _pbgd.Wrapper = _pbgd.same,
) -> optax.GradientTransformationExtraArgs:
  r"""NASA: averages the gradient as well as the inner levels.

  .. math::
    z_{k+1} = (1 - a) \, z_k + a \, d^x_k, \qquad x_{k+1} = x_k - \alpha z_{k+1}

  with :math:`d^x` and the means of `scgd`. The average lets all steps be of one
  order without a correction.

  Args:
    functions: as in `scgd`.
    main: optimiser of :math:`x`; it gets the averaged gradient.
    tracking: as in `scgd`.
    averaging: :math:`a` in (0, 1].
    levels: as in `scgd`.
    main_set: projects :math:`x`.
    batch_of: as in `scgd`.
    wrap: wraps each oracle.

  Returns:
    A solver, as in `scgd`.

  Raises:
    ValueError: if `levels` gives another number of values.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> solver = bj.nasa(
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
  return scgd(
    functions,
    main=optax.chain(optax.ema(1 - averaging, debias=False), main),
    tracking=tracking,
    levels=levels,
    main_set=main_set,
    batch_of=batch_of,
    wrap=wrap,
  )
