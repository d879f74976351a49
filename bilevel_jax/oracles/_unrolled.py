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
from bilevel_jax.oracles import _multi_objective, base
from bilevel_jax.projections import _set

_SLOPE = 'bilevel_jax.unrolled.slope'  # What mixed mode keeps of a step.


def _varying_like(tree: Any, *others: Any) -> Any:
  """A tree of the types that a scan over values from others will give."""
  axes = frozenset().union(
    *(_sequences.varying_axes(leaf) for leaf in jax.tree.leaves(others))
  )
  return jax.tree.map(lambda leaf: _sequences.vary(leaf, axes), tree)


def _first_lower(start, params, batch):
  """Where the inner trajectory begins, with the lower variable's dtypes."""
  first = params.lower if start is None else start(params, batch)
  ours: Any = jax.tree.structure(params.lower)
  theirs: Any = jax.tree.structure(first)
  shapes = lambda tree: [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]
  if ours != theirs or shapes(first) != shapes(params.lower):
    raise ValueError(
      f'unrolled: start gives {theirs} of the shapes {shapes(first)}, but the '
      f'lower variable is {ours} of {shapes(params.lower)}.'
    )
  return _trees.as_dtypes_of(first, params.lower)


def _value_and_slope(loss, x, y):
  """The loss with its auxiliary outputs, and its slope in y."""
  return jax.value_and_grad(loss, 1, has_aux=True)(x, y)


def _value_and_mixed_slope(loss, x, y):
  """The same, but a derivative of the slope is one forward product.

  Second derivatives are symmetric: a row times the Jacobian of the slope is the
  derivative of the whole gradient along that row. So nothing of what the slope
  was computed from has to be kept. The value is measured, not differentiated.
  """
  # The rule must not close over traced values: all that the loss reads beside
  # x and y, data of any dtype among it, becomes an argument.
  traced, shape = jax.make_jaxpr(loss, return_shape=True)(x, y)

  def loss_of(read, x, y):
    flat = jax.core.eval_jaxpr(traced.jaxpr, read, *jax.tree.leaves((x, y)))
    return jax.tree.unflatten(jax.tree.structure(shape), flat)

  plain = jax.value_and_grad(loss_of, 2, has_aux=True)

  def forth(read, x, y):
    return plain(read, x, y), (read, x, y)

  def back(saved, cotangents):
    read, x, y = saved
    both = jax.grad(loss_of, (1, 2), has_aux=True)
    gradient = lambda y: both(read, x, y)[0]
    _, along = jax.jvp(gradient, (y,), (cotangents[1],))
    return None, *along

  rule = jax.custom_vjp(plain)
  rule.defvjp(forth, back)
  measured, slope = rule(traced.consts, x, y)
  return measured, ad_checkpoint.checkpoint_name(slope, _SLOPE)


def _move(solver, slope, state, y):
  """One step of an optimiser: (y, state), or why it cannot be one here."""
  try:
    updates, state = solver.update(slope, state, y)
  except TypeError as error:
    if 'required keyword-only argument' not in str(error):
      raise
    raise TypeError(
      f'unrolled: the update of lower asks for more than a gradient ({error}): '
      'take an optimiser without a line search that moves by the gradient '
      'alone, such as optax.adam(rate) or optax.lbfgs(rate, linesearch=None).'
    ) from error
  return optax.apply_updates(y, updates), state


def _run(step, x, carry, times):
  """Steps at these times, from a carry to a carry."""
  one = lambda carry, t: (step(x, carry, t), None)
  return jax.lax.scan(one, carry, times)[0]


def _run_in_segments(step, length, x, carry, times):
  """The same, in segments that are computed again on the way back."""
  run = functools.partial(_run, step)
  whole, rest = np.split(times, [times.size - times.size % length])
  segment = jax.checkpoint(run, prevent_cse=False)  # The scan prevents it.
  carry = _run(segment, x, carry, whole.reshape(-1, length))
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
  r"""The upper gradient through an inner optimisation of the lower loss.

  .. math::
    \nabla_x \, f(x, y_T(x)), \qquad
    y_{t+1} = \Pi_U \left[ y_t + u(\nabla_y g(x, y_t)) \right], \quad
    t = 0, \dots, T - 1

  where :math:`u` is an optimiser. The result is the gradient of what was
  computed, whether or not the inner loop has converged; as T grows it becomes
  the hypergradient at the minimiser that the loop finds. With `truncate`, the
  steps before the last K are held fixed: the error falls geometrically with K
  where the lower loss is strongly convex, and so do time and memory with T / K.

  Args:
    problem: the upper and the lower loss.
    lower: any optax optimiser, in a record with T `steps`, their batches and
      the set of the lower variable. Each update begins with new moments. One
      that divides by a root needs a constant under it for its derivative to be
      finite, `optax.adam(rate, eps_root=1e-8)` for instance.
    objectives: None for one upper loss; else their number, or their names,
      where `problem.upper` gives an array (objectives,): then the oracle gives
      a `Jacobian`, a row for each, to an aggregator.
    mode: `reverse` runs the trajectory backwards, and keeps all that the K
      gradients were computed from. `mixed` gives the same gradient for large
      models: it keeps the lower variable, the optimiser's state and the slope
      of each step, and goes back through a slope by one forward product with
      the gradient. For a decoder of four layers and 8 steps of Adam it takes
      about .15 of the memory and .6 of the time. It needs second derivatives
      that are symmetric, as true ones are: a loss that changes its derivative
      by a rule of its own, to clip it for instance, is for `reverse`. `forward`
      carries the derivative along, one Hessian-vector product a step and
      coordinate of the upper variable: for a few coordinates and many steps.
    truncate: differentiate the last :math:`K` steps only; None, or any number
      of steps from :math:`T` on, for all of them.
    start: the first lower variable, from (parameters, batch); by default that
      of the record, or else the lower variable as it is (a warm start). What it
      takes from the upper variable is differentiated, unless truncated: with
      `lambda params, batch: params.upper` the upper variable is the start.
    checkpoint: for `reverse` and `mixed`, keep what they keep only at every so
      many steps, and compute the steps between a second time; about the root of
      K needs least memory.
    accumulator_dtype: at least this wide is the sum over steps that is the
      gradient in the upper variable; it comes out in the variable's dtype.

  Returns:
    An oracle for the sequences `upper` and `lower`. The gradient of `lower` is
    its displacement, :math:`y - y_T`: behind it, `optax.sgd(1.0)` for `lower`
    moves to the end of the trajectory. It measures `upper` at the end and
    `lower` at the last inner step, with their outputs. With `objectives`, the
    upper losses have their names, and no weight touches the displacement. For
    each upper loss, each step differentiated counts as one Hessian-vector
    product in `reverse` and `mixed`, and as one for each upper coordinate in
    `forward`; steps that `checkpoint` has computed twice count as two
    gradients.

  Raises:
    ValueError: if a number of steps is below 1, the mode is unknown,
      `checkpoint` is given with `forward`, or at the call, if `start` gives
      another structure or shape than the lower variable's.
    TypeError: at the call, if the optimiser asks for more than a gradient, for
      a line search for instance.

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
      'unrolled: a start of the inner loop and restart=True go together; '
      'without both, the loop goes on from the lower variable.'
    )
  if start is None and (own := low.start) is not None:
    start = lambda params, batch: own(params)
  steps = last = low.steps
  if truncate is not None:
    what = 'last steps, truncate,'
    last = min(_checks.whole('unrolled', what, truncate), steps)
  if checkpoint is not None:
    what = 'steps for each checkpoint'
    segment = min(_checks.whole('unrolled', what, checkpoint), last)
  if mode not in ('reverse', 'mixed', 'forward'):
    raise ValueError(
      f"unrolled: mode is 'reverse', 'mixed' or 'forward', got {mode!r}."
    )
  if mode == 'forward' and checkpoint is not None:
    raise ValueError(
      "unrolled: checkpoint is for the modes 'reverse' and 'mixed'; leave it "
      "out for 'forward', which keeps one state only."
    )
  _set.require_projection(lower_set, 'unrolled')
  several = None
  if objectives is not None:
    several = _multi_objective.make_objectives(
      'unrolled', problem.upper, objectives, (), None, False
    )
  above = several or base.Loss(problem.upper, 'upper')
  below = base.Loss(problem.lower, 'lower')
  solver = optax.with_extra_args_support(low.optimiser)
  wanted = base.outputs_only(problem, 'lower') or (lambda params: {})

  def fn(params, batch, inner):
    zero = jnp.zeros([], _trees.dtype_of(params))
    announced = wanted(params)
    same = lambda tree: _varying_like(tree, params, batch)
    narrow = lambda x: _trees.as_dtypes_of(x, params.upper)

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
      # All steps of an update are at one point of a schedule.
      state = states.hold_updates(after, state)
      if lower_set is not None:
        # Bounds of a wider type would widen what the scan carries.
        y = _trees.as_dtypes_of(lower_set(y), y)
      aux = base.as_announced(aux, announced)
      # Measurements, not a part of the derivative.
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
    held, moving = times[: steps - last], times[steps - last :]
    # The derivative in x is summed over steps in the dtype of x: a wide copy.
    sums = _trees.accumulator_like(params.upper, accumulator_dtype)
    x = _trees.as_dtypes_of(params.upper, sums)
    first = None
    if held.size:
      first = jax.lax.stop_gradient(_run(plain, x, begin(x), held))

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
      slope, measured = _multi_objective.jacobian(through, x)
    height, aux, y, (value, lower_aux) = measured
    slope = narrow(slope)
    back = jax.tree.map(lambda one, two: one - two, params.lower, y)
    after = states.UpdateCount(optax.safe_increment(inner.count))
    more = base.outputs_of(problem, upper=aux, **lower_aux)
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
    lambda params: states.UpdateCount(_trees.zeros([], jnp.int32)),
    counts=cost,
    moves=('upper', 'lower'),
    outputs=problem.outputs,
  )
