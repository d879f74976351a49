"""Several losses, checked and linearised at a point."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from bilevel_jax import _checks, _functions, _sequences
from bilevel_jax.oracles import base

# One function for all losses, or one function for each loss.
Losses = Callable[..., Any] | Sequence[Callable[..., Any]]


class Linearised(NamedTuple):
  """Several losses, linearised at a point.

  Attributes:
    values: the losses, (objectives,).
    row: from an index, which may be traced, to the gradient in the shared
      parameters; None if each loss has its own forward pass.
    rows: these gradients as a list; None if `row` is set.
    rest: the gradients of the summed losses that are not weighted, by sequence.
    pull: from weights (objectives,) to the gradient of the weighted losses in
      the shared parameters, a `jax.tree_util.Partial`; or None.
    push: from a direction in the shared parameters to the derivatives of all
      losses along it; or None.
  """

  values: chex.Array
  row: Callable[[chex.Numeric], Any] | None
  rows: list[Any] | None
  rest: dict[str, Any]
  pull: Callable[[chex.Array], Any] | None
  push: Callable[[Any], chex.Array] | None


class Objectives(NamedTuple):
  """The checked arguments of `multi_objective`.

  Attributes:
    losses: one function for all losses, or a tuple of functions.
    names: a name for each loss.
    rest: the sequences whose gradients are not weighted.
    trunk: the shared part of the model, or None.
    per_task: whether each loss has its own batch.
  """

  losses: Any
  names: tuple[str, ...]
  rest: tuple[str, ...]
  trunk: Callable[..., Any] | None
  per_task: bool

  def linearise(
    self, params: Any, batch: Any, caller: str, *, lean: bool = False
  ) -> Linearised:
    """Evaluates the losses once and prepares their gradients.

    Args:
      params: the parameters.
      batch: the batch.
      caller: name of the oracle, for errors.
      lean: whether each row runs its own backward pass through its head, so
        that the gradients of only one head in the features are in memory.

    Returns:
      The linearised losses; without `pull` and `push` if lean.
    """
    shared, others = params, {}
    if self.rest:
      _sequences.require_sequences(params, self.rest, f'{caller}(rest=...)')
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
    """All losses of one function and its auxiliary output, () without one."""
    out = self.losses(*args)
    return self._vector(out), self._split(out)[1]

  def _split(self, out: Any) -> tuple[Any, Any]:
    """Splits the result of a function into losses and auxiliary output."""
    if isinstance(out, tuple) and len(out) == 2:
      # Either two scalar losses, or all losses and an auxiliary output.
      scalar = not isinstance(out[0], tuple | list) and jnp.ndim(out[0]) == 0
      if not (scalar and len(self.names) == 2):
        return out
    return out, ()

  def _vector(self, out: Any) -> chex.Array:
    """Converts the losses to one array; raises TypeError if they do not fit."""
    out, _ = self._split(out)
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
    names = ('params', 'batch')

    def f(s, o):
      at = join(s, o)
      with _functions.explained('the function of losses', names, (at, batch)):
        out = self.losses(at, batch)
      return self._vector(out)

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
      scalar = base.Loss(loss, name, ('params', 'batch'))
      part = self._batch(batch, i)
      f = lambda s, o, scalar=scalar, part=part: scalar(join(s, o), part)
      value, (row, rest) = jax.value_and_grad(f, (0, 1))(shared, others)
      values.append(value)
      rows.append(row)
      rests.append(rest)
    dtype = jnp.result_type(*values)
    stacked = jnp.stack([value.astype(dtype) for value in values])
    return Linearised(stacked, None, rows, _total(rests), None, None)

  def _stacked(self, shared, others, join, batch) -> Linearised:
    """One loss on the batches of all tasks; each row costs its own batch."""
    sizes = {x.shape[0] for x in jax.tree.leaves(batch) if jnp.ndim(x)}
    count = len(self.names)
    if sizes != {count}:
      raise ValueError(
        f'per_task: with one function for all {count} tasks, every leaf of the '
        f'batch has a leading axis of tasks; got lengths {sorted(sizes)}.'
      )
    scalar = base.Loss(self.losses, 'task')
    indices = jnp.arange(count)

    def one(index, part):
      f = lambda s, o: scalar(join(s, o), part, index)
      return jax.value_and_grad(f, (0, 1))(shared, others)

    values, (rows, rests) = jax.vmap(one)(indices, batch)
    rest = jax.tree.map(lambda leaf: leaf.sum(0), rests)
    take = lambda index: jax.tree.map(lambda leaf: leaf[index], rows)
    return Linearised(values, take, None, rest, None, None)

  def _through_trunk(self, shared, others, join, batch, lean) -> Linearised:
    run = lambda s: self.trunk(s, batch)  # type: ignore[misc]
    features, back = jax.vjp(run, shared)
    # Heads see the shared parameters only by the features.
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
      heights, head_slopes, rests, backward = [], [], [], []
      for name, loss in zip(self.names, self.losses):
        scalar = base.Loss(loss, name)

        def one_loss(h, o, scalar=scalar):
          return scalar(join(heads, o), h, batch)

        value, (slope, one) = jax.value_and_grad(one_loss, (0, 1))(
          features, others
        )
        heights.append(value)
        head_slopes.append(slope)
        rests.append(one)
        backward.append(lambda f=one_loss: jax.grad(f)(features, others))
      dtype = jnp.result_type(*heights)
      values = jnp.stack([value.astype(dtype) for value in heights])
      rest = _total(rests)
      if lean:
        # The compiler omits the unused `head_slopes`.
        lean_row = lambda index: back(jax.lax.switch(index, backward))[0]
        return Linearised(values, lean_row, None, rest, None, None)
      slopes = jax.tree.map(lambda *leaves: jnp.stack(leaves), *head_slopes)

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
  """Casts weights to the cotangent of the losses."""
  weights = weights.astype(values.dtype)
  return _sequences.vary(weights, _sequences.varying_axes(values))


def jacobian(fn: Callable[[Any], tuple[chex.Array, Any]], at: Any) -> Any:
  """The Jacobian of a function to an array, by a backward pass for each row.

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


# Module functions, so that a `Partial` of them is a pytree.


def _pull_losses(back, values, weights):
  return back(_cotangent(weights, values))[0]


def _pull_heads(back, slopes, weights):
  total = lambda slope: jnp.tensordot(weights.astype(slope.dtype), slope, 1)
  return back(jax.tree.map(total, slopes))[0]


def _total(trees: list[dict[str, Any]]) -> dict[str, Any]:
  """The sum of the gradients that are not weighted."""
  return jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *trees)


def make_objectives(
  caller: str,
  losses: Losses,
  objectives: int | Sequence[str] | None,
  rest: Sequence[str] = (),
  trunk: Callable[..., Any] | None = None,
  per_task: bool = False,
  reserved: Sequence[str] = (),
) -> Objectives:
  """Checks the arguments of `multi_objective`; `reserved` names are refused."""
  if not callable(losses):
    losses = tuple(losses)
    for loss in losses:
      _functions.check(f'{caller}: each loss', loss, ())
  if objectives is None:
    if callable(losses):
      raise TypeError(
        f'{caller} takes the number of objectives, or their names, together '
        'with a function that returns all losses.'
      )
    objectives = len(losses)
  if isinstance(objectives, Iterable) and not isinstance(objectives, str):
    names = tuple(objectives)
  else:
    count = _checks.whole_number(caller, 'objectives', objectives)
    names = tuple(f'objective_{i}' for i in range(count))
  if not names or len(set(names)) != len(names):
    raise ValueError(
      f'{caller} takes distinct objectives, at least one: {names}.'
    )
  if taken := sorted(set(names) & set(reserved)):
    raise ValueError(
      f'{caller} measures {", ".join(taken)} itself: rename the objectives '
      f'{names}.'
    )
  if not callable(losses) and len(losses) != len(names):
    raise ValueError(
      f'{caller}: {len(losses)} losses, but {len(names)} objectives.'
    )
  if per_task and trunk is not None:
    raise ValueError(
      f'{caller}: with per_task, each loss sees its own batch, so that a trunk '
      'cannot be shared: leave it out.'
    )
  return Objectives(losses, names, tuple(rest), trunk, per_task)
