"""One objective per update: chosen first, then evaluated without the others."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _trees, states, types
from bilevel_jax.evaluation import _rules
from bilevel_jax.oracles import base

# An oracle for each objective, optionally by name.
Oracles = (
  Mapping[str, optax.GradientTransformation]
  | Sequence[optax.GradientTransformation]
)
# Maps (batch, t) to an objective's batch: one function, or one per objective.
BatchAt = (
  Callable[[Any, Any], Any]
  | Mapping[str, Callable[[Any, Any], Any]]
  | Sequence[Callable[[Any, Any], Any]]
)


@states.counts_updates
class SelectState(NamedTuple):
  """State of `select`.

  Attributes:
    count: updates of the solver so far, an int32 scalar, for schedules.
    taken: how often each objective was evaluated, int32, (objectives,).
    selected: index of the objective that the last update evaluated, an int32
      scalar; -1 before the first.
    evaluated: by name of a loss, whether the last update evaluated it.
    rule: the state of the rule.
    report: counts of loss evaluations without gradients.
    inner: the states of the oracles.
  """

  count: chex.Array
  taken: chex.Array
  selected: chex.Array
  evaluated: dict[str, chex.Array]
  rule: Any
  report: states.OracleState
  inner: Any


class Objectives(NamedTuple):
  """The checked oracles of several objectives.

  Attributes:
    caller: the wrapper's name, for errors.
    oracles: one for each objective.
    names: one for each objective.
    moves: the sequences that every oracle moves; None if not declared.
  """

  caller: str
  oracles: tuple[base.Oracle, ...]
  names: tuple[str, ...]
  moves: tuple[str, ...] | None

  def like(self, oracles: Iterable[Any]) -> Any:
    """Other oracles by the names of the objectives."""
    return dict(zip(self.names, oracles, strict=True))

  def batches(self, batch: Any, taken: Sequence[Any], at: Any) -> Any:
    """A function from an objective's index to its batch.

    Args:
      batch: the wrapper's batch.
      taken: how often each objective was evaluated so far.
      at: the wrapper's `batch_at`; None if the batch has one per objective.
    """
    if callable(at):
      return lambda i: at(batch, taken[i])
    if at is not None:
      return lambda i: self._item(at, i, 'batch_at')(batch, taken[i])
    return lambda i: self._item(batch, i, 'the batch')

  def index_from(self, batch: Any) -> int:
    """The index of the objective that names the only entry of a batch."""
    if isinstance(batch, Mapping) and len(batch) == 1:
      (name,) = batch
      if name in self.names:
        return self.names.index(name)
    keys = sorted(map(str, batch)) if isinstance(batch, Mapping) else ''
    raise TypeError(
      f'{self.caller}: with the rule as_given, the batch is a dict of one '
      f'batch, by one of the names {self.names}; got {type(batch).__name__} '
      f'{keys}.'
    )

  def _item(self, items: Any, index: int, what: str) -> Any:
    names = self.names
    if isinstance(items, Mapping):
      if set(items) != set(names):
        raise TypeError(
          f'{self.caller}: {what} has the names {sorted(map(str, items))}, the '
          f'objectives are {names}: {_REMEDY}.'
        )
      return items[names[index]]
    if not isinstance(items, tuple | list) or len(items) != len(names):
      size = f' of {len(items)}' if isinstance(items, tuple | list) else ''
      raise TypeError(
        f'{self.caller}: {what} is a {type(items).__name__}{size}, but there '
        f'are {len(names)} objectives {names}: {_REMEDY}.'
      )
    return items[index]


_REMEDY = (
  'pass a tuple with one entry per objective or a dict by name; if all use the '
  'same batch, batch_at=lambda batch, t: batch'
)


def objectives(caller: str, oracles: Oracles) -> Objectives:
  """Checks the oracles of a wrapper of several oracles.

  Raises:
    TypeError: if an entry is not an oracle.
    ValueError: if there is no oracle, or they move different sequences.
  """
  named = isinstance(oracles, Mapping)
  parts = tuple(oracles.values() if isinstance(oracles, Mapping) else oracles)
  names = tuple(oracles) if named else ()
  names = names or tuple(f'objective_{i}' for i in range(len(parts)))
  if not parts:
    raise ValueError(f'{caller} takes at least one oracle.')
  for name, part in zip(names, parts):
    if not isinstance(part, optax.GradientTransformation):
      raise TypeError(
        f'{caller}: {name} is a {type(part).__name__}, expected an oracle: '
        f'bj.gradient(loss, name={name!r}) for instance.'
      )
  parts = tuple(map(base.as_oracle, parts))
  declared = [part.moves for part in parts]
  if len({frozenset(d) for d in declared if d is not None}) > 1:
    raise ValueError(mismatch(caller, names, declared))
  moves = None if None in declared else declared[0]
  return Objectives(caller, parts, names, moves)


def mismatch(caller: str, names: Iterable[str], forms: Iterable[Any]) -> str:
  """The error message for oracles whose gradients differ in structure."""
  pairs = '; '.join(f'{n}: {f}' for n, f in zip(names, forms))
  return (
    f'{caller}: the oracles do not move the same sequences, or their gradients '
    f'differ in structure ({pairs}): let each oracle return a gradient for '
    'every sequence that any of them moves, by bj.gradient(loss, of=[...]).'
  )


def averaged(objectives: Objectives, again: Callable[[Any], Any]) -> Any:
  """The wrapper of averaged oracles; None if an oracle cannot be averaged."""
  if not all(map(base.has_mean, objectives.oracles)):
    return None
  return lambda mean: again(
    objectives.like(
      base.take_mean(part, mean, objectives.caller)
      for part in objectives.oracles
    )
  )


def _evaluated(chosen: chex.Array, inner: Any) -> dict[str, chex.Array]:
  """Whether each loss, by name, was evaluated by its chosen objective."""
  flags: dict[str, chex.Array] = {}
  for here, state in zip(chosen, inner, strict=True):
    for node in states.nodes_with(state, 'values'):
      flags |= dict.fromkeys(node.values, here)
    for node in states.nodes_with(state, 'evaluated', nested=False):
      flags |= {name: here & flag for name, flag in node.evaluated.items()}
  return flags


def _loss(name: str, state: Any) -> chex.Array:
  """The first loss that an oracle measured."""
  for values, _ in states.measured(state):
    if values is not None:
      return values.array[0]
  raise TypeError(
    f'select: the rule chooses by losses, but the oracle of {name} measures no '
    'loss: name one in bj.oracle(fn, names).'
  )


def select(
  oracles: Oracles,
  rule: _rules.Rule,
  *,
  batch_at: BatchAt | None = None,
  refresh_at: BatchAt | None = None,
) -> base.Oracle:
  r"""Evaluates one of several objectives per update, chosen by a rule.

  .. math::
    d_k = \nabla f_{m_k}(z_k; \xi^{m_k}), \qquad m_k \text{ by a rule}

  The rule chooses first and the program branches, so the other objectives are
  neither computed nor held in memory: training on any number of objectives,
  each with its own data, costs as much as training on one, and they share one
  optimiser state. `at_random` draws the objective, so the expected step is that
  on a weighted sum (`mixed`); `largest_gap` takes the objective furthest from
  its optimum; `in_sequence` trains in stages; with `as_given` the data loader
  chooses.

  Under `jax.vmap`, over seeds for instance, all branches are computed and one
  is selected: map over seeds by `jax.lax.map`, or use the same key for all.

  Args:
    oracles: one for each objective, in a sequence or by name. Their gradients
      have the same structure.
    rule: how the next objective is chosen.
    batch_at: maps (batch, t) to an objective's batch, where t is how often the
      objective was evaluated so far, an int32 scalar: one function, or one for
      each objective. It is called only for the chosen objective, so only that
      data stream advances. By default the batch is a tuple with one batch per
      objective, or a dict by name.
    refresh_at: the same for the evaluations of all losses that a rule asks for;
      by default the next batch of each objective.

  Returns:
    An oracle. `bj.counts` has the gradients of the chosen objectives and, under
    `losses/`, the evaluations without gradients; `bj.values` has the latest
    losses and `bj.diagnostics.evaluated` tells which of them the last update
    evaluated. `selected` of the state is the index of the chosen objective.

  Raises:
    TypeError: if an entry is not an oracle; at the call, if the batch lacks a
      part for an objective, or the rule needs a loss that an oracle does not
      measure.
    ValueError: if there is no oracle, or they move different sequences; at
      init, if the rule is for another number of objectives.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> fit = lambda x, rows: jnp.mean((x - rows) ** 2)
    >>> oracle = bj.evaluation.select(
    ...   {name: bj.gradient(fit, name=name) for name in ('left', 'right')},
    ...   bj.evaluation.at_random([0.5, 0.5], key=0, even=True),
    ...   batch_at=lambda data, t: data[t % 4],
    ... )
    >>> solver = optax.chain(oracle, optax.sgd(0.05))
    >>> params, data = jnp.float32(0.0), jnp.array([1.0, 2.0, 3.0, 2.0])
    >>> state, step = solver.init(params), jax.jit(solver.update)
    >>> for _ in range(100):
    ...   updates, state = step(data, state, params)
    ...   params = bj.apply_updates(params, updates)
    >>> print(params.round(1), bj.counts(state))
    2.0 {'gradients/left': 49, 'gradients/right': 51}

  References:
    Fernando, Shen, Ram, Zhou, Samulowitz, Baracaldo and Chen, `Understanding
    Forgetting in LLM Supervised Fine-Tuning and Preference Learning - A Convex
    Optimization Perspective <https://arxiv.org/abs/2410.15483>`_, 2024.
  """
  checked = objectives('select', oracles)
  parts, names = checked.oracles, checked.names
  number, by_loss = len(parts), rule.refresh_every is not None
  if rule.choose is None and batch_at is not None:
    raise ValueError(
      'select: with the rule as_given the batch names its objective, so '
      'batch_at has no effect: leave it out.'
    )
  counters = [f'losses/{name}' for name in names] if by_loss else []

  def init_fn(params):
    dtype = _trees.widest_dtype(params)
    inner = tuple(part.init(params) for part in parts)
    no_objective = jnp.zeros([number], bool)
    return SelectState(
      count=jnp.zeros([], jnp.int32),
      taken=jnp.zeros([number], jnp.int32),
      selected=jnp.int32(-1),
      evaluated=_evaluated(no_objective, inner),
      rule=rule.init(number, dtype),
      report=states.OracleState(
        None, types.named(counters, jnp.zeros([len(counters)], jnp.int32))
      ),
      inner=inner,
    )

  def update_fn(batch, state, params=None, **extra_args):
    base.require_batch(batch, params)
    dtype = _trees.widest_dtype(params)

    def evaluate(i, batch_at_index):
      gradients, after = parts[i].update(
        batch_at_index(i), state.inner[i], params, **extra_args
      )
      loss = jnp.zeros([], dtype)
      if by_loss:
        loss = _loss(names[i], after).astype(dtype)
      inner = (*state.inner[:i], after, *state.inner[i + 1 :])
      return gradients, loss, inner

    counts, rule_state = state.report.counts, state.rule
    if by_loss:
      at = batch_at if refresh_at is None else refresh_at
      refresh_batches = checked.batches(batch, state.taken, at)

      def refresh(before):
        # XLA removes the gradients, which are unused here.
        losses = [evaluate(i, refresh_batches)[1] for i in range(number)]
        every = jnp.ones([number], bool)
        return rule.record(before, jnp.stack(losses), every, True, state.count)

      due = state.taken.sum() % rule.refresh_every == 0
      rule_state = jax.lax.cond(due, refresh, lambda before: before, rule_state)
      counts = states.add_counts(counts, dict.fromkeys(counters, due))
    if rule.choose is None:
      i = checked.index_from(batch)
      index = jnp.int32(i)
      gradients, loss, inner = evaluate(i, lambda i: batch[names[i]])
    else:
      index, rule_state = rule.choose(rule_state, state.count, state.taken)
      batches = checked.batches(batch, state.taken, batch_at)
      branches = [lambda i=i: evaluate(i, batches) for i in range(number)]
      try:
        gradients, loss, inner = jax.lax.switch(index, branches)
      except TypeError as error:
        forms = [str(jax.eval_shape(branch)[0]) for branch in branches]
        if len(set(forms)) == 1:
          raise
        raise ValueError(mismatch('select', names, forms)) from error
    chosen = jnp.arange(number) == index
    rule_state = rule.record(
      rule_state, jnp.full([number], loss), chosen, False, state.count
    )
    return gradients, SelectState(
      optax.safe_increment(state.count),
      state.taken + chosen,
      index,
      _evaluated(chosen, inner),
      rule_state,
      state.report._replace(counts=counts),
      inner,
    )

  again = lambda others: select(
    others, rule, batch_at=batch_at, refresh_at=refresh_at
  )
  return base.Oracle(
    init_fn,
    update_fn,
    checked.moves,
    averaged=averaged(checked, again),
    within=lambda wrapper: again(
      checked.like(base.around(part, wrapper) for part in parts)
    ),
  )
