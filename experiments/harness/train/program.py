"""The compiled half of a training run: members, their carry, and a chunk.

Members share one compiled program: a `lax.scan` over the steps of a chunk whose
body maps over members. Of several, one whose losses or params become non-finite
is frozen at its last finite params and state; the others do not notice. To
freeze takes a second copy of all that a step changes, so a member that is alone
goes on to the end of its chunk, and is not saved.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj
from experiments.harness.store import loading as saved
from experiments.harness.train import context as context_lib
from experiments.harness.train.context import Context, context_of


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


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
  """Functions to compile, and what has been compiled of them.

  Attributes:
    init: (members, shared) -> `Carry`.
    chunk: (carry, members, shared, length=) -> (carry, metrics), after so many
      steps; 0 measures only.
    step: (carry, members, shared, streamed) -> carry, after one step.
    choose: (best, params, step, score) -> `Best`, with what is better now.
    culprits: names of the columns of `Carry.culprits`, from a carry's shapes.
    freezes: whether a carry holds the last finite params of what has stopped.
  """

  init: Callable[..., Carry]
  chunk: Callable[..., tuple[Carry, dict[str, chex.Array]]]
  step: Callable[..., Carry]
  choose: Callable[..., saved.Best]
  culprits: Callable[[Carry], tuple[str, ...]]
  freezes: bool
  _jitted: dict[Any, Any] = dataclasses.field(default_factory=dict)

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


# Programs that are remembered: those of a method and of the one before.
_REMEMBERED = 8


def program_of(*functions: Any, **static: Any) -> Program:
  """The program of some functions: for the same ones, the same program.

  As for `jax.jit`, functions are the same if they are equal, not if they do the
  same. Takes what `make_program` does.
  """
  try:
    hash(functions)
  except TypeError:
    return make_program(*functions, **static)
  return _remembered(*functions, **static)


def make_program(
  solver: Any,
  init: Callable[[Context], Any],
  batch: Callable[[Context], Any] | None,
  evaluate: Callable[[Context, Any, Any], dict[str, Any]] | None,
  *,
  count: int,
  select: bool = False,
  loss_last: bool = False,
  at_once: int | None = None,
) -> Program:
  """Makes the functions of a run of `count` members; see `train`."""
  over_members = functools.partial(context_lib.over_members, at_once=at_once)
  freezes = count > 1

  def transformation(member, shared) -> optax.GradientTransformationExtraArgs:
    if hasattr(solver, 'update'):
      return solver
    return solver(context_of(member, shared, 'solver', 0))

  def init_one(_, member, shared):
    params = init(context_of(member, shared, 'init', jnp.int32(0)))
    state = transformation(member, shared).init(params)
    return (
      params,
      state,
      jax.tree.map(jnp.zeros_like, _sums(state)),
    )

  def step_one(mine, member, shared, step, streamed=None):
    params, state, losses, stopped, culprits = mine
    context = context_of(member, shared, 'batch', step, streamed)
    drawn = streamed if batch is None else batch(context)
    updates, new_state = transformation(member, shared).update(
      drawn, state, params
    )
    new_params = bj.apply_updates(params, updates)
    losses = jax.tree.map(jnp.add, losses, _sums(new_state))
    bad = jnp.stack([x for _, x in _nonfinite(new_params, new_state)])
    going = stopped < 0
    fine = going & ~jnp.any(bad)
    if freezes:
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

  def advance_one(mine, member, given):
    shared, steps = given

    def body(mine, step):
      return step_one(mine, member, shared, step), None

    return jax.lax.scan(body, mine, steps)[0]

  def streamed_one(mine, member, given):
    return step_one(mine, member, *given)

  def measure_one(mine, member, given):
    params, state, losses = mine
    shared, step = given
    context = context_of(member, shared, 'evaluate', step)
    metrics = {f'loss/{name}': total.mean() for name, total in losses.items()}
    if loss_last:
      # Before the first step a solver has measured no losses yet.
      metrics |= {
        f'loss_last/{name}': jnp.where(step > 0, total.mean(), jnp.nan)
        for name, total in _sums(state).items()
      }
    metrics |= {f'count/{n}': x for n, x in bj.counts(state).items()}
    measured = {} if evaluate is None else evaluate(context, params, state)
    check_metrics(measured, metrics)
    return jax.tree.map(jnp.asarray, metrics | measured)

  def init_all(every, shared):
    params, state, losses = over_members(init_one)((), every, shared)
    names = _culprit_names(params, state)
    best = ()
    if select:
      best = saved.Best(
        params=params,
        step=jnp.zeros(count, jnp.int32),
        score=jnp.full(count, -jnp.inf),
      )
    carry = Carry(
      params=params,
      state=state,
      step=jnp.int32(0),
      stopped=jnp.full(count, -1, jnp.int32),
      culprits=jnp.zeros((count, len(names)), bool),
      losses=losses,
      best=best,
    )
    # A carry of weakly typed arrays would not match that of a later chunk.
    return jax.tree.map(
      lambda x: jax.lax.convert_element_type(x, x.dtype), carry
    )

  def move(fn, carry, every, given, length):
    mine = carry.params, carry.state, carry.losses
    mine = over_members(fn)(
      (*mine, carry.stopped, carry.culprits), every, given
    )
    params, state, losses, stopped, culprits = mine
    return carry._replace(
      params=params,
      state=state,
      step=carry.step + length,
      stopped=stopped,
      culprits=culprits,
      losses=losses,
    )

  def step(carry, every, shared, streamed):
    return move(streamed_one, carry, every, (shared, carry.step, streamed), 1)

  def chunk(carry, every, shared, *, length):
    if length:
      steps = carry.step + jnp.arange(length, dtype=jnp.int32)
      carry = move(advance_one, carry, every, (shared, steps), length)
    metrics = over_members(measure_one)(
      (carry.params, carry.state, carry.losses),
      every,
      (shared, carry.step),
    )
    zeros = jax.tree.map(jnp.zeros_like, carry.losses)
    return carry._replace(losses=zeros), metrics

  return Program(
    init=init_all,
    chunk=chunk,
    step=step,
    choose=_choose,
    culprits=lambda carry: _culprit_names(carry.params, carry.state),
    freezes=freezes,
  )


_remembered = functools.lru_cache(_REMEMBERED)(make_program)


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


def _choose(
  best: saved.Best, params: Any, step: Any, score: chex.Array
) -> saved.Best:
  better = score > best.score  # Never true for NaN.

  def pick(new, old):
    return jnp.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)

  return saved.Best(
    params=jax.tree.map(pick, params, best.params),
    step=jnp.where(better, step, best.step),
    score=jnp.where(better, score, best.score),
  )
