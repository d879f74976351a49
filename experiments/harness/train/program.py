"""The compiled half of a training run: members, their carry, and a chunk.

Members share one compiled program: a `lax.scan` over the steps of a chunk whose
body maps over members. Of several, one whose losses or params become non-finite
is frozen at its last finite params and state; the others do not notice. To
freeze takes a second copy of all that a step changes, so a member that is alone
goes on to the end of its chunk, and is not saved.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj
from experiments.harness.store import loading
from experiments.harness.train.context import (
  Context,
  Members,
  Shared,
  context_of,
  over_members,
)


class Sum(NamedTuple):
  """A sum over the steps that evaluated a loss.

  Attributes:
    total: of the loss, at least float32; leaves have an axis of members.
    count: of these steps, int32.
  """

  total: chex.Array
  count: chex.Array

  def mean(self) -> chex.Array:
    """The mean; NaN of no step."""
    mean = self.total / jnp.maximum(self.count, 1)
    return jnp.where(self.count > 0, mean, jnp.nan)


class Carry(NamedTuple):
  """All that a run needs to go on.

  Attributes:
    params: params; leaves have a leading axis of members.
    state: the solver's state, likewise.
    step: steps taken, int32 scalar.
    stopped: the step that went non-finite, int32 (members,); -1 while going.
    culprits: what was non-finite then, bool (members, names).
    losses: a `Sum` of each of the solver's losses since the last record, by
      name.
    best: a `Best`, or () where no metric selects.
  """

  params: Any
  state: Any
  step: chex.Array
  stopped: chex.Array
  culprits: chex.Array
  losses: dict[str, 'Sum']
  best: Any


class Program:
  """Functions of a run of `count` members, each compiled once for its shapes.

  Args:
    solver: see `train`, as the next three are.
    init: of `Task`.
    batch: of `Task`.
    evaluate: of `Measure`.
    count: of members.
    select: whether the best params are kept.
    at_once: members that run side by side; None for all.
  """

  def __init__(
    self,
    solver: Any,
    init: Callable[[Context], Any],
    batch: Callable[[Context], Any] | None,
    evaluate: Callable[[Context, Any, Any], dict[str, Any]] | None,
    *,
    count: int,
    select: bool = False,
    at_once: int | None = None,
  ):
    self._solver, self._init, self._batch = solver, init, batch
    self._evaluate, self._count, self._select = evaluate, count, select
    self._over_members = functools.partial(over_members, at_once=at_once)
    self._jitted: dict[Any, Any] = {}

  @property
  def freezes(self) -> bool:
    """Whether a carry holds the last finite params of what has stopped."""
    return self._count > 1

  def jitted(self, name: str, shardings: Any) -> Any:
    """A function of the program to call, compiled once for its shapes.

    Args:
      name: init, chunk, step or choose; all but the first donate the carry.
      shardings: of its results, None where the compiler decides.
    """
    leaves, structure = jax.tree.flatten(shardings)
    key = name, structure, tuple(leaves)
    if key not in self._jitted:
      self._jitted[key] = jax.jit(
        getattr(self, name),
        donate_argnums=() if name == 'init' else 0,
        out_shardings=shardings,
        static_argnames='length' if name == 'chunk' else None,
      )
    return self._jitted[key]

  def init(self, every: Members, shared: Shared) -> Carry:
    """The carry at step 0."""
    params, state, losses = self._over_members(self._init_one)(
      (), every, shared
    )
    best = ()
    if self._select:
      best = loading.Best(
        params=params,
        step=jnp.zeros(self._count, jnp.int32),
        score=jnp.full(self._count, -jnp.inf),
      )
    names = _culprit_names(params, state)
    carry = Carry(
      params=params,
      state=state,
      step=jnp.int32(0),
      stopped=jnp.full(self._count, -1, jnp.int32),
      culprits=jnp.zeros((self._count, len(names)), bool),
      losses=losses,
      best=best,
    )
    # A carry of weakly typed arrays would not match that of a later chunk.
    return jax.tree.map(
      lambda x: jax.lax.convert_element_type(x, x.dtype), carry
    )

  def chunk(
    self, carry: Carry, every: Members, shared: Shared, *, length: int
  ) -> tuple[Carry, dict[str, chex.Array]]:
    """The carry and its metrics after `length` steps; 0 only measures."""
    if length:
      steps = carry.step + jnp.arange(length, dtype=jnp.int32)
      inputs = shared, steps
      carry = self._move(self._advance_one, carry, every, inputs, length)
    metrics = self._over_members(self._measure_one)(
      (carry.params, carry.state, carry.losses),
      every,
      (shared, carry.step),
    )
    zeros = jax.tree.map(jnp.zeros_like, carry.losses)
    return carry._replace(losses=zeros), metrics

  def step(
    self, carry: Carry, every: Members, shared: Shared, streamed: Any
  ) -> Carry:
    """The carry after one step."""
    inputs = shared, carry.step, streamed
    return self._move(self._streamed_one, carry, every, inputs, 1)

  def choose(
    self, best: loading.Best, params: Any, step: Any, score: chex.Array
  ) -> loading.Best:
    """The best params, with those of members whose score is better now."""
    better = score > best.score  # Never true for NaN.

    def pick(new, old):
      return jnp.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return loading.Best(
      params=jax.tree.map(pick, params, best.params),
      step=jnp.where(better, step, best.step),
      score=jnp.where(better, score, best.score),
    )

  def culprits(self, carry: Carry) -> tuple[str, ...]:
    """Names of the columns of `Carry.culprits`, from a carry's shapes."""
    return _culprit_names(carry.params, carry.state)

  def _move(self, fn, carry, every, inputs, length):
    params, state, losses, stopped, culprits = self._over_members(fn)(
      (
        carry.params,
        carry.state,
        carry.losses,
        carry.stopped,
        carry.culprits,
      ),
      every,
      inputs,
    )
    return carry._replace(
      params=params,
      state=state,
      step=carry.step + length,
      stopped=stopped,
      culprits=culprits,
      losses=losses,
    )

  def _transformation(
    self, member, shared
  ) -> optax.GradientTransformationExtraArgs:
    if hasattr(self._solver, 'update'):
      return self._solver
    return self._solver(context_of(member, shared, 'solver', 0))

  def _init_one(self, _, member, shared):
    params = self._init(context_of(member, shared, 'init', jnp.int32(0)))
    state = self._transformation(member, shared).init(params)
    return params, state, jax.tree.map(jnp.zeros_like, _sums(state))

  def _step_one(self, arrays, member, shared, step, streamed=None):
    params, state, losses, stopped, culprits = arrays
    context = context_of(member, shared, 'batch', step, streamed)
    drawn = streamed if self._batch is None else self._batch(context)
    updates, new_state = self._transformation(member, shared).update(
      drawn, state, params
    )
    new_params = bj.apply_updates(params, updates)
    losses = jax.tree.map(jnp.add, losses, _sums(new_state))
    bad = jnp.stack([x for _, x in _nonfinite(new_params, new_state)])
    going = stopped < 0
    fine = going & ~jnp.any(bad)
    if self.freezes:
      keep = functools.partial(jnp.where, fine)
      new_params = jax.tree.map(keep, new_params, params)
      new_state = jax.tree.map(keep, new_state, state)
    return (
      new_params,
      new_state,
      losses,
      jnp.where(going & ~fine, step, stopped),
      jnp.where(going, bad, culprits),
    )

  def _streamed_one(self, arrays, member, inputs):
    return self._step_one(arrays, member, *inputs)

  def _advance_one(self, arrays, member, inputs):
    shared, steps = inputs

    def body(arrays, step):
      return self._step_one(arrays, member, shared, step), None

    return jax.lax.scan(body, arrays, steps)[0]

  def _measure_one(self, arrays, member, inputs):
    params, state, losses = arrays
    shared, step = inputs
    context = context_of(member, shared, 'evaluate', step)
    metrics = {f'loss/{name}': total.mean() for name, total in losses.items()}
    metrics |= {f'count/{n}': x for n, x in bj.counts(state).items()}
    measured = {}
    if self._evaluate is not None:
      measured = self._evaluate(context, params, state)
    check_metrics(measured, metrics)
    return jax.tree.map(jnp.asarray, metrics | measured)


# Programs that are remembered: those of a method and of the one before.
_remembered = functools.lru_cache(8)(Program)


def program_of(*functions: Any, **static: Any) -> Program:
  """The program of some functions: for the same ones, the same program.

  As for `jax.jit`, functions are the same if they are equal, not if they do the
  same. Takes what `Program` does.
  """
  try:
    hash(functions)
  except TypeError:
    return Program(*functions, **static)
  return _remembered(*functions, **static)


def _sums(state: Any) -> dict[str, Sum]:
  """The losses of the last step, those that it evaluated."""
  evaluated = bj.diagnostics.evaluated(state)

  def one(name, value):
    wide = jnp.promote_types(jnp.result_type(value), jnp.float32)
    here = evaluated[name]
    # What is not evaluated may be older than the last record, and not finite.
    total = jnp.where(here, value, 0).astype(wide)
    return Sum(total, here.astype(jnp.int32))

  return {name: one(name, value) for name, value in bj.values(state).items()}


def _nonfinite(params: Any, state: Any) -> list[tuple[str, chex.Array]]:
  # Sorted: the dicts in a state are in another order once jax has rebuilt them.
  found = sorted(bj.diagnostics.nonfinite(params, state).items())
  return [(name.removeprefix('sequence/'), bad) for name, bad in found]


def _culprit_names(params: Any, state: Any) -> tuple[str, ...]:
  """Names of what may be non-finite; of arrays or their shapes."""
  names = []
  find = lambda *trees: names.extend(name for name, _ in _nonfinite(*trees))
  jax.eval_shape(find, params, state)
  return tuple(names)


def check_metrics(measured: Any, taken: dict[str, Any]) -> None:
  """Raises unless it is a dict of scalars whose names are not taken."""
  if not isinstance(measured, dict):
    raise TypeError(
      'evaluate returns a dict from metric to scalar, got '
      f'{type(measured).__name__}.'
    )
  for name, value in measured.items():
    if name in taken:
      raise ValueError(f'evaluate returns {name!r}, a name of the solver.')
    if jnp.shape(value):
      raise ValueError(
        f'metric {name!r} is a scalar for each seed, got shape '
        f'{jnp.shape(value)}.'
      )
