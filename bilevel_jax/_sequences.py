"""Named sequences: checks, sums of updates, types in a `jax.shard_map`.

Sequences are the fields of a NamedTuple. None in a field of gradients or
updates means that the sequence does not move.
"""

from typing import Any, TypeVar

import chex
import jax
import jax.numpy as jnp
import optax

from bilevel_jax import types

_Params = TypeVar('_Params')


def is_sequences(params: Any) -> bool:
  """Whether params are named sequences, that is, a NamedTuple."""
  return isinstance(params, tuple) and hasattr(params, '_fields')


def require_sequences(params: Any, names: tuple[str, ...], caller: str) -> None:
  """Raises TypeError unless params are a NamedTuple with these fields."""
  if params is None:
    raise TypeError(
      f'{caller} needs the parameters: call solver.update(batch, state, '
      'params).'
    )
  missing = [n for n in names if n not in getattr(params, '_fields', ())]
  if missing or not is_sequences(params):
    kind = getattr(params, '_fields', None) or type(params).__name__
    wanted = f'the sequences {", ".join(names)}' if names else 'named sequences'
    raise TypeError(
      f'{caller} works on {wanted}, but the parameters are {kind}: make them '
      'by bj.BilevelParams(upper=..., lower=...) or bj.sequences(...). To '
      'restore a checkpoint with these types, pass params and '
      'solver.init(params) as its targets.'
    )


def refuse_batches(solver: str, reason: str, **records: Any) -> None:
  """Raises ValueError if one of the records has a `batch_at`.

  Args:
    solver: name of the solver, for the error.
    reason: why the solver cannot use a `batch_at`, for the error.
    **records: optimisers or records, by name of the sequence.
  """
  for name, record in records.items():
    if getattr(record, 'batch_at', None) is not None:
      raise ValueError(
        f'{solver}: the sequence {name} has a batch_at, but {reason}: leave it '
        'out.'
      )


def refuse_state(
  tree: Any,
  subject: str,
  remedy: str = 'call solver.update(batch, state, params)',
) -> None:
  """Raises TypeError if a tree is the state of a solver or of a chain.

  Args:
    tree: a batch or parameters.
    subject: the start of the error, 'the batch is' for instance.
    remedy: the call to make.
  """
  nodes = (tree, *tree) if type(tree) is tuple else (tree,)
  for kind in map(type, nodes):
    own = kind.__module__.partition('.')[0] == 'bilevel_jax'
    if own and kind.__name__.endswith('State'):
      raise TypeError(
        f'{subject} the state of a solver: {remedy}, in this order.'
      )


def refuse_rows(gradients: Any, caller: str) -> None:
  """Raises TypeError for gradients of several objectives."""
  if isinstance(gradients, types.Jacobian | types.Gramian):
    raise TypeError(
      f'{caller} takes one gradient, got a {type(gradients).__name__} of '
      'several objectives: put an aggregator between the oracle and the '
      'optimiser, for instance bj.aggregators.mgda(objectives) or '
      'bj.aggregators.scale_by_penalty(...).'
    )


def require_gradients(gradients: Any, params: Any, caller: str) -> None:
  """Raises unless gradients fit the sequences of the parameters.

  Args:
    gradients: the input of a link.
    params: the parameters, a NamedTuple of sequences.
    caller: name of the link, for the error.

  Raises:
    TypeError: if they are a `Jacobian` or of another type than params.
    ValueError: if the structure of a sequence or the shape of a leaf differs.
  """
  refuse_rows(gradients, caller)
  fields = getattr(gradients, '_fields', None)
  if fields != params._fields:
    remedy = 'put an oracle before it in the chain'
    if fields and set(fields) < set(params._fields):
      remedy = (
        'return params._replace(...) of the parameters from an oracle, with '
        'None for each sequence that it does not move'
      )
    raise TypeError(
      f'{caller} takes gradients for the sequences {params._fields}, got '
      f'{fields or type(gradients).__name__}: {remedy}.'
    )
  for name, gradient, param in zip(
    params._fields, gradients, params, strict=True
  ):
    if gradient is None:
      continue
    expected: Any = jax.tree.structure(param)
    structure: Any = jax.tree.structure(gradient)
    if expected != structure:
      raise ValueError(
        f'{caller}: the sequence {name} is {expected} but its gradient is '
        f'{structure}.'
      )
    for one, two in zip(jax.tree.leaves(param), jax.tree.leaves(gradient)):
      if jnp.shape(one) != jnp.shape(two):
        raise ValueError(
          f'{caller}: a leaf of the sequence {name} has shape {jnp.shape(one)} '
          f'but its gradient has {jnp.shape(two)}.'
        )


def only(params: Any, **fields: Any) -> Any:
  """Gradients for these sequences, None for all others."""
  return type(params)(**dict.fromkeys(params._fields) | fields)


def apply_updates(params: _Params, updates: Any) -> _Params:
  """Adds updates to parameters; a sequence whose update is None does not move.

  `optax.apply_updates` whose result has the static type of the parameters.

  Args:
    params: a NamedTuple of sequences, or any pytree.
    updates: of the same structure, with None for a sequence that stays.

  Returns:
    The parameters after the step, of the same type.

  Raises:
    TypeError: if the updates are a `Jacobian`, because an aggregator is
      missing.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> params = bj.sequences(a=jnp.float32(1.0), b={'c': jnp.zeros(2)})
    >>> moved = bj.apply_updates(params, params._replace(a=2.0, b=None))
    >>> print(moved.a, moved.b['c'])
    3.0 [0. 0.]
  """
  refuse_rows(updates, 'apply_updates')
  refuse_state(
    updates,
    'the updates are',
    'write updates, state = solver.update(batch, state, params)',
  )
  if is_sequences(params):
    fields: Any = params
    return type(params)(
      *(
        p if u is None else optax.apply_updates(p, u)
        for p, u in zip(fields, updates, strict=True)
      )
    )
  moved: Any = optax.apply_updates(params, updates)
  return moved


def varying_axes(leaf: Any) -> frozenset[str]:
  """The axes of a `jax.shard_map` over which a value may differ.

  Args:
    leaf: an array, or its `jax.ShapeDtypeStruct`.

  Returns:
    Names of axes; empty outside of a `jax.shard_map` that checks them.
  """
  kind = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
  return frozenset(getattr(kind.manual_axis_type, 'varying', ()))


def vary(leaf: chex.Array, axes: frozenset[str]) -> chex.Array:
  """Casts an array to a type that may differ over these mapped axes."""
  missing = tuple(sorted(axes - varying_axes(leaf)))
  return jax.lax.pcast(leaf, missing, to='varying') if missing else leaf


def vary_like(tree: Any, like: Any) -> Any:
  """Casts each leaf to vary over the mapped axes of the leaf of `like`."""
  return jax.tree.map(lambda a, b: vary(a, varying_axes(b)), tree, like)
