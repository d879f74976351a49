"""The first link of every solver: a batch goes in, gradients come out.

An oracle knows the losses and no step size. What evaluating them needs (warm
starts, memories, keys) is its state, so it is checkpointed, vmapped and sharded
like any optimiser's state. Evaluations are counted here, where they happen.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _sequences, _trees


class OracleState(NamedTuple):
  """State of an oracle.

  Attributes:
    values: the losses just measured, by name; scalars, float32 or wider.
    counts: evaluations so far, by `kind/loss`; int32 scalars.
    inner: what evaluating the losses needs from one step to the next.
  """

  values: dict[str, chex.Array]
  counts: dict[str, chex.Array]
  inner: Any = ()


class UpdateCount(NamedTuple):
  """How many updates an oracle has given, for what it schedules itself.

  A wrapper that evaluates an oracle several times for one update, such as
  `accumulate`, lets each evaluation see the same count.

  Attributes:
    count: an int32 scalar.
  """

  count: chex.Array


def scalar_loss(
  loss: Callable[..., Any], name: str
) -> Callable[..., chex.Array]:
  """Wraps a loss so that it returns a scalar alone, or says why it cannot.

  Args:
    loss: returns a scalar, or (scalar, auxiliary); the auxiliary is dropped.
    name: what the error calls the loss.

  Returns:
    The loss as a function to a float scalar.

  Raises:
    TypeError: at the call, if the value is not a real scalar.
  """

  def wrapped(*args):
    out = loss(*args)
    value = out[0] if isinstance(out, tuple) and len(out) == 2 else out
    if not hasattr(value, 'dtype') and not isinstance(value, (int, float)):
      raise TypeError(
        f'the {name} loss returned {type(value).__name__}, expected a scalar '
        'array or (scalar, auxiliary).'
      )
    value = jnp.asarray(value)
    if value.shape:
      raise TypeError(
        f'the {name} loss returned an array of shape {value.shape}, expected '
        'a scalar: reduce it over the batch, with jnp.mean for instance.'
      )
    if not jnp.issubdtype(value.dtype, jnp.floating):
      raise TypeError(
        f'the {name} loss returned {value.dtype}, expected a float scalar.'
      )
    return value

  return wrapped


def oracle(
  fn: Callable[[Any, Any, Any], tuple[Sequence[chex.Array], Any, Any]],
  names: Sequence[str],
  init: Callable[[Any], Any] = lambda params: (),
  *,
  counts: Mapping[str, int] | Callable[[Any], Mapping[str, int]] | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Makes an oracle from a function that evaluates losses and gradients.

  Args:
    fn: `fn(params, batch, inner) -> (values, gradients, inner)`. `values` are
      scalars in the order of `names`; `gradients` have the structure of the
      parameters with None for a sequence that is left alone, or are a
      `Jacobian`.
    names: a name for each value.
    init: makes the first `inner` from the parameters.
    counts: what one evaluation costs, for example
      `{'gradients/lower': 1, 'hessian_vector_products/lower': 1}`; or a
      function of the parameters to that, where it depends on their size.

  Returns:
    A transformation whose `update(batch, state, params)` gives gradients and
    an `OracleState`.

  Raises:
    ValueError: at the call, if `fn` returns another number of values.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp, optax
    >>> def fn(params, batch, inner):
    ...   error = params - batch
    ...   return (jnp.vdot(error, error) / 2,), error, inner
    >>> solver = optax.chain(bj.oracle(fn, ('loss',)), optax.sgd(0.5))
    >>> params = jnp.array([1.0, 3.0])
    >>> updates, state = solver.update(jnp.ones(2), solver.init(params), params)
    >>> print(updates, bj.values(state)['loss'])
    [-0. -1.] 2.0
  """
  names = tuple(names)
  cost = counts if callable(counts) else lambda params: counts or {}

  def init_fn(params):
    dtype = _trees.dtype_of(params)
    return OracleState(
      # One buffer each: a shared one could not be donated.
      values={name: jnp.zeros([], dtype) for name in names},
      counts={name: jnp.zeros([], jnp.int32) for name in cost(params)},
      inner=init(params),
    )

  def update_fn(batch, state, params=None, **extra_args):
    del extra_args
    if params is None:
      raise TypeError(
        'an oracle evaluates losses at the parameters: call '
        'solver.update(batch, state, params).'
      )
    values, gradients, inner = fn(params, batch, state.inner)
    if len(values) != len(names):
      raise ValueError(
        f'the oracle names {len(names)} values {names} but returned '
        f'{len(values)}.'
      )
    measured = {
      name: jnp.asarray(value, state.values[name].dtype)
      for name, value in zip(names, values, strict=True)
    }
    spent = _sequences.add_counts(state.counts, cost(params))
    return gradients, OracleState(measured, spent, inner)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def is_oracle_state(node: Any) -> bool:
  """Whether a node of a solver's state is an oracle's."""
  return isinstance(node, OracleState)


def nodes(state: Any, kind: type) -> list[Any]:
  """The nodes of a type in a solver's state, in order."""
  is_kind = lambda node: isinstance(node, kind)
  return [n for n in jax.tree.leaves(state, is_leaf=is_kind) if is_kind(n)]


def replace_nodes(state: Any, kind: type, new: list[Any]) -> Any:
  """A solver's state with other nodes of a type, in order."""
  is_kind = lambda node: isinstance(node, kind)
  left = iter(new)
  return jax.tree.map(
    lambda node: next(left) if is_kind(node) else node, state, is_leaf=is_kind
  )


def measured(state: Any) -> list[dict[str, chex.Array]]:
  """The losses in each oracle state of a solver's state, in order."""
  nodes = jax.tree.leaves(state, is_leaf=is_oracle_state)
  return [node.values for node in nodes if is_oracle_state(node)]


def replace_measured(state: Any, values: list[dict[str, chex.Array]]) -> Any:
  """A solver's state with other losses in its oracle states, in order."""
  left = iter(values)
  return jax.tree.map(
    lambda node: (
      node._replace(values=next(left)) if is_oracle_state(node) else node
    ),
    state,
    is_leaf=is_oracle_state,
  )


def also_spent(after: Any, before: Any, other: Any) -> Any:
  """Adds to a state what a second evaluation from the same state has spent.

  Args:
    after: the state after the evaluation that is kept.
    before: the state before both.
    other: the state after the evaluation that is dropped.

  Returns:
    `after`, its counts with those of `other` added, at any depth.
  """
  is_counted = lambda node: 'counts' in getattr(node, '_fields', ())

  def add(kept, start, dropped):
    if not is_counted(kept):
      return kept
    spent = {n: dropped.counts[n] - start.counts[n] for n in start.counts}
    fields = {
      name: also_spent(*(getattr(x, name) for x in (kept, start, dropped)))
      for name in kept._fields
      if name != 'counts'
    }
    return kept._replace(
      counts=_sequences.add_counts(kept.counts, spent), **fields
    )

  return jax.tree.map(add, after, before, other, is_leaf=is_counted)
