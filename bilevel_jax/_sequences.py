"""What every link does with sequences: names, checks, sums, counters.

Sequences are the fields of a NamedTuple. Where a field of gradients or updates
is None, a link leaves that sequence alone.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from bilevel_jax import types


def is_sequences(params: Any) -> bool:
  """Whether params are named sequences, that is, a NamedTuple."""
  return isinstance(params, tuple) and hasattr(params, '_fields')


def require_sequences(params: Any, names: tuple[str, ...], who: str) -> None:
  """Raises TypeError unless params are a NamedTuple with these fields."""
  if params is None:
    raise TypeError(
      f'{who} needs the parameters: call solver.update(batch, state, params).'
    )
  missing = [n for n in names if n not in getattr(params, '_fields', ())]
  if missing or not is_sequences(params):
    held = getattr(params, '_fields', None) or type(params).__name__
    wanted = f'the sequences {", ".join(names)}' if names else 'named sequences'
    raise TypeError(
      f'{who} works on {wanted}, but the parameters are {held}: hold them in '
      'bj.BilevelParams(upper=..., lower=...) or bj.sequences(...). A '
      'checkpoint comes back as such if params and solver.init(params) are the '
      'targets that it is restored to.'
    )


def refuse_batches(solver: str, reason: str, **records: Any) -> None:
  """Raises ValueError if a sequence that sees no batch has a `batch_at`.

  Args:
    solver: its name, for the error.
    reason: why the solver cannot use a `batch_at`, for the error.
    **records: optimisers or records, by name.
  """
  for name, record in records.items():
    if getattr(record, 'batch_at', None) is not None:
      raise ValueError(
        f'{solver}: the sequence {name} has a batch_at, but {reason}: leave it '
        'out.'
      )


def refuse_state(tree: Any, subject: str) -> None:
  """Raises TypeError if a tree is a solver's state, or the state of a chain.

  Args:
    tree: a batch or parameters.
    subject: the start of the error, 'the batch is' for instance.
  """
  nodes = (tree, *tree) if type(tree) is tuple else (tree,)
  for kind in map(type, nodes):
    own = kind.__module__.partition('.')[0] == 'bilevel_jax'
    if own and kind.__name__.endswith('State'):
      raise TypeError(
        f'{subject} the state of a solver: call solver.update(batch, state, '
        'params), in this order.'
      )


def refuse_rows(gradients: Any, who: str) -> None:
  """Raises TypeError where an aggregator was left out."""
  if isinstance(gradients, types.Jacobian | types.Gramian):
    raise TypeError(
      f'{who} takes one gradient, got a {type(gradients).__name__} of '
      'several objectives: put an aggregator between the oracle and the '
      'optimiser, bj.aggregators.mgda(objectives) or '
      'bj.aggregators.scale_by_penalty(...) for instance.'
    )


def require_gradients(gradients: Any, params: Any, who: str) -> None:
  """Raises unless gradients are one gradient for each of params' sequences.

  Args:
    gradients: what a link was given.
    params: the parameters, a NamedTuple of sequences.
    who: the name of the link, for the error.

  Raises:
    TypeError: if they are a `Jacobian` or of another type than params.
    ValueError: if a sequence's structure or a leaf's shape differs.
  """
  refuse_rows(gradients, who)
  given = getattr(gradients, '_fields', None)
  if given != params._fields:
    mend = 'put an oracle before it in the chain'
    if given and set(given) < set(params._fields):
      mend = (
        'an oracle returns params._replace(...) of the parameters that it '
        'sees, None for what it does not move'
      )
    raise TypeError(
      f'{who} takes gradients for the sequences {params._fields}, got '
      f'{given or type(gradients).__name__}: {mend}.'
    )
  for name, gradient, param in zip(
    params._fields, gradients, params, strict=True
  ):
    if gradient is None:
      continue
    ours: Any = jax.tree.structure(param)
    theirs: Any = jax.tree.structure(gradient)
    if ours != theirs:
      raise ValueError(
        f'{who}: the sequence {name} is {ours} but its gradient is {theirs}.'
      )
    for one, two in zip(jax.tree.leaves(param), jax.tree.leaves(gradient)):
      if jnp.shape(one) != jnp.shape(two):
        raise ValueError(
          f'{who}: a leaf of the sequence {name} has shape {jnp.shape(one)} '
          f'but its gradient has {jnp.shape(two)}.'
        )


def only(params: Any, **fields: Any) -> Any:
  """Gradients of params' type: the given fields, None elsewhere."""
  return type(params)(**dict.fromkeys(params._fields) | fields)


def apply_updates(params: Any, updates: Any) -> Any:
  """Adds updates to params, like optax's, but a None field stays as it is.

  Args:
    params: a NamedTuple of sequences, or any pytree.
    updates: of the same structure, None for a sequence that stays.

  Returns:
    The parameters after the step, of the same types.

  Raises:
    TypeError: if the updates are a `Jacobian`: no aggregator made one gradient
      of it.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> params = bj.sequences(a=jnp.float32(1.0), b={'c': jnp.zeros(2)})
    >>> moved = bj.apply_updates(params, params._replace(a=2.0, b=None))
    >>> print(moved.a, moved.b['c'])
    3.0 [0. 0.]
  """
  refuse_rows(updates, 'apply_updates')
  if is_sequences(params):
    return type(params)(
      *(
        p if u is None else optax.apply_updates(p, u)
        for p, u in zip(params, updates, strict=True)
      )
    )
  return optax.apply_updates(params, updates)


def varying_axes(leaf: Any) -> frozenset[str]:
  """The axes of a `jax.shard_map` over which a value differs, by its type.

  Args:
    leaf: an array, or the `jax.ShapeDtypeStruct` of one.

  Returns:
    Names of axes; none elsewhere than in a `jax.shard_map` that checks them.
  """
  kind = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
  return frozenset(getattr(kind.manual_axis_type, 'varying', ()))


def vary(leaf: chex.Array, axes: frozenset[str]) -> chex.Array:
  """The same array, of a type that may differ over these mapped axes."""
  missing = tuple(sorted(axes - varying_axes(leaf)))
  return jax.lax.pcast(leaf, missing, to='varying') if missing else leaf


def vary_like(tree: Any, like: Any) -> Any:
  """The same tree, each leaf of a type that differs where `like`'s does."""
  return jax.tree.map(lambda a, b: vary(a, varying_axes(b)), tree, like)
