"""Order: which solver moves first, how often, and with which optimiser.

Combinators make a solver from solvers. All of them return one displacement of
the parameters, so that what they make is again a gradient transformation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _sequences, types


def _add(a: Any, b: Any) -> Any:
  if a is None or b is None:
    return b if a is None else a
  return optax.tree.add(a, b)


def alternate(
  *solvers: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  r"""Gauss-Seidel order: each solver sees what the ones before it have moved.

  .. math::
    z^{(i+1)} = z^{(i)} + u_i(z^{(i)}), \qquad
    z^{(0)} = z_k, \quad z_{k+1} = z^{(n)}

  Args:
    *solvers: transformations that take a batch; each gets the same batch.

  Returns:
    A transformation to the sum of their updates; a sequence that none of them
    moves stays None.

  Raises:
    ValueError: without a solver.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp, optax
    >>> first = optax.chain(
    ...   bj.gradient(lambda p, batch: p.a**2 / 2, name='a', of='a'),
    ...   bj.per_sequence(a=optax.sgd(1.0)),
    ... )
    >>> second = optax.chain(
    ...   bj.gradient(lambda p, b: (p.b - p.a) ** 2 / 2, name='b', of='b'),
    ...   bj.per_sequence(b=optax.sgd(1.0)),
    ... )
    >>> params = bj.sequences(a=jnp.float32(4.0), b=jnp.float32(1.0))
    >>> solver = bj.alternate(first, second)
    >>> updates, _ = solver.update(None, solver.init(params), params)
    >>> print(updates.a, updates.b)  # b moves to the new a, which is 0
    -4.0 -1.0
  """
  if not solvers:
    raise ValueError('alternate takes at least one solver.')
  parts = [optax.with_extra_args_support(solver) for solver in solvers]

  def init_fn(params):
    return tuple(part.init(params) for part in parts)

  def update_fn(batch, state, params=None, **extra_args):
    here, total, states = params, None, []
    for part, part_state in zip(parts, state, strict=True):
      updates, part_state = part.update(batch, part_state, here, **extra_args)
      here = _sequences.apply_updates(here, updates)
      states.append(part_state)
      if total is None:
        total = updates
      elif _sequences.is_sequences(params):
        total = type(params)(*map(_add, total, updates))
      else:
        total = optax.tree.add(total, updates)
    return total, tuple(states)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def repeat(
  solver: optax.GradientTransformation,
  steps: int,
  batch_at: Callable[[Any, Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""An inner loop: several steps of a solver as one displacement.

  .. math::
    z^{(t+1)} = z^{(t)} + u(z^{(t)}), \quad t = 0, \dots, T - 1, \qquad
    \text{updates} = z^{(T)} - z^{(0)}

  Args:
    solver: a transformation that takes a batch.
    steps: how many steps :math:`T`, at least 1; compiled once, as a scan.
    batch_at: the batch of step t, as a function of (batch, t); t is an int32
      scalar. By default each step gets the whole batch.

  Returns:
    A transformation to the displacement after all steps.

  Raises:
    ValueError: if `steps` is below 1.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp, optax
    >>> half = optax.chain(
    ...   bj.gradient(lambda z, batch: z**2 / 2), optax.sgd(0.5)
    ... )
    >>> solver = bj.repeat(half, 3)
    >>> params = jnp.float32(8.0)
    >>> updates, _ = solver.update(None, solver.init(params), params)
    >>> print(params + updates)
    1.0
  """
  if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
    raise ValueError(f'repeat takes a whole number of steps >= 1, got {steps}.')
  part = optax.with_extra_args_support(solver)
  pick = batch_at or (lambda batch, t: batch)

  def update_fn(batch, state, params=None, **extra_args):
    if steps == 1:
      now = pick(batch, jnp.int32(0))
      return part.update(now, state, params, **extra_args)
    # Filled while the body is traced: a fact of the structure.
    untouched: list[bool] = []

    def body(carry, t):
      here, part_state = carry
      updates, part_state = part.update(
        pick(batch, t), part_state, here, **extra_args
      )
      if _sequences.is_sequences(params):
        untouched[:] = [u is None for u in updates]
      return (_sequences.apply_updates(here, updates), part_state), None

    times = jnp.arange(steps, dtype=jnp.int32)
    (end, state), _ = jax.lax.scan(body, (params, state), times)
    if _sequences.is_sequences(params):
      moved = (
        None if still else optax.tree.sub(z, z0)
        for still, z, z0 in zip(untouched, end, params, strict=True)
      )
      return type(params)(*moved), state
    return optax.tree.sub(end, params), state

  return optax.GradientTransformationExtraArgs(part.init, update_fn)


class RepeatDrawnState(NamedTuple):
  """State of `repeat_drawn`.

  Attributes:
    key: of the next draw.
    inner: the state of the solver.
  """

  key: chex.PRNGKey
  inner: Any


def repeat_drawn(
  solver: optax.GradientTransformation,
  steps: int,
  weights: Callable[[Any], Any],
  *,
  key: chex.PRNGKey,
  batch_at: Callable[[Any, Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""An inner loop that ends at a point drawn from its trajectory.

  .. math::
    \text{updates} = z^{(\tau + 1)} - z^{(0)}, \qquad
    P(\tau = t) \propto w_t, \quad t = 0, \dots, T - 1

  All steps are taken, whatever is drawn, so that time and counts do not depend
  on chance.

  Args:
    solver: a transformation that takes a batch and moves all of its sequences.
    steps: how many steps :math:`T`, at least 1.
    weights: the weight :math:`w_t > 0` of the point after step t, from an int32
      array of all t to an array of the same shape.
    key: of the draws; it is kept in state and split at every update.
    batch_at: the batch of step t, from (batch, t), as in `repeat`.

  Returns:
    A transformation to the displacement to the drawn point. The state of the
    solver is the one after all steps.

  Raises:
    ValueError: if `steps` is below 1.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> half = optax.chain(
    ...   bj.gradient(lambda z, batch: z**2 / 2), optax.sgd(0.5)
    ... )
    >>> solver = bj.repeat_drawn(
    ...   half, 3, lambda t: (t == 1).astype(float), key=jax.random.key(0)
    ... )
    >>> params = jnp.float32(8.0)
    >>> updates, _ = solver.update(None, solver.init(params), params)
    >>> print(params + updates)
    2.0
  """
  if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
    raise ValueError(
      f'repeat_drawn takes a whole number of steps >= 1, got {steps}.'
    )
  part = optax.with_extra_args_support(solver)
  pick = batch_at or (lambda batch, t: batch)

  def init_fn(params):
    # A copy: the caller's key could not be donated with the state.
    return RepeatDrawnState(jnp.copy(key), part.init(params))

  def update_fn(batch, state, params=None, **extra_args):
    times = jnp.arange(steps, dtype=jnp.int32)
    following, now = jax.random.split(state.key)
    drawn = jax.random.categorical(now, jnp.log(weights(times)))
    untouched: list[bool] = []

    def body(carry, t):
      here, kept, part_state = carry
      updates, part_state = part.update(
        pick(batch, t), part_state, here, **extra_args
      )
      if _sequences.is_sequences(params):
        untouched[:] = [u is None for u in updates]
      here = _sequences.apply_updates(here, updates)
      kept = jax.tree.map(
        lambda new, old: jnp.where(t == drawn, new, old), here, kept
      )
      return (here, kept, part_state), None

    start = (params, params, state.inner)
    (_, kept, inner), _ = jax.lax.scan(body, start, times)
    state = RepeatDrawnState(following, inner)
    if not _sequences.is_sequences(params):
      return optax.tree.sub(kept, params), state
    moved = (
      None if still else optax.tree.sub(z, z0)
      for still, z, z0 in zip(untouched, kept, params, strict=True)
    )
    return type(params)(*moved), state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class AuxiliaryState(NamedTuple):
  """State of `auxiliary`.

  Attributes:
    sequences: the added sequences, by name.
    inner: the state of the solver, which sees them as parameters.
  """

  sequences: dict[str, Any]
  inner: Any


def auxiliary(
  solver: optax.GradientTransformation,
  *,
  restart: tuple[str, ...] = (),
  **inits: Callable[[Any], Any],
) -> optax.GradientTransformationExtraArgs:
  """Adds sequences that exist only to form a gradient, and keeps them in state.

  Args:
    solver: a transformation on the parameters' sequences and the added ones.
    restart: names of the added sequences that are made anew, from the
      parameters, at the start of every update; the others persist.
    **inits: by name, a function from the parameters to the sequence at the
      start.

  Returns:
    A transformation on the parameters without the added sequences.

  Raises:
    ValueError: if `restart` names a sequence that is not added, or if the
      parameters have a sequence of the same name.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp, optax
    >>> follow = optax.chain(
    ...   bj.gradient(
    ...     lambda p, b: (p.lower - p.average) ** 2 / 2, of='average'
    ...   ),
    ...   bj.per_sequence(average=optax.sgd(0.5)),
    ... )
    >>> solver = bj.auxiliary(follow, average=lambda params: params.lower)
    >>> params = bj.BilevelParams(jnp.float32(0.0), jnp.float32(1.0))
    >>> state = solver.init(params)
    >>> updates, state = solver.update(
    ...   None, state, params._replace(lower=jnp.float32(3.0))
    ... )
    >>> print(bj.auxiliaries(state)['average'], updates)
    2.0 BilevelParams(upper=None, lower=None)
  """
  part = optax.with_extra_args_support(solver)
  unknown = set(restart) - set(inits)
  if unknown:
    raise ValueError(
      f'restart names {sorted(unknown)}, but the added sequences are '
      f'{sorted(inits)}.'
    )

  def joint(params, added):
    _sequences.require_sequences(params, (), 'auxiliary')
    clash = set(params._fields) & set(added)
    if clash:
      raise ValueError(
        f'the parameters already have the sequences {sorted(clash)}: give the '
        'added ones other names.'
      )
    return types.sequences(**params._asdict(), **added)

  def init_fn(params):
    _sequences.require_sequences(params, (), 'auxiliary')
    # Copies: a buffer that params and state share could not be donated.
    added = {
      name: jax.tree.map(lambda x: jnp.array(x, copy=True), make(params))
      for name, make in inits.items()
    }
    return AuxiliaryState(added, part.init(joint(params, added)))

  def update_fn(batch, state, params=None, **extra_args):
    added = state.sequences | {name: inits[name](params) for name in restart}
    updates, inner = part.update(
      batch, state.inner, joint(params, added), **extra_args
    )
    moved = dict(added)
    for name in inits:
      if (move := getattr(updates, name)) is not None:
        moved[name] = optax.apply_updates(added[name], move)
    ours = _sequences.only(
      params, **{name: getattr(updates, name) for name in params._fields}
    )
    return ours, AuxiliaryState(moved, inner)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def per_sequence(
  **optimisers: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """One optimiser a sequence; a sequence without a gradient stays alone.

  Args:
    **optimisers: by name of a sequence, any optax transformation. Its state
      moves only in the steps in which the sequence has a gradient.

  Returns:
    A transformation from gradients to updates, sequence by sequence.

  Raises:
    TypeError: at the call, if the gradients are a `Jacobian` or another type
      than the parameters.
    ValueError: at the call, if a sequence has a gradient but no optimiser, or
      if the structure or a shape of a gradient is not its sequence's.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp, optax
    >>> link = bj.per_sequence(upper=optax.sgd(0.1), lower=optax.sgd(1.0))
    >>> params = bj.BilevelParams(jnp.float32(0.0), jnp.float32(0.0))
    >>> gradients = bj.BilevelParams(jnp.float32(1.0), None)
    >>> link.update(gradients, link.init(params), params)[0]
    BilevelParams(upper=Array(-0.1, dtype=float32), lower=None)
  """
  parts = {
    name: optax.with_extra_args_support(part)
    for name, part in optimisers.items()
  }

  def init_fn(params):
    _sequences.require_sequences(params, tuple(parts), 'per_sequence')
    return {
      name: part.init(getattr(params, name)) for name, part in parts.items()
    }

  def update_fn(gradients, state, params=None, **extra_args):
    _sequences.require_sequences(params, tuple(parts), 'per_sequence')
    _sequences.require_gradients(gradients, params, 'per_sequence')
    state = dict(state)

    def move(name, gradient, param):
      if name not in parts:
        raise ValueError(
          f'the sequence {name} has a gradient but no optimiser: give '
          f'per_sequence({name}=...), optax.set_to_zero() to hold it.'
        )
      update, state[name] = parts[name].update(
        gradient, state[name], param, **extra_args
      )
      return update

    return _sequences.map_sequences(move, gradients, params), state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
