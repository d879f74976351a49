"""Building blocks of oracles and of their wrappers.

An oracle turns a batch into gradients. It evaluates losses and has no step
size. Warm starts, memories and keys are in its state, which is checkpointed,
vmapped and sharded like the state of an optimiser. Oracles count their
evaluations.

To write an oracle, call `oracle` with a function that evaluates losses and
gradients. To write a wrapper of oracles, use `wrapped`, and
`bilevel_jax.states` for changes to the states of its evaluations.

A batch may be evaluated in parts, in turn or one on each device. The gradient
of a mean loss is the mean of its gradients on the parts. A hypergradient is
not, because it divides by a Hessian. So an oracle declares whether it is
`linear` in its samples. If it is not, it may have a form `averaged`, in which
each evaluation of its losses is a `Mean` over the parts.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _sequences, _trees, states, types
from bilevel_jax.oracles import _misuse
from bilevel_jax.oracles._loss import Loss as Loss
from bilevel_jax.oracles._loss import checked_losses as checked_losses
from bilevel_jax.oracles._loss import checked_upper as checked_upper
from bilevel_jax.oracles._misuse import require_batch as require_batch
from bilevel_jax.parts import Oracle, around, as_oracle

# The cost of one evaluation, by `kind/loss`.
Cost = Mapping[str, chex.Numeric]


class Mean(NamedTuple):
  """A mean of functions of a batch, over its parts or over devices.

  Attributes:
    of: `of(fn, batch, *at)` is the mean of `fn(part, *at)` over the parts, any
      pytree; leaves that are not floats are those of the last part. `fn` takes
      the variables that it differentiates from `at`, because on several devices
      the derivative in a shared value can be a sum over the devices. Forward
      derivatives of the mean are right: `jax.linearize` needs the memory of one
      part.
    linear: from an oracle that is linear in its samples to its mean.
    parts: the number of evaluations of one part, for counts.
  """

  of: Callable[..., Any]
  linear: Callable[[Any], Any]
  parts: int = 1


# Evaluates a batch in one part.
WHOLE = Mean(lambda fn, batch, *at: fn(batch, *at), lambda one: one)


class ByMean(NamedTuple):
  """The function of an oracle whose losses, not results, are averaged.

  Attributes:
    fn: as for `oracle`, with a `Mean` as its first argument, by which it
      evaluates its losses; `WHOLE` for a batch in one part.
  """

  fn: Callable[[Mean, Any, Any, Any], Any]


def oracle(
  fn: Callable[[Any, Any, Any], Any] | ByMean,
  names: Sequence[str],
  init: Callable[[Any], Any] = lambda params: (),
  *,
  counts: Cost | Callable[[Any], Cost] | None = None,
  moves: Iterable[str] | None = None,
  needs: Sequence[str] | None = None,
  outputs: Callable[[Any], Any] | None = None,
  linear: bool = False,
) -> Oracle:
  """Makes an oracle from a function that evaluates losses and gradients.

  Args:
    fn: `fn(params, batch, inner) -> (values, gradients, inner)`. `values` are
      scalars in the order of `names`; `gradients` have the structure of the
      parameters with None for a sequence that does not move, or are a
      `Jacobian`. An optional fourth result is the cost of this evaluation
      beyond `counts`, by the same names. With `outputs`, the last result is the
      auxiliary outputs. An oracle that is not linear may have a `ByMean`.
    names: a name for each value.
    init: from the parameters to the first `inner`.
    counts: the cost of one evaluation, for instance
      `{'gradients/lower': 1, 'hessian_vector_products/lower': 1}`, or a
      function from the parameters to the cost.
    moves: names of the sequences that get a gradient; None for all of them.
    needs: names of the sequences that the parameters must have; by default
      those in `moves`.
    outputs: a function from the parameters to a pytree with the structure of
      the auxiliary outputs; None without outputs.
    linear: whether the gradient of a batch is the mean of the gradients of its
      parts. Wrappers that take means require it.

  Returns:
    An oracle; `update(batch, state, params)` gives gradients and an
    `OracleState`.

  Raises:
    TypeError: at init, if a leaf of the parameters is not a real number; at
      the call, if the parameters are missing or have other sequences, or if
      the batch has the type of the parameters.
    ValueError: at the call, if `fn` returns another number of values.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp, optax
    >>> def fn(params, batch, inner):
    ...   error = params - batch
    ...   return (jnp.vdot(error, error) / 2,), error, inner
    >>> solver = optax.chain(bj.oracle(fn, ('loss',)), optax.sgd(0.5))
    >>> params = jnp.array([1.0, 3.0])
    >>> updates, state = solver.update(jnp.ones(2), solver.init(params), params)
    >>> print(updates, bj.values(state)['loss'])
    [-0. -1.] 2.0
  """
  names = tuple(names)
  moves = None if moves is None else tuple(moves)
  required = tuple(moves or ()) if needs is None else tuple(needs)
  cost = counts if callable(counts) else lambda params: counts or {}

  def init_fn(params):
    _misuse.refuse_around()
    _trees.require_real(params)
    if required:
      _sequences.require_sequences(params, required, 'an oracle')
    kinds = tuple(cost(params))
    return states.OracleState(
      types.named(names, _trees.zeros(len(names), _trees.widest_dtype(params))),
      types.named(kinds, _trees.zeros(len(kinds), jnp.int32)),
      init(params),
      () if outputs is None else outputs(params),
    )

  def make(fn, parts):
    def update_fn(batch, state, params=None, **extra_args):
      del extra_args
      require_batch(batch, params)
      if required:
        _sequences.require_sequences(params, required, 'an oracle')
      results: Any = fn(params, batch, state.inner)
      values, gradients, inner, *more = results
      if len(values) != len(names):
        raise ValueError(
          f'the oracle names {len(names)} values {names} but returned '
          f'{len(values)}.'
        )
      aux = state.outputs
      if outputs is not None:
        aux = as_announced(more.pop(), aux)
      spent = cost(params)
      if more:
        spent = {n: spent.get(n, 0) + more[0].get(n, 0) for n in spent}
      dtype = state.values.array.dtype if names else None
      measured = [jnp.asarray(value, dtype) for value in values]
      return gradients, states.OracleState(
        types.named(names, jnp.stack(measured) if measured else None),
        states.add_counts(state.counts, _on_parts(spent, parts)),
        inner,
        aux,
      )

    return Oracle(init_fn, update_fn, moves, linear=linear, averaged=again)

  again = None
  if isinstance(fn, ByMean):
    by_mean = functools.partial(functools.partial, fn.fn)
    fn, again = by_mean(WHOLE), lambda mean: make(by_mean(mean), mean.parts)
  return make(fn, 1)


def _on_parts(spent: Cost, parts: int) -> Cost:
  """The cost of an evaluation by a mean over parts of a batch."""
  once = ('rounds/', 'projections/')  # These are evaluated for the mean.
  return {n: c if n.startswith(once) else c * parts for n, c in spent.items()}


def gradients(params: Any, **fields: Any) -> Any:
  """Gradients for these sequences, None for all others."""
  return _sequences.only(params, **fields)


def requested_outputs(
  problem: types.BilevelProblem, **outputs: Any
) -> tuple[Any, ...]:
  """The auxiliary outputs as the last result of an oracle's function.

  Args:
    problem: its field `outputs` requests outputs, or is None.
    **outputs: by name of a loss, its auxiliary output.

  Returns:
    A tuple of one dict, or the empty tuple.
  """
  return () if problem.outputs is None else (outputs,)


def outputs_only(
  problem: types.BilevelProblem, *names: str
) -> Callable[[Any], Any] | None:
  """The `outputs` of a problem, restricted to these losses."""
  wanted = problem.outputs
  if wanted is None:
    return None
  return lambda params: {n: t for n, t in wanted(params).items() if n in names}


def as_announced(now: Any, before: Any) -> Any:
  """Casts outputs to the announced dtypes; raises ValueError if they differ."""
  if isinstance(before, Mapping) and isinstance(now, Mapping):
    now = {name: now[name] for name in before if name in now}
  shapes = lambda tree: jax.tree.map(jnp.shape, tree)
  structure: Any = jax.tree.structure(now)
  expected: Any = jax.tree.structure(before)
  if structure != expected or shapes(now) != shapes(before):
    raise ValueError(
      f'the auxiliary outputs are {structure} of shapes {shapes(now)}, but '
      f'`outputs` announced {expected} of shapes {shapes(before)}.'
    )
  return _trees.cast_like(now, before)


def wrapped(
  inner: optax.GradientTransformation,
  init: Callable[[Any], Any],
  update: Callable[..., Any],
  *,
  again: Callable[[Any], Oracle] | None = None,
  moves: Iterable[str] | None = None,
  linear: bool = False,
  inside: bool = False,
) -> Oracle:
  """Makes a wrapper of an oracle.

  Args:
    inner: the wrapped oracle.
    init: from the parameters to the wrapper's state.
    update: from (batch, state, params) to (gradients, state).
    again: from another oracle to the same wrapper around it. A mean over parts
      of a batch is then taken of the wrapped oracle; without `again`, the
      wrapper has no mean.
    moves: names of the sequences that it moves; by default those of `inner`.
    linear: whether the wrapper is linear in its samples.
    inside: whether `bj.evaluation.wrapped` wraps the oracle inside, by `again`.

  Returns:
    An oracle.
  """
  one, averaged, within = as_oracle(inner), None, None
  if again is not None and has_mean(one):
    averaged = lambda mean: again(take_mean(one, mean, 'a wrapper'))
  if again is not None and inside:
    within = lambda wrapper: again(around(one, wrapper))

  def update_fn(batch, state, params=None, **extra_args):
    require_batch(batch, params)
    return update(batch, state, params, **extra_args)

  return Oracle(
    init,
    update_fn,
    one.moves if moves is None else moves,
    linear=linear,
    averaged=averaged,
    within=within,
  )


def aggregated(
  one: optax.GradientTransformation, *links: optax.GradientTransformation
) -> Oracle:
  """Chains an oracle and its aggregator to an oracle.

  Unlike `optax.chain`, it keeps the declared properties. Means over parts of a
  batch are taken of the oracle, before the aggregator, because most aggregators
  are not linear in the samples.

  Args:
    one: an oracle.
    *links: aggregators or other transformations of its gradients, in order.

  Returns:
    An oracle.

  Raises:
    TypeError: if an argument is not a transformation, or the oracle does not
      come first.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> losses = lambda x, batch: jnp.stack([batch.mean() * x, 2 * x])
    >>> oracle = bj.oracles.aggregated(
    ...   bj.multi_objective(losses, 2), bj.aggregators.mgda(2)
    ... )
    >>> parts = bj.evaluation.accumulate(oracle, 2)
    >>> params, batch = jnp.float32(0.0), jnp.array([-4.0, 4.0])
    >>> print(parts.update(batch, parts.init(params), params)[0])
    0.0
  """
  for link in (one, *links):
    if not isinstance(link, optax.GradientTransformation):
      name = getattr(link, '__name__', type(link).__name__)
      remedy = f': call it, {name}(...)' if callable(link) else ''
      raise TypeError(
        f'aggregated takes an oracle and aggregators, got {name}{remedy}.'
      )
  if not isinstance(one, Oracle) and any(isinstance(x, Oracle) for x in links):
    raise TypeError(
      'aggregated takes the oracle first: write bj.oracles.aggregated(oracle, '
      'aggregator).'
    )
  first = as_oracle(one)
  update = optax.chain(first, *links).update
  again = lambda other: aggregated(other, *links)

  def init_fn(params):
    moved = params
    if first.moves is not None:
      # Links keep no gradients of sequences that the oracle does not move.
      other = [
        n for n in getattr(params, '_fields', ()) if n not in first.moves
      ]
      moved = params._replace(**dict.fromkeys(other)) if other else params
    return (first.init(params), *(link.init(moved) for link in links))

  inside = first.within is not None
  return wrapped(first, init_fn, update, again=again, inside=inside)


def is_linear(one: optax.GradientTransformation) -> bool:
  """Whether an oracle declares that it is linear in its samples."""
  return as_oracle(one).linear


def has_mean(one: optax.GradientTransformation) -> bool:
  """Whether an oracle has a mean over parts of its batch."""
  return is_linear(one) or as_oracle(one).averaged is not None


def require_linear(
  one: optax.GradientTransformation, caller: str, remedy: str
) -> None:
  """Raises ValueError unless an oracle is linear in its samples.

  Args:
    one: the oracle.
    caller: name of the wrapper, for the error.
    remedy: what to do instead, for the error.
  """
  if not is_linear(one):
    raise ValueError(
      f'{caller} takes means over samples, but the oracle is not linear in its '
      f'samples, or does not declare it: {remedy}; your own oracle declares it '
      'by bj.oracle(..., linear=True).'
    )


def take_mean(
  one: optax.GradientTransformation,
  mean: Mean,
  caller: str,
  remedy: str = 'let it see the whole batch, or chain it to its aggregator by '
  'bj.oracles.aggregated',
) -> Oracle:
  """An oracle for the whole batch that evaluates the parts of the batch.

  Args:
    one: an oracle.
    mean: the mean over the parts.
    caller: name of the wrapper, for the error.
    remedy: what to do without such a mean, for the error.

  Returns:
    The mean of an oracle that is linear in its samples; otherwise the form in
    which the losses are averaged, not the results.

  Raises:
    ValueError: if it is neither linear nor has such a form.
  """
  oracle = as_oracle(one)
  again = oracle.averaged
  if again is None:
    require_linear(one, caller, remedy)
    return mean.linear(oracle)._replace(moves=oracle.moves, linear=True)

  def averaged(outer):
    of = lambda fn, batch, *at: outer.of(
      lambda part, *at: mean.of(fn, part, *at), batch, *at
    )
    linear = lambda one: outer.linear(mean.linear(one))
    return again(Mean(of, linear, outer.parts * mean.parts))

  return again(mean)._replace(averaged=averaged)


def moved_by(
  one: optax.GradientTransformation, batch: Any, state: Any, params: Any
) -> tuple[str, ...]:
  """Names of the sequences that an oracle moves.

  Args:
    one: an oracle, or a chain of an oracle and an aggregator.
    batch: the batch of its update.
    state: its state.
    params: the parameters, a NamedTuple of sequences.

  Returns:
    The names in the order of the parameters. An oracle that does not declare
    them is traced once, on shapes.
  """
  oracle = as_oracle(one)
  names: Iterable[str] | None = oracle.moves
  if names is None:
    gradients, _ = jax.eval_shape(oracle.update, batch, state, params)
    _sequences.require_gradients(gradients, params, 'descend')
    names = [n for n in params._fields if getattr(gradients, n) is not None]
  return tuple(n for n in params._fields if n in names)
