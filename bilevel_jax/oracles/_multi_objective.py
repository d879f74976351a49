"""The Jacobian of several losses, with one forward pass for all of them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _functions, _sequences, _trees, types
from bilevel_jax.aggregators import _rows
from bilevel_jax.oracles import _objectives, base


def multi_objective(
  losses: _objectives.Losses,
  objectives: int | Sequence[str] | None = None,
  *,
  rest: Sequence[str] = (),
  trunk: Callable[[Any, Any], Any] | None = None,
  per_task: bool = False,
  by: str = 'map',
  gramian: bool = False,
) -> base.Oracle:
  r"""The gradients of several losses, as the rows of a Jacobian.

  .. math::
    J = \left( \nabla f_1(x, batch), \dots, \nabla f_M(x, batch) \right)^\top

  Choose the cheapest form of the losses:

  - one function `losses(params, batch)` for all of them costs one forward pass,
    and a backward pass for each loss;
  - `trunk(params, batch)` to features, and `losses` of (parameters, features,
    batch): M cheap passes through the heads, and M backward passes through the
    trunk;
  - a sequence of functions: each has its own passes, and with `per_task` its
    own batch;
  - with `per_task`, one function `loss(params, batch, index)` for the scalar
    loss of one task: the batches are stacked along a leading axis of tasks, and
    all rows cost one pass over all examples.

  Args:
    losses: a function to an array (objectives,), to a tuple of scalars, or to
      (these, auxiliary); or a sequence of functions to a scalar or to
      (scalar, auxiliary).
    objectives: their number or names; optional for a sequence.
    rest: sequences that only some losses have, for instance task heads. Rows
      have None there, and the sum of the losses' gradients passes the
      aggregator without weights.
    trunk: the part of the model that all losses share. The losses then see
      only the sequences in `rest` of the parameters.
    per_task: whether each loss has its own batch, in a tuple or a dict by name,
      or stacked if `losses` is one function.
    by: 'map' runs the backward passes in turn, which takes less memory and on
      CPUs less time; 'vmap' runs them at once.
    gramian: gives the Gram matrix instead of rows (`Gramian`), by two passes
      for each objective and with the memory of one row, for aggregators that
      need only the matrix.

  Returns:
    An oracle that gives a `Jacobian` or a `Gramian`.

  Raises:
    TypeError: if the number of objectives is missing, or at the call, if a loss
      is not a scalar or a sequence is missing.
    ValueError: if arguments contradict each other.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> losses = lambda x, batch: jnp.stack([x @ x, batch @ x])
    >>> oracle = bj.multi_objective(losses, ('size', 'fit'))
    >>> params = jnp.array([1.0, 2.0])
    >>> jacobian, state = oracle.update(
    ...   jnp.ones(2), oracle.init(params), params
    ... )
    >>> print(jacobian.rows)
    [[2. 4.]
     [1. 1.]]
    >>> print(bj.values(state)['fit'], bj.counts(state))
    3.0 {'gradients/objectives': 2}
  """
  caller = 'multi_objective'
  several = _objectives.make_objectives(
    caller, losses, objectives, rest, trunk, per_task
  )
  count = len(several.names)
  if trunk is None:
    arguments: tuple[str, ...] = ('params', 'batch')
    if per_task and callable(losses):
      arguments += ('index',)
    for loss in [losses] if callable(losses) else several.losses:
      _functions.check(f'{caller}: a loss', loss, arguments)
  if by not in ('map', 'vmap'):
    raise ValueError(f"{caller}: by is 'map' or 'vmap', got {by!r}.")
  if gramian and trunk is None and (per_task or not callable(losses)):
    raise ValueError(
      f'{caller}: gramian=True takes one function for all losses, or a trunk.'
    )

  def fn(params, batch, inner):
    near = several.linearise(params, batch, caller)
    if gramian:
      return near.values, _gramian(near, count, by), inner
    if near.rows is not None:
      rows = jax.tree.map(lambda *leaves: jnp.stack(leaves), *near.rows)
    else:
      rows = _each(near.row, count, by)
    rest = near.rest or None
    return near.values, types.Jacobian(rows, rest, near.values), inner

  cost = {'gradients/objectives': count}
  if gramian:
    cost = {
      'gradients/objectives': count + 1,
      'jacobian_vector_products/objectives': count,
    }
  # A mean of Gram matrices is not the Gram matrix of the mean rows.
  return base.oracle(fn, several.names, counts=cost, linear=not gramian)


def _each(fn: Any, count: int, by: str) -> Any:
  """Maps a function over all indices."""
  indices = jnp.arange(count)
  return jax.lax.map(fn, indices) if by == 'map' else jax.vmap(fn)(indices)


def _gramian(near, count, by) -> types.Gramian:
  """The Gram matrix from one row at a time, scaled by its largest entry."""

  def one(index):
    row = near.row(index)
    largest = optax.tree.norm(row, ord=jnp.inf)
    unit = _trees.scaled(_trees.ratio(1, largest), row)
    return largest, jnp.sqrt(_trees.dot(unit, unit)), near.push(unit)

  largest, norms, pushed = _each(one, count, by)
  lengths = largest.astype(norms.dtype) * norms
  cosines = _trees.ratio(pushed, norms[:, None] * lengths)
  combine = jax.tree_util.Partial(_combine, near.pull, near.rest)
  return types.Gramian(lengths, (cosines + cosines.T) / 2, combine, near.values)


def _combine(pull, rest, weights):
  return _rows.with_rest(pull(weights), rest)


def jacobian_like(
  objectives: int, *, rest: Sequence[str] = ()
) -> Callable[[Any], types.Jacobian]:
  """A Jacobian of zeros, for wrappers that have a Jacobian in their state.

  For instance `bj.evaluation.storm(oracle, decay,
  like=bj.oracles.jacobian_like(2))`.

  Args:
    objectives: the number of rows.
    rest: sequences that only some losses have, as in `multi_objective`.

  Returns:
    A function from the parameters to a `Jacobian` of zeros.

  Raises:
    TypeError: at the call, if a sequence of `rest` is missing.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> print(bj.oracles.jacobian_like(2)(jnp.ones(3)).rows)
    [[0. 0. 0.]
     [0. 0. 0.]]
  """

  def like(params):
    shared, others = params, None
    if rest:
      _sequences.require_sequences(params, tuple(rest), 'jacobian_like')
      shared = params._replace(**dict.fromkeys(rest))
      others = {n: optax.tree.zeros_like(getattr(params, n)) for n in rest}
    values = jnp.zeros([objectives], _trees.widest_dtype(params))
    return types.Jacobian(_rows.zeros(objectives, shared), others, values)

  return like
