"""The Jacobian of several losses, with one forward pass for all of them."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _checks, _sequences, _trees, types
from bilevel_jax.aggregators import _rows
from bilevel_jax.oracles import base

# One function to all losses, or one function for each.
Losses = Callable[..., Any] | Sequence[Callable[..., Any]]


class Linearised(NamedTuple):
  """Several losses around a point.

  Attributes:
    values: the losses, (objectives,).
    row: from an index, also a traced one, to the gradient in the shared
      parameters; None where each loss has a forward pass of its own.
    rows: these gradients as a list, or None where `row` is given.
    rest: the summed losses' gradients that no weight touches, by sequence.
    pull: from weights (objectives,) to the gradient of the weighted losses in
      the shared parameters, a `jax.tree_util.Partial`; None as `row`.
    push: from a direction in the shared parameters to the derivatives of all
      losses along it; None as `row`.
  """

  values: chex.Array
  row: Callable[[chex.Numeric], Any] | None
  rows: list[Any] | None
  rest: dict[str, Any]
  pull: Callable[[chex.Array], Any] | None
  push: Callable[[Any], chex.Array] | None


class Objectives(NamedTuple):
  """Several losses, checked: what `multi_objective` is given.

  Attributes:
    losses: one function to all losses, or a tuple of functions.
    names: a name for each.
    rest: the sequences that no weight touches.
    trunk: the shared part, or None.
    per_task: whether each loss has a batch of its own.
  """

  losses: Any
  names: tuple[str, ...]
  rest: tuple[str, ...]
  trunk: Callable[..., Any] | None
  per_task: bool

  def linearise(
    self, params: Any, batch: Any, who: str, *, lean: bool = False
  ) -> Linearised:
    """Evaluates the losses once, and prepares their gradients.

    Args:
      params: the parameters.
      batch: the batch.
      who: the oracle, for errors.
      lean: whether a row goes back through its head when it is asked for, so
        that no two heads' gradients in the features are held at once.

    Returns:
      A `Linearised`; without `pull` and `push` if lean.
    """
    shared, others = params, {}
    if self.rest:
      _sequences.require_sequences(params, self.rest, f'{who}(rest=...)')
      shared = params._replace(**dict.fromkeys(self.rest))
      others = {name: getattr(params, name) for name in self.rest}
    join = lambda s, o: s._replace(**o) if self.rest else s
    if self.per_task and callable(self.losses):
      return self._stacked(shared, others, join, batch)
    if self.trunk is not None:
      return self._through_trunk(shared, others, join, batch, lean)
    if callable(self.losses):
      return self._at_once(shared, others, join, batch)
    return self._one_by_one(shared, others, join, batch)

  def full(self, *args: Any) -> tuple[chex.Array, Any]:
    """All losses of one function, and its auxiliary output, () without one."""
    out = self.losses(*args)
    return self._vector(out), self._parted(out)[1]

  def _parted(self, out: Any) -> tuple[Any, Any]:
    """What a function returned as its losses and its auxiliary output."""
    if isinstance(out, tuple) and len(out) == 2:
      # Either two scalars, or all losses and an auxiliary.
      scalar = not isinstance(out[0], tuple | list) and jnp.ndim(out[0]) == 0
      if not (scalar and len(self.names) == 2):
        return out
    return out, ()

  def _vector(self, out: Any) -> chex.Array:
    """All losses as one array, or an error."""
    out, _ = self._parted(out)
    if isinstance(out, tuple | list):
      out = jnp.stack([jnp.asarray(x) for x in out])
    out = jnp.asarray(out)
    if out.shape != (len(self.names),):
      raise TypeError(
        f'the losses are an array of shape {out.shape}, expected '
        f'{(len(self.names),)}: one scalar for each objective.'
      )
    if not jnp.issubdtype(out.dtype, jnp.floating):
      raise TypeError(f'the losses are {out.dtype}, expected floats.')
    return out

  def _unit(self, values: chex.Array, index: Any) -> chex.Array:
    return _cotangent(jnp.arange(len(self.names)) == index, values)

  def _at_once(self, shared, others, join, batch) -> Linearised:
    f = lambda s, o: self._vector(self.losses(join(s, o), batch))
    values, back = jax.vjp(f, shared, others)
    rest: dict[str, Any] = {}
    if others:
      rest = back(_cotangent(jnp.ones_like(values), values))[1]

    def push(direction):
      return jax.jvp(lambda s: f(s, others), (shared,), (direction,))[1]

    row = lambda index: back(self._unit(values, index))[0]
    pull = jax.tree_util.Partial(_pull_losses, back, values)
    return Linearised(values, row, None, rest, pull, push)

  def _batch(self, batch: Any, index: int) -> Any:
    if not self.per_task:
      return batch
    if isinstance(batch, dict):
      return batch[self.names[index]]
    if not isinstance(batch, tuple | list) or len(batch) != len(self.names):
      raise TypeError(
        f'per_task: the batch is a tuple of {len(self.names)} batches, or a '
        f'dict by the names {self.names}; got {type(batch).__name__}.'
      )
    return batch[index]

  def _one_by_one(self, shared, others, join, batch) -> Linearised:
    values, rows, rests = [], [], []
    for i, (name, loss) in enumerate(zip(self.names, self.losses)):
      scalar = base.Loss(loss, name)
      mine = self._batch(batch, i)
      f = lambda s, o, scalar=scalar, mine=mine: scalar(join(s, o), mine)
      value, (row, rest) = jax.value_and_grad(f, (0, 1))(shared, others)
      values.append(value)
      rows.append(row)
      rests.append(rest)
    dtype = jnp.result_type(*values)
    stacked = jnp.stack([value.astype(dtype) for value in values])
    return Linearised(stacked, None, rows, _total(rests), None, None)

  def _stacked(self, shared, others, join, batch) -> Linearised:
    """One loss on the batches of all tasks: a row costs its own batch only."""
    sizes = {x.shape[0] for x in jax.tree.leaves(batch) if jnp.ndim(x)}
    count = len(self.names)
    if sizes != {count}:
      raise ValueError(
        f'per_task: with one function for all {count} tasks, every leaf of the '
        f'batch has a leading axis of tasks; got lengths {sorted(sizes)}.'
      )
    scalar = base.Loss(self.losses, 'task')
    indices = jnp.arange(count)

    def one(index, mine):
      f = lambda s, o: scalar(join(s, o), mine, index)
      return jax.value_and_grad(f, (0, 1))(shared, others)

    values, (rows, rests) = jax.vmap(one)(indices, batch)
    rest = jax.tree.map(lambda leaf: leaf.sum(0), rests)
    take = lambda index: jax.tree.map(lambda leaf: leaf[index], rows)
    return Linearised(values, take, None, rest, None, None)

  def _through_trunk(self, shared, others, join, batch, lean) -> Linearised:
    run = lambda s: self.trunk(s, batch)  # type: ignore[misc]
    features, back = jax.vjp(run, shared)
    # What a head reaches of the shared parameters, it reaches by features.
    heads: Any = None
    if self.rest:
      heads = type(shared)(**dict.fromkeys(shared._fields))
    if callable(self.losses):

      def every(h, o):
        return self._vector(self.losses(join(heads, o), h, batch))

      values, back_heads = jax.vjp(every, features, others)
      units = jax.vmap(lambda i: self._unit(values, i))(
        jnp.arange(len(self.names))
      )
      slopes = jax.vmap(lambda unit: back_heads(unit)[0])(units)
      ones = jnp.sum(units, axis=0)
      rest = back_heads(ones)[1] if others else {}
    else:
      found, kept, rests, alone = [], [], [], []
      for name, loss in zip(self.names, self.losses):
        scalar = base.Loss(loss, name)

        def one_loss(h, o, scalar=scalar):
          return scalar(join(heads, o), h, batch)

        value, (slope, one) = jax.value_and_grad(one_loss, (0, 1))(
          features, others
        )
        found.append(value)
        kept.append(slope)
        rests.append(one)
        alone.append(lambda f=one_loss: jax.grad(f)(features, others))
      dtype = jnp.result_type(*found)
      values = jnp.stack([value.astype(dtype) for value in found])
      rest = _total(rests)
      if lean:
        # What is not used of `kept` is not computed.
        lean_row = lambda index: back(jax.lax.switch(index, alone))[0]
        return Linearised(values, lean_row, None, rest, None, None)
      slopes = jax.tree.map(lambda *leaves: jnp.stack(leaves), *kept)

    def row(index):
      return back(jax.tree.map(lambda slope: slope[index], slopes))[0]

    def push(direction):
      moved = jax.jvp(run, (shared,), (direction,))[1]
      parts = jax.tree.map(
        lambda slope, move: jnp.tensordot(slope, move, axes=move.ndim),
        slopes,
        moved,
      )
      return sum(jax.tree.leaves(parts))

    pull = jax.tree_util.Partial(_pull_heads, back, slopes)
    return Linearised(values, row, None, rest, pull, push)


def _cotangent(weights: chex.Array, values: chex.Array) -> chex.Array:
  """Weights of losses, as the losses' cotangent."""
  weights = weights.astype(values.dtype)
  return _sequences.vary(weights, _sequences.varying_axes(values))


def jacobian(fn: Callable[[Any], tuple[chex.Array, Any]], at: Any) -> Any:
  """The rows of a function to an array, by a backward pass for each.

  Args:
    fn: from a point to (values (objectives,), auxiliary).
    at: the point.

  Returns:
    The rows, with a leading axis of objectives, and the auxiliary output.
  """
  values, back, auxiliary = jax.vjp(fn, at, has_aux=True)
  indices = jnp.arange(values.shape[0])
  row = lambda i: back(_cotangent(indices == i, values))[0]
  return jax.lax.map(row, indices), auxiliary


# Functions of the module, so that what they are bound to is a pytree.


def _pull_losses(back, values, weights):
  return back(_cotangent(weights, values))[0]


def _pull_heads(back, slopes, weights):
  total = lambda slope: jnp.tensordot(weights.astype(slope.dtype), slope, 1)
  return back(jax.tree.map(total, slopes))[0]


def _total(trees: list[dict[str, Any]]) -> dict[str, Any]:
  """The sum of gradients that no weight touches, in one pytree."""
  return jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *trees)


def make_objectives(
  who: str,
  losses: Losses,
  objectives: int | Sequence[str] | None,
  rest: Sequence[str],
  trunk: Callable[..., Any] | None,
  per_task: bool,
) -> Objectives:
  """Checks the arguments of `multi_objective`."""
  if not callable(losses):
    losses = tuple(losses)
  if objectives is None:
    if callable(losses):
      raise TypeError(
        f'{who} takes the number of objectives, or their names, beside a '
        'function that returns all losses.'
      )
    objectives = len(losses)
  if isinstance(objectives, Iterable) and not isinstance(objectives, str):
    names = tuple(objectives)
  else:
    count = _checks.whole(who, 'objectives', objectives)
    names = tuple(f'objective_{i}' for i in range(count))
  if not names or len(set(names)) != len(names):
    raise ValueError(f'{who} takes distinct objectives, at least one: {names}.')
  if not callable(losses) and len(losses) != len(names):
    raise ValueError(
      f'{who}: {len(losses)} losses, but {len(names)} objectives.'
    )
  if per_task and trunk is not None:
    raise ValueError(
      f'{who}: with per_task, each loss sees a batch of its own, so that there '
      'is nothing for a trunk to share; leave it out.'
    )
  return Objectives(losses, names, tuple(rest), trunk, per_task)


def multi_objective(
  losses: Losses,
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

  Give it the losses in the cheapest form that fits:

  - one function `losses(params, batch)` to all of them: one forward pass, and a
    backward pass for each;
  - with `trunk(params, batch)` to features, `losses` of (parameters, features,
    batch): the passes back through the heads are cheap, and only the trunk is
    passed M times;
  - a sequence of functions: each has passes of its own, and with `per_task` a
    batch of its own;
  - with `per_task`, one function `loss(params, batch, index)` to the scalar of
    one task: the batches come stacked along a leading axis of tasks, and all
    rows cost what one pass over all examples does.

  Args:
    losses: a function to an array (objectives,) or to a tuple of scalars, or
      to (these, auxiliary); or a sequence of functions to a scalar, or to
      (scalar, auxiliary).
    objectives: their number or names; may be left out for a sequence.
    rest: sequences that only some losses have, task heads for instance. Rows
      have None there, and the sum of the losses' gradients goes past the
      aggregator untouched.
    trunk: the part of the model that all losses share. The losses then see
      only the sequences in `rest` of the parameters.
    per_task: whether the batch is a tuple of one batch for each loss, or a dict
      by name; or stacked, where one function is given.
    by: 'map' for one backward pass after another, which is smaller and on a CPU
      faster, or 'vmap' for all at once.
    gramian: gives the Gram matrix in place of rows (`Gramian`), with two
      passes for each objective and the memory of one row: for memory, not for
      time. For aggregators that need only the matrix.

  Returns:
    An oracle to a `Jacobian`, or to a `Gramian`.

  Raises:
    TypeError: if the number of objectives is missing, or at the call, if a loss
      is no scalar or a sequence is missing.
    ValueError: if arguments disagree.

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
  who = 'multi_objective'
  given = make_objectives(who, losses, objectives, rest, trunk, per_task)
  count = len(given.names)
  if by not in ('map', 'vmap'):
    raise ValueError(f"{who}: by is 'map' or 'vmap', got {by!r}.")
  if gramian and trunk is None and (per_task or not callable(losses)):
    raise ValueError(
      f'{who}: gramian=True takes one function to all losses, or a trunk.'
    )

  def fn(params, batch, inner):
    near = given.linearise(params, batch, who)
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
  # A mean of Gram matrices is not that of the mean rows.
  return base.oracle(fn, given.names, counts=cost, linear=not gramian)


def _each(fn: Any, count: int, by: str) -> Any:
  """A function of an index, for all indices."""
  indices = jnp.arange(count)
  return jax.lax.map(fn, indices) if by == 'map' else jax.vmap(fn)(indices)


def _gramian(near, count, by) -> types.Gramian:
  """Each row on its own, divided by its largest entry before it is pushed."""

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
  """What `multi_objective` gives, as a function of the parameters, all zero.

  For wrappers that keep a Jacobian in their state, for instance
  `bj.evaluation.storm(oracle, decay, like=bj.oracles.jacobian_like(2))`.

  Args:
    objectives: the number of rows.
    rest: sequences that only some losses have, as in the oracle.

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
    values = jnp.zeros([objectives], _trees.dtype_of(params))
    return types.Jacobian(_rows.zeros(objectives, shared), others, values)

  return like
