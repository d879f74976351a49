"""One objective an update: choose first, then evaluate that one alone."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _trees, states, types
from bilevel_jax.evaluation import _rules
from bilevel_jax.oracles import base

# An oracle for each objective, by name if they have names.
Oracles = (
  Mapping[str, optax.GradientTransformation]
  | Sequence[optax.GradientTransformation]
)
# From (batch, t) to a batch: one function, or one for each objective.
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
    selected: the place of the objective that the last update evaluated, an
      int32 scalar; -1 before the first.
    evaluated: by name of a loss, whether the last update evaluated it.
    rule: the state of the rule.
    report: counts of the evaluations of losses alone.
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
  """Oracles of several objectives, checked.

  Attributes:
    who: the wrapper, for errors.
    oracles: one for each objective.
    names: likewise.
    moves: the sequences that each of them moves, None if they do not say.
  """

  who: str
  oracles: tuple[base.Oracle, ...]
  names: tuple[str, ...]
  moves: tuple[str, ...] | None

  def like(self, oracles: Iterable[Any]) -> Any:
    """Other oracles in the form in which these were given."""
    return dict(zip(self.names, oracles, strict=True))

  def batches(self, batch: Any, taken: Sequence[Any], at: Any) -> Any:
    """From an index to the objective's own batch.

    Args:
      batch: of the wrapper.
      taken: how often each objective was evaluated so far.
      at: `batch_at` of the wrapper, None for a batch of batches.
    """
    if callable(at):
      return lambda i: at(batch, taken[i])
    if at is not None:
      return lambda i: self._of(at, i, 'batch_at')(batch, taken[i])
    return lambda i: self._of(batch, i, 'the batch')

  def given_by(self, batch: Any) -> int:
    """The place of the only objective that a batch is of."""
    if isinstance(batch, Mapping) and len(batch) == 1:
      (name,) = batch
      if name in self.names:
        return self.names.index(name)
    held = sorted(map(str, batch)) if isinstance(batch, Mapping) else ''
    raise TypeError(
      f'{self.who}: with the rule as_given, the batch is a dict of one batch, '
      f'by one of the names {self.names}; got {type(batch).__name__} {held}.'
    )

  def _of(self, given: Any, index: int, what: str) -> Any:
    names = self.names
    if isinstance(given, Mapping):
      if set(given) != set(names):
        raise TypeError(
          f'{self.who}: {what} has the names {sorted(map(str, given))}, the '
          f'objectives are {names}: {_OWN}.'
        )
      return given[names[index]]
    if not isinstance(given, tuple | list) or len(given) != len(names):
      size = f' of {len(given)}' if isinstance(given, tuple | list) else ''
      raise TypeError(
        f'{self.who}: {what} is a {type(given).__name__}{size}, but there are '
        f'{len(names)} objectives {names}: {_OWN}.'
      )
    return given[index]


_OWN = (
  'give a tuple of one for each, or a dict by name; or, where all see the same '
  'batch, batch_at=lambda batch, t: batch'
)


def objectives(who: str, oracles: Oracles) -> Objectives:
  """Checks the oracles of a wrapper of several.

  Raises:
    TypeError: if one of them is no oracle.
    ValueError: if there are none, or they say that they move other sequences.
  """
  named = isinstance(oracles, Mapping)
  parts = tuple(oracles.values() if isinstance(oracles, Mapping) else oracles)
  names = tuple(oracles) if named else ()
  names = names or tuple(f'objective_{i}' for i in range(len(parts)))
  if not parts:
    raise ValueError(f'{who} takes at least one oracle.')
  for name, part in zip(names, parts):
    if not isinstance(part, optax.GradientTransformation):
      raise TypeError(
        f'{who}: {name} is a {type(part).__name__}, expected an oracle: '
        f'bj.gradient(loss, name={name!r}) for instance.'
      )
  parts = tuple(map(base.as_oracle, parts))
  declared = [part.moves for part in parts]
  said = [frozenset(d) for d in declared if d is not None]
  if len(set(said)) > 1:
    raise ValueError(apart(who, names, declared))
  moves = None if None in declared else declared[0]
  return Objectives(who, parts, names, moves)


def apart(who: str, names: Iterable[str], found: Iterable[Any]) -> str:
  """What to say of oracles whose gradients are of different forms."""
  told = '; '.join(f'{n}: {f}' for n, f in zip(names, found))
  return (
    f'{who}: the oracles do not move the same sequences, or not in the same '
    f'form, so that no step can be of either ({told}): let each give a '
    'gradient for all that any of them moves, by bj.gradient(loss, of=[...]).'
  )


def averaged(given: Objectives, again: Callable[[Any], Any]) -> Any:
  """The form of a wrapper in which each objective is a mean over parts."""
  if not all(map(base.has_mean, given.oracles)):
    return None
  return lambda mean: again(
    given.like(base.take_mean(part, mean, given.who) for part in given.oracles)
  )


def _evaluated(chosen: chex.Array, inner: Any) -> dict[str, chex.Array]:
  """By name of a loss, whether its objective is chosen and evaluates it."""
  flags: dict[str, chex.Array] = {}
  for here, state in zip(chosen, inner, strict=True):
    for node in states.nodes_with(state, 'values'):
      flags |= dict.fromkeys(node.values, here)
    for node in states.nodes_with(state, 'evaluated', nested=False):
      flags |= {name: here & flag for name, flag in node.evaluated.items()}
  return flags


def _loss(who: str, name: str, state: Any) -> chex.Array:
  """The first loss that an oracle has measured."""
  for values, _ in states.measured(state):
    if values is not None:
      return values.array[0]
  raise TypeError(
    f'{who}: the oracle of {name} measures no loss, by which its rule chooses: '
    'name one in bj.oracle(fn, names).'
  )


def select(
  oracles: Oracles,
  rule: _rules.Rule,
  *,
  batch_at: BatchAt | None = None,
  refresh_at: BatchAt | None = None,
) -> base.Oracle:
  r"""Evaluates one of several objectives: an update at the price of one.

  .. math::
    d_k = \nabla f_{m_k}(z_k; \xi^{m_k}), \qquad m_k \text{ by a rule}

  The rule chooses before anything is evaluated, and the program branches: what
  is not chosen is neither computed nor held in memory. So any number of
  objectives, each with its own data, are trained at the cost of one, with one
  state of the optimiser behind. `at_random` draws the objective, which in
  expectation is the step on a weighted sum (`mixed`); `largest_gap` takes the
  one that is furthest from its optimum; `in_sequence` goes in stages; with
  `as_given`, whoever reads the data has chosen.

  Under `jax.vmap`, over seeds for instance, a branch becomes a selection among
  all branches that are computed: map over seeds by `jax.lax.map`, or give all
  of them one key.

  Args:
    oracles: one for each objective, in a sequence or by name. They give
      gradients of one structure.
    rule: which is next.
    batch_at: the batch of an objective, from (batch, t), t being how often it
      was evaluated so far, an int32 scalar: one function, or one for each. It
      is called for the objective that is chosen only, so that only its stream
      moves on. By default the batch is a tuple of one batch for each objective,
      or a dict by name.
    refresh_at: likewise, what losses are evaluated on where the rule asks for
      all of them; by default the batches that would be next.

  Returns:
    An oracle. `bj.counts` has the gradients of the objective chosen, and under
    `losses/` evaluations without gradient; `bj.values` has the losses last
    measured, and `bj.diagnostics.evaluated` which of them the last update
    evaluated. The state has the place of its objective, in `selected`.

  Raises:
    TypeError: if an oracle is none; at the call, if the batch does not have a
      part for each objective, or a rule chooses by losses that an oracle does
      not measure.
    ValueError: if there are no oracles, or they move different sequences; at
      init, if the rule is for another number of objectives.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> fit = lambda x, rows: jnp.mean((x - rows) ** 2)
    >>> oracle = bj.evaluation.select(
    ...   {name: bj.gradient(fit, name=name) for name in ('left', 'right')},
    ...   bj.evaluation.at_random([0.5, 0.5], key=0, even=True),
    ...   batch_at=lambda data, t: data[t % 4],  # Of either one's own place.
    ... )
    >>> solver = optax.chain(oracle, optax.sgd(0.05))
    >>> params, data = jnp.float32(0.0), jnp.array([1.0, 2.0, 3.0, 2.0])
    >>> state, step = solver.init(params), jax.jit(solver.update)
    >>> for _ in range(100):
    ...   updates, state = step(data, state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> print(params.round(1), bj.counts(state))
    2.0 {'gradients/left': 49, 'gradients/right': 51}

  References:
    Fernando, Shen, Ram, Zhou, Samulowitz, Baracaldo and Chen, `Understanding
    Forgetting in LLM Supervised Fine-Tuning and Preference Learning - A Convex
    Optimization Perspective <https://arxiv.org/abs/2410.15483>`_, 2024.
  """
  who = 'select'
  given = objectives(who, oracles)
  parts = given.oracles
  number, by_loss = len(parts), rule.refresh_every is not None
  if rule.choose is None and batch_at is not None:
    raise ValueError(
      f'{who}: the batch says of which objective it is, so that there is no '
      'choice for batch_at to follow: leave it out.'
    )
  counters = [f'losses/{name}' for name in given.names] if by_loss else []

  def init_fn(params):
    dtype = _trees.widest_dtype(params)
    inner = tuple(part.init(params) for part in parts)
    nothing = jnp.zeros([number], bool)
    return SelectState(
      count=jnp.zeros([], jnp.int32),
      taken=jnp.zeros([number], jnp.int32),
      selected=jnp.int32(-1),
      evaluated=_evaluated(nothing, inner),
      rule=rule.init(number, dtype),
      report=states.OracleState(
        None, types.named(counters, jnp.zeros([len(counters)], jnp.int32))
      ),
      inner=inner,
    )

  def update_fn(batch, state, params=None, **extra_args):
    base.require_batch(batch, params)
    dtype = _trees.widest_dtype(params)

    def evaluate(i, own):
      found, after = parts[i].update(
        own(i), state.inner[i], params, **extra_args
      )
      loss = jnp.zeros([], dtype)
      if by_loss:
        loss = _loss(who, given.names[i], after).astype(dtype)
      inner = (*state.inner[:i], after, *state.inner[i + 1 :])
      return found, loss, inner

    counts, learnt = state.report.counts, state.rule
    if by_loss:
      at = batch_at if refresh_at is None else refresh_at
      rows = given.batches(batch, state.taken, at)

      def anew(before):
        # Gradients that nobody takes are not computed.
        losses = jnp.stack([evaluate(i, rows)[1] for i in range(number)])
        everything = jnp.ones([number], bool)
        return rule.record(before, losses, everything, True, state.count)

      due = state.taken.sum() % rule.refresh_every == 0
      learnt = jax.lax.cond(due, anew, lambda before: before, learnt)
      counts = states.add_counts(counts, dict.fromkeys(counters, due))
    if rule.choose is None:
      index = jnp.int32(place := given.given_by(batch))
      found, loss, inner = evaluate(place, lambda i: batch[given.names[i]])
    else:
      index, learnt = rule.choose(learnt, state.count, state.taken)
      own = given.batches(batch, state.taken, batch_at)
      branches = [lambda i=i: evaluate(i, own) for i in range(number)]
      try:
        found, loss, inner = jax.lax.switch(index, branches)
      except TypeError as error:
        forms = [str(jax.eval_shape(branch)[0]) for branch in branches]
        if len(set(forms)) == 1:
          raise
        raise ValueError(apart(who, given.names, forms)) from error
    chosen = jnp.arange(number) == index
    learnt = rule.record(
      learnt, jnp.full([number], loss), chosen, False, state.count
    )
    return found, SelectState(
      optax.safe_increment(state.count),
      state.taken + chosen,
      index,
      _evaluated(chosen, inner),
      learnt,
      state.report._replace(counts=counts),
      inner,
    )

  again = lambda others: select(
    others, rule, batch_at=batch_at, refresh_at=refresh_at
  )
  return base.Oracle(
    init_fn,
    update_fn,
    given.moves,
    averaged=averaged(given, again),
    within=lambda wrapper: again(
      given.like(base.around(part, wrapper) for part in parts)
    ),
  )
