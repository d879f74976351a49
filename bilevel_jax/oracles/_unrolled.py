"""The hypergradient through the steps of an inner optimiser."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _sequences, _trees, projections, types
from bilevel_jax.oracles import base


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
  return jax.tree.map(
    lambda one, two: jnp.asarray(one, jnp.asarray(two).dtype),
    first,
    params.lower,
  )


def _check_steps(steps: Any, truncate: Any, checkpoint: Any) -> None:
  for name, number, optional in (
    ('steps', steps, False),
    ('truncate', truncate, True),
    ('checkpoint', checkpoint, True),
  ):
    if number is None and optional:
      continue
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
      raise ValueError(
        f'unrolled takes a whole number {name} >= 1, got {number}.'
      )


def _size(params: Any) -> int:
  return sum(jnp.size(leaf) for leaf in jax.tree.leaves(params.upper))


def unrolled(
  problem: types.BilevelProblem,
  *,
  lower: optax.GradientTransformation,
  steps: int,
  mode: str = 'reverse',
  truncate: int | None = None,
  start: Callable[[Any, Any], Any] | None = None,
  checkpoint: int | None = None,
  inner_batch: Callable[[Any, Any], Any] | None = None,
  lower_set: projections.Projection | None = None,
) -> optax.GradientTransformationExtraArgs:
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
    lower: any optax optimiser; its state begins anew in each update. One that
      divides by a root needs a constant under it for its derivative to be
      finite, `optax.adam(rate, eps_root=1e-8)` for instance.
    steps: inner steps :math:`T`, at least 1.
    mode: `reverse` runs the trajectory backwards, with the memory of K steps;
      `forward` carries the derivative along, one Hessian-vector product a step
      and coordinate of the upper variable: for a few coordinates and many
      steps.
    truncate: differentiate the last :math:`K` steps only; None, or any number
      of steps from :math:`T` on, for all of them.
    start: the first lower variable, from (parameters, batch); by default the
      lower variable as it is (a warm start). What it takes from the upper
      variable is differentiated, unless truncated: with
      `lambda params, batch: params.upper` the upper variable is the start.
    checkpoint: for `reverse`, keep the state only every so many steps, and
      compute the others a second time; about the root of K needs least memory.
    inner_batch: the batch of inner step t, from (batch, t), t an int32 scalar;
      by default the whole batch.
    lower_set: projects the lower variable after each inner step.

  Returns:
    An oracle for the sequences `upper` and `lower`. The gradient of `lower` is
    its displacement, :math:`y - y_T`: behind it, `optax.sgd(1.0)` for `lower`
    moves to the end of the trajectory. It measures `upper` at the end and
    `lower` at the last inner step. Each step differentiated counts as one
    Hessian-vector product in `reverse`, and as one for each upper coordinate in
    `forward`; steps computed twice count as two gradients.

  Raises:
    ValueError: if a number of steps is below 1, the mode is unknown,
      `checkpoint` is given with `forward`, or at the call, if `start` gives
      another structure or shape than the lower variable's.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp, optax
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: y**2 / 2,
    ...   lower=lambda x, y, batch: (y - x) ** 2 / 2,
    ... )
    >>> params = bj.BilevelParams(jnp.float32(4.0), jnp.float32(0.0))
    >>> link = bj.unrolled(problem, lower=optax.sgd(0.5), steps=2)
    >>> gradients, _ = link.update(None, link.init(params), params)
    >>> print(gradients.upper, gradients.lower)  # y_2 = 3 x / 4
    2.25 -3.0

  References:
    Franceschi, Donini, Frasconi and Pontil, `Forward and Reverse
    Gradient-Based Hyperparameter Optimization
    <https://arxiv.org/abs/1703.01785>`_, 2017.

    Shaban, Cheng, Hatch and Boots, `Truncated Back-propagation for Bilevel
    Optimization <https://arxiv.org/abs/1810.10667>`_, 2019.
  """
  _check_steps(steps, truncate, checkpoint)
  if mode not in ('reverse', 'forward'):
    raise ValueError(f"mode is 'reverse' or 'forward', got {mode!r}.")
  if mode == 'forward' and checkpoint is not None:
    raise ValueError(
      'checkpoint is for the mode reverse: forward keeps one state only.'
    )
  above = base.Loss(problem.upper, 'upper')
  below = base.Loss(problem.lower, 'lower')
  solver = optax.with_extra_args_support(lower)
  pick = inner_batch or (lambda batch, t: batch)
  last = min(truncate or steps, steps)

  def step(x, batch, carry, t):
    y, state, _ = carry
    value, slope = jax.value_and_grad(below, 1)(x, y, pick(batch, t))
    updates, state = solver.update(slope, state, y)
    y = optax.apply_updates(y, updates)
    if lower_set is not None:
      # Bounds of a wider type would widen what the scan carries.
      y = jax.tree.map(lambda z, like: z.astype(like.dtype), lower_set(y), y)
    # A measurement, not a part of the derivative.
    value = jax.lax.stop_gradient(value).astype(carry[2].dtype)
    return (y, state, value), None

  def trajectory(x, batch, carry, first, count):
    """Runs `count` steps from step `first`."""
    times = first + jnp.arange(count, dtype=jnp.int32)
    one = lambda carry, t: step(x, batch, carry, t)
    return jax.lax.scan(one, carry, times)[0]

  def kept(x, batch, carry, first, count):
    """The same, in segments that are computed again on the way back."""
    if checkpoint is None or mode == 'forward':
      return trajectory(x, batch, carry, first, count)
    whole, rest = divmod(count, checkpoint)
    segment = jax.checkpoint(
      lambda x, carry, at: trajectory(x, batch, carry, at, checkpoint),
      prevent_cse=False,
    )
    starts = first + checkpoint * jnp.arange(whole, dtype=jnp.int32)
    carry, _ = jax.lax.scan(
      lambda carry, at: (segment(x, carry, at), None), carry, starts
    )
    if rest:
      at = first + checkpoint * whole
      carry = jax.checkpoint(
        lambda x, carry: trajectory(x, batch, carry, at, rest)
      )(x, carry)
    return carry

  def fn(params, batch, inner):
    _sequences.require_sequences(params, ('upper', 'lower'), 'unrolled')
    zero = jnp.zeros([], _trees.dtype_of(params))
    same = lambda tree: _varying_like(tree, params, batch)

    def begin(x):
      y = same(_first_lower(start, params._replace(upper=x), batch))
      return y, same(solver.init(y)), same(zero)

    x = params.upper
    held = None
    if last < steps:
      held = jax.lax.stop_gradient(
        trajectory(x, batch, begin(x), 0, steps - last)
      )

    def end(x):
      carry = begin(x) if held is None else held
      y, _, value = kept(x, batch, carry, steps - last, last)
      return y, value

    def through(x):
      y, value = end(x)
      height = above(x, y, batch)
      return height, (height, y, value)

    differentiate = jax.grad if mode == 'reverse' else jax.jacfwd
    slope, (height, y, value) = differentiate(through, has_aux=True)(x)
    slope = jax.tree.map(lambda s, leaf: s.astype(leaf.dtype), slope, x)
    back = jax.tree.map(lambda one, two: one - two, params.lower, y)
    return (height, value), type(params)(upper=slope, lower=back), inner

  def cost(params):
    columns = 1 if mode == 'reverse' else _size(params)
    again = last if checkpoint is not None else 0
    return {
      'gradients/upper': 1,
      'gradients/lower': steps + again,
      'hessian_vector_products/lower': last * columns,
    }

  return base.oracle(fn, ('upper', 'lower'), counts=cost)
