"""The compiled half of a training run: members, their carry, and a chunk.

A member is one seed, with its own data and hyperparameters if it has any.
Members share one compiled program: a `lax.scan` over the steps of a chunk whose
body maps over members. A member whose losses or params become non-finite is
frozen at its last finite params and state; the others do not notice.
"""

import functools
import itertools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj


class Context(NamedTuple):
  """What a function of a run sees: one member, one step.

  Attributes:
    data: shared by all members; a pytree of arrays.
    own: this member's own data, or ().
    hyper: this member's hyperparameters, or ().
    seed_key: PRNG key of the seed, the same at every step.
    key: PRNG key of this step; batches, evaluations and the initial params
      draw from different streams.
    step: steps taken so far, int32 scalar.
  """

  data: Any
  own: Any
  hyper: Any
  seed_key: chex.PRNGKey
  key: chex.PRNGKey
  step: chex.Array


class Best(NamedTuple):
  """The best params so far by the selecting metric, for every member.

  Attributes:
    params: params; leaves have a leading axis of members.
    step: when they were measured, int32 (members,).
    score: the metric then, (members,); -inf before the first finite one.
  """

  params: Any
  step: chex.Array
  score: chex.Array


class Carry(NamedTuple):
  """All that a run needs to go on.

  Attributes:
    params: params; leaves have a leading axis of members.
    state: the solver's state, likewise.
    step: steps taken, int32 scalar.
    stopped: the step that went non-finite, int32 (members,); -1 while going.
    culprits: what was non-finite then, bool (members, names).
    best: a `Best`, or () where no metric selects.
  """

  params: Any
  state: Any
  step: chex.Array
  stopped: chex.Array
  culprits: chex.Array
  best: Any


class Members(NamedTuple):
  """What tells members apart; every leaf has a leading axis of members."""

  seed: chex.Array
  own: Any
  hyper: Any


class Program(NamedTuple):
  """Functions to compile.

  Attributes:
    init: (members, data) -> `Carry`.
    chunk: (carry, members, data) -> (carry, metrics), after a chunk of steps.
    start: likewise, without taking a step.
    culprits: names of the columns of `Carry.culprits`, from (members, data).
  """

  init: Callable[..., Carry]
  chunk: Callable[..., tuple[Carry, dict[str, chex.Array]]]
  start: Callable[..., tuple[Carry, dict[str, chex.Array]]]
  culprits: Callable[..., tuple[str, ...]]


def members(
  seeds: int | Sequence[int], **grid: Sequence[float]
) -> tuple[tuple[int, ...], dict[str, chex.Array]]:
  """Crosses seeds with a grid of hyperparameters.

  Args:
    seeds: seeds, or their number.
    **grid: values for each hyperparameter.

  Returns:
    Seeds and hyperparameters of all members, for `train`. The first
    hyperparameter varies slowest and the seed fastest, so an array of members
    reshapes to (len(first), ..., len(last), len(seeds)).

  Example:
    >>> members(2, rate=(0.1, 0.2))[0]
    (0, 1, 0, 1)
  """
  seeds = as_seeds(seeds)
  rows = list(itertools.product(*grid.values(), seeds))
  columns = list(zip(*rows, strict=True))
  hyper = {
    name: jnp.asarray(column)
    for name, column in zip(grid, columns[:-1], strict=True)
  }
  return columns[-1], hyper


def as_seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
  """Seeds 0 to n - 1 for a number n, or the seeds as given.

  Raises:
    ValueError: if there is none, or one is not in [0, 2**32).
  """
  seeds = range(seeds) if isinstance(seeds, int) else seeds
  seeds = tuple(int(s) for s in seeds)
  if not seeds or any(not 0 <= s < 2**32 for s in seeds):
    raise ValueError(f'seeds are one or more of 0 ... 2**32 - 1, got {seeds}.')
  return seeds


def make_program(
  solver: Any,
  init: Callable[[Context], Any],
  batch: Callable[[Context], Any] | None,
  evaluate: Callable[[Context, Any, Any], dict[str, Any]] | None,
  *,
  chunk: int,
  select: str | None,
  at_once: int | None,
) -> Program:
  """Makes the functions of a run; see `train` for the arguments."""
  over_members = functools.partial(_over_members, at_once=at_once)

  def transformation(hyper) -> optax.GradientTransformationExtraArgs:
    return solver if hasattr(solver, 'update') else solver(hyper)

  def init_one(_, member, shared):
    context = _context(member, shared, 'init')
    params = init(context)
    return params, transformation(member.hyper).init(params)

  def step_one(mine, member, shared):
    params, state, stopped, culprits = mine
    context = _context(member, shared, 'batch')
    drawn = None if batch is None else batch(context)
    updates, new_state = transformation(member.hyper).update(
      drawn, state, params
    )
    new_params = bj.apply_updates(params, updates)
    bad = jnp.stack([x for _, x in _nonfinite(new_params, new_state)])
    going = stopped < 0
    fine = going & ~jnp.any(bad)
    keep = functools.partial(jnp.where, fine)
    return (
      jax.tree.map(keep, new_params, params),
      jax.tree.map(keep, new_state, state),
      jnp.where(going & ~fine, context.step, stopped),
      jnp.where(going, bad, culprits),
    )

  def advance_one(mine, member, shared):
    data, steps = shared

    def body(mine, step):
      return step_one(mine, member, (data, step)), None

    return jax.lax.scan(body, mine, steps)[0]

  def measure_one(mine, member, shared):
    params, state = mine
    context = _context(member, shared, 'evaluate')
    # Before the first step a solver's state holds no losses yet.
    metrics = {
      f'loss/{name}': jnp.where(context.step > 0, value, jnp.nan)
      for name, value in bj.values(state).items()
    }
    metrics |= {f'count/{n}': x for n, x in bj.counts(state).items()}
    measured = {} if evaluate is None else evaluate(context, params, state)
    _check_metrics(measured, metrics)
    return jax.tree.map(jnp.asarray, metrics | measured)

  def init_all(every, data):
    count = every.seed.shape[0]
    shared = (data, jnp.int32(0))
    params, state = over_members(init_one)((), every, shared)
    names = culprit_names(every, data)
    best = ()
    if select is not None:
      best = Best(
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
      best=best,
    )
    # A carry of weakly typed arrays would not match that of a later chunk.
    return jax.tree.map(
      lambda x: jax.lax.convert_element_type(x, x.dtype), carry
    )

  def culprit_names(every, data):
    names = []

    def find():
      shared = (data, jnp.int32(0))
      params, state = over_members(init_one)((), every, shared)
      names.extend(name for name, _ in _nonfinite(params, state))

    jax.eval_shape(find)
    return tuple(names)

  def run(carry, every, data, *, length):
    mine = (carry.params, carry.state, carry.stopped, carry.culprits)
    steps = carry.step + jnp.arange(length, dtype=jnp.int32)
    mine = over_members(advance_one)(mine, every, (data, steps))
    params, state, stopped, culprits = mine
    step = carry.step + length
    metrics = over_members(measure_one)((params, state), every, (data, step))
    best = carry.best
    if select is not None:
      if select not in metrics:
        known = ', '.join(sorted(metrics))
        raise ValueError(f'select={select!r} is none of the metrics: {known}.')
      score = jnp.where(stopped < 0, metrics[select], -jnp.inf)
      best = _update_best(best, Best(params, step, score))
    return Carry(params, state, step, stopped, culprits, best), metrics

  return Program(
    init=init_all,
    chunk=functools.partial(run, length=chunk),
    start=functools.partial(run, length=0),
    culprits=culprit_names,
  )


def _over_members(fn, *, at_once):
  return _by_vmap(fn) if at_once is None else _by_map(fn, at_once)


def _by_vmap(fn):
  # Shared arguments are not mapped: a product of shared data with the weights
  # of all members becomes one matrix product.
  return jax.vmap(fn, in_axes=(0, 0, None))


def _by_map(fn, size):
  # A batch of one would still be a vmap, which takes every branch.
  size = None if size == 1 else size

  def mapped(mine, every, shared):
    one = lambda each: fn(*each, shared)
    return jax.lax.map(one, (mine, every), batch_size=size)

  return mapped


def _context(member: Members, shared: Any, stream: str) -> Context:
  data, step = shared
  seed_key = jax.random.key(member.seed)
  # A long tag, so that fold_in(seed_key, 0, 1, ...) is free for other uses.
  tagged = jax.random.fold_in(seed_key, zlib.crc32(stream.encode()))
  key = jax.random.fold_in(tagged, step)
  return Context(data, member.own, member.hyper, seed_key, key, step)


def _nonfinite(params: Any, state: Any) -> list[tuple[str, chex.Array]]:
  # Sorted: the dicts in a state are in another order once jax has rebuilt them.
  found = sorted(bj.diagnostics.nonfinite(params, state).items())
  return [(name.removeprefix('sequence/'), bad) for name, bad in found]


def _check_metrics(measured: Any, taken: dict[str, Any]) -> None:
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


def _update_best(best: Best, now: Best) -> Best:
  score = now.score.astype(best.score.dtype)
  better = score > best.score  # Never true for NaN.

  def pick(new, old):
    return jnp.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)

  return Best(
    params=jax.tree.map(pick, now.params, best.params),
    step=jnp.where(better, now.step, best.step),
    score=jnp.where(better, score, best.score),
  )
