"""The compiled part of a training run.

All members share one compiled program: a `lax.scan` over the steps of a chunk,
mapped over members. A member whose losses or params become non-finite is frozen
at its last finite params and state, and the others continue. Freezing needs a
second copy of the carry, so a single member runs to the end of its chunk
instead, and is not saved.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj
from experiments.harness.store import loading, programs
from experiments.harness.train.context import (
  Context,
  Members,
  Shared,
  make_context,
  over_members,
)


class Sum(NamedTuple):
  """The sum of a loss over the steps that evaluated it.

  Attributes:
    total: the sum, at least float32.
    count: number of these steps, int32.
  """

  total: chex.Array
  count: chex.Array

  def mean(self) -> chex.Array:
    """Returns the mean; NaN without any step."""
    mean = self.total / jnp.maximum(self.count, 1)
    return jnp.where(self.count > 0, mean, jnp.nan)


class Carry(NamedTuple):
  """The state of a run; leaves have a leading axis of members.

  Attributes:
    params: params.
    state: state of the solver.
    step: steps taken, int32 scalar.
    stopped: step that became non-finite, int32 (members,); -1 for none.
    culprits: which arrays were non-finite then, bool (members, names).
    losses: a `Sum` of each loss of the solver since the last record.
    best: a `Best`, or () if no metric selects.
  """

  params: Any
  state: Any
  step: chex.Array
  stopped: chex.Array
  culprits: chex.Array
  losses: dict[str, 'Sum']
  best: Any


class Program:
  """The functions of a run, each compiled once for its shapes.

  Args:
    solver: see `train`.
    init: see `Task`.
    batch: see `Task`.
    evaluate: see `Measure`.
    count: number of members.
    select: whether to keep the best params.
    at_once: see `Training`.
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
    self._digests: dict[Any, dict[str, str]] = {}

  @property
  def freezes(self) -> bool:
    """Whether stopped members keep their last finite params."""
    return self._count > 1

  def jitted(self, name: str, shardings: Any) -> Any:
    """Returns a function of the program under `jax.jit`.

    Args:
      name: init, chunk, step or choose; all but the first donate the carry.
      shardings: shardings of its results; None lets the compiler decide.
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
    """Returns the carry at step 0."""
    init = self._over_members(self._init_one)
    params, state, losses = init((), every, shared)
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
    # Weakly typed arrays would not match the carry of the next chunk.
    return jax.tree.map(
      lambda x: jax.lax.convert_element_type(x, x.dtype), carry
    )

  def chunk(
    self, carry: Carry, every: Members, shared: Shared, *, length: int
  ) -> tuple[Carry, dict[str, chex.Array]]:
    """Takes `length` steps, and measures; 0 only measures."""
    if length:
      steps = carry.step + jnp.arange(length, dtype=jnp.int32)
      inputs = shared, steps
      carry = self._move(self._advance_one, carry, every, inputs, length)
    arrays = carry.params, carry.state, carry.losses
    measure = self._over_members(self._measure_one)
    metrics = measure(arrays, every, (shared, carry.step))
    zeros = jax.tree.map(jnp.zeros_like, carry.losses)
    return carry._replace(losses=zeros), metrics

  def step(
    self, carry: Carry, every: Members, shared: Shared, streamed: Any
  ) -> Carry:
    """Takes one step."""
    inputs = shared, carry.step, streamed
    return self._move(self._streamed_one, carry, every, inputs, 1)

  def choose(
    self, best: loading.Best, params: Any, step: Any, score: chex.Array
  ) -> loading.Best:
    """Updates the best params of members whose score is better."""
    better = score > best.score  # False for NaN.

    def pick(new, old):
      return jnp.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return loading.Best(
      params=jax.tree.map(pick, params, best.params),
      step=jnp.where(better, step, best.step),
      score=jnp.where(better, score, best.score),
    )

  def digests(
    self,
    carry: Carry,
    every: Members,
    shared: Shared,
    streamed: Any = None,
    *,
    steps: bool = True,
  ) -> dict[str, str]:
    """Digests what the functions compute for one member, by their names.

    The digests do not depend on the numbers of members and of steps.

    Args:
      carry: shapes of the carry.
      every: members, or their shapes.
      shared: shared data, or their shapes.
      streamed: shapes of a stream's batch.
      steps: whether to include the step.
    """
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    one = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    shared, streamed = jax.tree.map(shape, (shared, streamed))
    names = ('params', 'state', 'losses', 'stopped', 'culprits')
    arrays = tuple(getattr(carry, name) for name in names)
    member, arrays = jax.tree.map(one, (jax.tree.map(shape, every), arrays))
    step = jax.ShapeDtypeStruct((), jnp.int32)
    calls = {
      'init': (self._init_one, (), member, shared),
      'evaluate': (self._measure_one, arrays[:3], member, (shared, step)),
    }
    if steps:
      inputs = shared, step, streamed
      calls['the step'] = self._streamed_one, arrays, member, inputs
    leaves, structure = jax.tree.flatten([args for _, *args in calls.values()])
    key = structure, tuple((x.shape, x.dtype) for x in leaves)
    if key not in self._digests:
      self._digests[key] = {
        name: programs.digest(*call) for name, call in calls.items()
      }
    return self._digests[key]

  def culprits(self, carry: Carry) -> tuple[str, ...]:
    """Returns the names of the columns of `Carry.culprits`."""
    return _culprit_names(carry.params, carry.state)

  def _move(self, fn, carry, every, inputs, length):
    names = ('params', 'state', 'losses', 'stopped', 'culprits')
    arrays = tuple(getattr(carry, name) for name in names)
    moved = self._over_members(fn)(arrays, every, inputs)
    changed = dict(zip(names, moved, strict=True))
    return carry._replace(step=carry.step + length, **changed)

  def _transformation(
    self, member, shared
  ) -> optax.GradientTransformationExtraArgs:
    if hasattr(self._solver, 'update'):
      return self._solver
    return self._solver(make_context(member, shared, 'solver', 0))

  def _init_one(self, _, member, shared):
    params = self._init(make_context(member, shared, 'init', jnp.int32(0)))
    state = self._transformation(member, shared).init(params)
    return params, state, jax.tree.map(jnp.zeros_like, _sums(state))

  def _step_one(self, arrays, member, shared, step, streamed=None):
    params, state, losses, stopped, culprits = arrays
    context = make_context(member, shared, 'batch', step, streamed)
    batch = streamed if self._batch is None else self._batch(context)
    transformation = self._transformation(member, shared)
    updates, new_state = transformation.update(batch, state, params)
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
    context = make_context(member, shared, 'evaluate', step)
    metrics = {f'loss/{name}': total.mean() for name, total in losses.items()}
    metrics |= {f'count/{n}': x for n, x in bj.counts(state).items()}
    evaluated = {}
    if self._evaluate is not None:
      evaluated = self._evaluate(context, params, state)
    check_metrics(evaluated, metrics, self._evaluate)
    return jax.tree.map(jnp.asarray, metrics | evaluated)


_cached_program = functools.lru_cache(8)(Program)


def make_program(*functions: Any, **static: Any) -> Program:
  """Returns a `Program`, the same one for equal arguments.

  Functions are compared like in `jax.jit`: two lambdas with the same body are
  different.
  """
  try:
    hash(functions)
  except TypeError:
    return Program(*functions, **static)
  return _cached_program(*functions, **static)


def _sums(state: Any) -> dict[str, Sum]:
  """Returns the losses that the last step evaluated."""
  evaluated = bj.diagnostics.evaluated(state)

  def one(name, value):
    wide = jnp.promote_types(jnp.result_type(value), jnp.float32)
    here = evaluated[name]
    # A loss that was not evaluated has an old value, which may be non-finite.
    total = jnp.where(here, value, 0).astype(wide)
    return Sum(total, here.astype(jnp.int32))

  return {name: one(name, value) for name, value in bj.values(state).items()}


def _nonfinite(params: Any, state: Any) -> list[tuple[str, chex.Array]]:
  # Sorted, since jax changes the order of the dicts in a state.
  items = sorted(bj.diagnostics.nonfinite(params, state).items())
  return [(name.removeprefix('sequence/'), bad) for name, bad in items]


def _culprit_names(params: Any, state: Any) -> tuple[str, ...]:
  """Returns the names of the arrays that are tested, also from shapes."""
  names = []
  find = lambda *trees: names.extend(name for name, _ in _nonfinite(*trees))
  jax.eval_shape(find, params, state)
  return tuple(names)


def check_metrics(
  metrics: Any, taken: Mapping[str, Any], function: Any = None
) -> None:
  """Raises unless metrics are a dict of scalars with unused names.

  Args:
    metrics: the metrics.
    taken: names that are in use.
    function: their function, for the error.
  """
  if not isinstance(metrics, dict):
    name = getattr(function, '__qualname__', type(function).__name__)
    raise TypeError(
      'evaluate returns a dict from metric to scalar, got '
      f'{type(metrics).__name__} from {name}.'
    )
  for name, value in metrics.items():
    if name in taken:
      raise ValueError(f'evaluate returns {name!r}, a name of the solver.')
    if jnp.shape(value):
      raise ValueError(
        f'metric {name!r} is a scalar for each seed, got shape '
        f'{jnp.shape(value)}.'
      )
