"""The hypergradient through the steps of an inner optimiser."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import ad_checkpoint

from bilevel_jax import _checks, _sequences, _trees, states, types
from bilevel_jax.oracles import _objectives, base
from bilevel_jax.projections import _set

_SLOPE = 'bilevel_jax.unrolled.slope'  # Saved for the backward pass by `mixed`.


def _varying_like(tree: Any, *others: Any) -> Any:
  """Casts a tree to the types that a scan over values of others gives."""
  axes = frozenset().union(
    *(_sequences.varying_axes(leaf) for leaf in jax.tree.leaves(others))
  )
  return jax.tree.map(lambda leaf: _sequences.vary(leaf, axes), tree)


def _first_lower(start, params, batch):
  """The start of the inner loop, in the dtypes of the lower variable."""
  first = params.lower if start is None else start(params, batch)
  expected: Any = jax.tree.structure(params.lower)
  structure: Any = jax.tree.structure(first)
  shapes = lambda tree: [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]
  if expected != structure or shapes(first) != shapes(params.lower):
    raise ValueError(
      f'unrolled: start gives {structure} of the shapes {shapes(first)}, but '
      f'the lower variable is {expected} of {shapes(params.lower)}.'
    )
  return _trees.cast_like(first, params.lower)


def _value_and_slope(loss, x, y):
  """The loss with its auxiliary outputs, and the slope in y."""
  return jax.value_and_grad(loss, 1, has_aux=True)(x, y)


def _value_and_mixed_slope(loss, x, y):
  """The same, where the derivative of the slope is one forward product.

  Second derivatives are symmetric: a row times the Jacobian of the slope is the
  derivative of the gradient along that row. So the residuals of the slope need
  not be saved. The value is not differentiated.
  """
  # The rule must not close over traced values: all other inputs of the loss,
  # data of any dtype, become an argument.
  traced, shape = jax.make_jaxpr(loss, return_shape=True)(x, y)

  def explicit_loss(read, x, y):
    flat = jax.core.eval_jaxpr(traced.jaxpr, read, *jax.tree.leaves((x, y)))
    return jax.tree.unflatten(jax.tree.structure(shape), flat)

  plain = jax.value_and_grad(explicit_loss, 2, has_aux=True)

  def forth(read, x, y):
    return plain(read, x, y), (read, x, y)

  def back(saved, cotangents):
    read, x, y = saved
    both = jax.grad(explicit_loss, (1, 2), has_aux=True)
    gradient = lambda y: both(read, x, y)[0]
    _, along = jax.jvp(gradient, (y,), (cotangents[1],))
    return None, *along

  rule = jax.custom_vjp(plain)
  rule.defvjp(forth, back)
  measured, slope = rule(traced.consts, x, y)
  return measured, ad_checkpoint.checkpoint_name(slope, _SLOPE)


def _move(solver, slope, state, y):
  """One step of an optimiser to (y, state); raises TypeError if it cannot."""
  try:
    updates, state = solver.update(slope, state, y)
  except TypeError as error:
    if 'required keyword-only argument' not in str(error):
      raise
    raise TypeError(
      f'unrolled: the optimiser of lower needs more than a gradient ({error}): '
      'use an optimiser without a line search, for instance optax.adam(rate) '
      'or optax.lbfgs(rate, linesearch=None).'
    ) from error
  return optax.apply_updates(y, updates), state


def _run(step, x, carry, times):
  """Runs the steps at these times."""
  one = lambda carry, t: (step(x, carry, t), None)
  return jax.lax.scan(one, carry, times)[0]


def _run_in_segments(step, length, x, carry, times):
  """Runs the steps in segments that the backward pass computes again."""
  run = functools.partial(_run, step)
  segments, rest = np.split(times, [times.size - times.size % length])
  segment = jax.checkpoint(run, prevent_cse=False)  # The scan prevents CSE.
  carry = _run(segment, x, carry, segments.reshape(-1, length))
  return jax.checkpoint(run)(x, carry, rest) if rest.size else carry


def _size(params: Any) -> int:
  return sum(jnp.size(leaf) for leaf in jax.tree.leaves(params.upper))


def unrolled(
  problem: types.BilevelProblem,
  *,
  lower: types.SequenceLike,
  objectives: int | Sequence[str] | None = None,
  mode: str = 'reverse',
  truncate: int | None = None,
  start: Callable[[Any, Any], Any] | None = None,
  checkpoint: int | None = None,
  accumulator_dtype: Any = jnp.float32,
) -> base.Oracle:
  r"""The upper gradient through inner steps on the lower loss.

  .. math::
    \nabla_x \, f(x, y_T(x)), \qquad
    y_{t+1} = \Pi_U \left[ y_t + u(\nabla_y g(x, y_t)) \right], \quad
    t = 0, \dots, T - 1

  where :math:`u` is an optimiser. The result is the gradient of the computed
  steps, whether or not the inner loop has converged. As T grows, it approaches
  the hypergradient at the minimiser that the loop finds. With `truncate`, only
  the last K steps are differentiated: time and memory fall by T / K. The error
  falls geometrically with K if the lower loss is strongly convex.

  Args:
    problem: the upper and the lower loss.
    lower: any optax optimiser, in a record with T `steps`, their batches and
      the set of the lower variable. Each update starts with new moments. An
      optimiser that divides by a root needs a constant under the root, for
      instance `optax.adam(rate, eps_root=1e-8)`; otherwise its derivative may
      not be finite.
    objectives: None for one upper loss. For several, their number or names;
      `problem.upper` then gives an array (objectives,), and the oracle gives a
      `Jacobian` with a row for each to an aggregator.
    mode: `reverse` runs backwards and saves the residuals of the K gradients.
      `mixed` gives the same gradient for large models: it saves the lower
      variable, the optimiser's state and the slope of each step, and
      differentiates a slope by one forward product with the gradient. For a
      decoder of four layers and 8 steps of Adam it takes about 0.15 of the
      memory and 0.6 of the time. It needs symmetric second derivatives; a loss
      with a custom derivative, for instance for clipping, needs `reverse`.
      `forward` takes one Hessian-vector product per step and per coordinate of
      the upper variable, for a few coordinates and many steps.
    truncate: the number :math:`K` of last steps that are differentiated; None
      or a number above :math:`T` for all steps.
    start: the first lower variable, from (parameters, batch); by default that
      of the record, or else the current lower variable (a warm start). Unless
      truncated, its derivative in the upper variable is included. With
      `lambda params, batch: params.upper` the upper variable is the start.
    checkpoint: for `reverse` and `mixed`, save only after each segment of this
      many steps and compute the other steps again; about the root of K needs
      the least memory.
    accumulator_dtype: the narrowest dtype of the sum over steps that is the
      gradient in the upper variable. The result has the variable's dtype.

  Returns:
    An oracle for the sequences `upper` and `lower`. The gradient of `lower` is
    its displacement :math:`y - y_T`, so that `optax.sgd(1.0)` for `lower` moves
    to the end of the inner loop. It measures `upper` at the end and `lower` at
    the last inner step, with their outputs. With `objectives`, the upper losses
    have their names, and the displacement is not weighted. For each upper loss,
    each differentiated step counts as one Hessian-vector product in `reverse`
    and `mixed`, and as one per upper coordinate in `forward`. Steps that
    `checkpoint` computes twice count as two gradients.

  Raises:
    ValueError: if a number of steps is below 1, the mode is unknown,
      `checkpoint` is combined with `forward`, or an objective is named `lower`;
      at the call, if `start` gives another structure or shape than the lower
      variable.
    TypeError: at the call, if the optimiser needs more than a gradient, for
      instance for a line search.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp, optax
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: y**2 / 2,
    ...   lower=lambda x, y, batch: (y - x) ** 2 / 2,
    ... )
    >>> params = bj.BilevelParams(jnp.float32(4.0), jnp.float32(0.0))
    >>> twice = bj.Sequence(optax.sgd(0.5), steps=2)
    >>> link = bj.unrolled(problem, lower=twice)
    >>> gradients, _ = link.update(None, link.init(params), params)
    >>> print(gradients.upper, gradients.lower)  # y_2 = 3 x / 4
    2.25 -3.0

  References:
    Franceschi, Donini, Frasconi and Pontil, `Forward and Reverse
    Gradient-Based Hyperparameter Optimization
    <https://arxiv.org/abs/1703.01785>`_, 2017.

    Shaban, Cheng, Hatch and Boots, `Truncated Back-propagation for Bilevel
    Optimization <https://arxiv.org/abs/1810.10667>`_, 2019.

    Kemaev, Calian, Zintgraf, Farquhar and van Hasselt, `Scalable Meta-Learning
    via Mixed-Mode Differentiation <https://arxiv.org/abs/2505.00793>`_, 2025.
  """
  low = types.as_sequence(lower, 'lower')
  lower_set, pick = low.set, low.batch_at or (lambda batch, t: batch)
  if start is None and (low.start is None) is low.restart:
    raise ValueError(
      'unrolled: set both a start of the inner loop and restart=True, or '
      'neither to continue from the lower variable.'
    )
  if start is None and (own := low.start) is not None:
    start = lambda params, batch: own(params)
  steps = last = low.steps
  if truncate is not None:
    what = 'last steps, truncate,'
    last = min(_checks.whole_number('unrolled', what, truncate), steps)
  if checkpoint is not None:
    what = 'steps for each checkpoint'
    segment = min(_checks.whole_number('unrolled', what, checkpoint), last)
  if mode not in ('reverse', 'mixed', 'forward'):
    raise ValueError(
      f"unrolled: mode is 'reverse', 'mixed' or 'forward', got {mode!r}."
    )
  if mode == 'forward' and checkpoint is not None:
    raise ValueError(
      "unrolled: checkpoint is for the modes 'reverse' and 'mixed': leave it "
      "out for 'forward', which saves no states."
    )
  _set.require_projection(lower_set, 'unrolled')
  above: Any
  above, below = base.checked_losses(problem)
  several: Any = None
  if objectives is not None:
    above = several = _objectives.make_objectives(
      'unrolled', problem.upper, objectives, reserved=('lower',)
    )
  solver = optax.with_extra_args_support(low.optimiser)
  wanted = base.outputs_only(problem, 'lower') or (lambda params: {})

  def fn(params, batch, inner):
    zero = jnp.zeros([], _trees.widest_dtype(params))
    announced = wanted(params)
    same = lambda tree: _varying_like(tree, params, batch)
    narrow = lambda x: _trees.cast_like(x, params.upper)

    def begin(x):
      y = same(_first_lower(start, params._replace(upper=narrow(x)), batch))
      fresh = states.at_update(solver.init(y), inner.count)
      return y, same(fresh), same((zero, announced))

    def step(measure, x, carry, t):
      y, state, (before, _) = carry

      def loss(x, y):
        value, aux = below.full(x, y, pick(batch, t))
        return value, {'lower': aux} if announced else {}

      (value, aux), slope = measure(loss, narrow(x), y)
      y, after = _move(solver, slope, state, y)
      # All steps of an update use the same value of a schedule.
      state = states.hold_updates(after, state)
      if lower_set is not None:
        # Bounds of a wider dtype would widen the carry of the scan.
        y = _trees.cast_like(lower_set(y), y)
      aux = base.as_announced(aux, announced)
      # Measurements are not differentiated.
      last_step = (value.astype(before.dtype), aux)
      return y, state, jax.lax.stop_gradient(last_step)

    plain = functools.partial(step, _value_and_slope)
    one: Any = plain
    if mode == 'mixed':
      keep = jax.checkpoint_policies.save_only_these_names(_SLOPE)
      one = jax.checkpoint(
        functools.partial(step, _value_and_mixed_slope),
        policy=keep,
        prevent_cse=False,
      )
    run: Any = functools.partial(_run, one)
    if checkpoint is not None:
      run = functools.partial(_run_in_segments, one, segment)
    times = np.arange(steps, dtype=np.int32)
    fixed, moving = times[: steps - last], times[steps - last :]
    # The derivative is summed over steps in the dtype of x, so x is widened.
    sums = _trees.accumulator_like(params.upper, accumulator_dtype)
    x = _trees.cast_like(params.upper, sums)
    first = None
    if fixed.size:
      first = jax.lax.stop_gradient(_run(plain, x, begin(x), fixed))

    def through(x):
      carry = begin(x) if first is None else first
      y, _, last_step = run(x, carry, moving)
      height, aux = above.full(narrow(x), y, batch)
      return height, (height, aux, y, last_step)

    if mode == 'forward':
      slope, measured = jax.jacfwd(through, has_aux=True)(x)
    elif several is None:
      slope, measured = jax.grad(through, has_aux=True)(x)
    else:
      slope, measured = _objectives.jacobian(through, x)
    height, aux, y, (value, lower_aux) = measured
    slope = narrow(slope)
    back = jax.tree.map(lambda one, two: one - two, params.lower, y)
    after = inner.next()
    more = base.requested_outputs(problem, upper=aux, **lower_aux)
    if several is None:
      gradients = type(params)(upper=slope, lower=back)
      return (height, value), gradients, after, *more
    rows = type(params)(upper=slope, lower=None)
    jacobian = types.Jacobian(rows, {'lower': back}, height)
    return (*height, value), jacobian, after, *more

  names = (*(several.names if several else ('upper',)), 'lower')

  def cost(params):
    columns = _size(params) if mode == 'forward' else len(names) - 1
    again = last if checkpoint is not None else 0
    return {
      'gradients/upper': len(names) - 1,
      'gradients/lower': steps + again,
      'hessian_vector_products/lower': last * columns,
    }

  return base.oracle(
    fn,
    names,
    states.no_updates,
    counts=cost,
    moves=('upper', 'lower'),
    outputs=problem.outputs,
  )
