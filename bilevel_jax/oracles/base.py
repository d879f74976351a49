"""What oracles are made of: the first link of every solver.

An oracle turns a batch into gradients. It knows losses and no step size. What
evaluating them needs (warm starts, memories, keys) is its state, so that it is
checkpointed, vmapped and sharded like any optimiser's state. Evaluations are
counted here, where they happen.

To write an oracle, call `oracle` with a function that evaluates losses and
gradients. To write a wrapper of oracles, use `wrapped`, and
`bilevel_jax.states` for what its evaluations leave in the state.

A batch is often seen in parts, one after another or one on each device. The
gradient of a mean loss is the mean of its gradients on the parts; a
hypergradient is not, as it divides by a Hessian. So an oracle says whether it
is `linear` in its samples. If it is not, it may have a form `averaged`, in
which each evaluation of its losses is a `Mean` over the parts.
"""

import sys
import types as types_of_python
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _sequences, _trees, states, types
from bilevel_jax.parts import Oracle, around, as_oracle

# Costs of one evaluation, by `kind/loss`, or a function of the parameters.
Cost = Mapping[str, chex.Numeric]


class Mean(NamedTuple):
  """A mean over parts of a batch, or over devices, of functions of the batch.

  Attributes:
    of: `of(fn, batch, *at)` is the mean over the parts of `fn(part, *at)`, any
      pytree; of leaves that are no floats, the last part's. What `fn`
      differentiates, it takes from `at`: on several devices, the derivative in
      a value that they share can be a sum over them. Forward derivatives of
      the mean itself are right: `jax.linearize` keeps the memory of one part.
    linear: from an oracle that is linear in its samples to the mean of it.
    parts: how many evaluations of one part the mean takes, for counts.
  """

  of: Callable[..., Any]
  linear: Callable[[Any], Any]
  parts: int = 1


# Of a batch that is seen as a whole.
WHOLE = Mean(lambda fn, batch, *at: fn(batch, *at), lambda one: one)


class ByMean(NamedTuple):
  """What `oracle` evaluates where its losses, not its results, are averaged.

  Attributes:
    at_once: the `fn` for a batch that is seen as a whole.
    of: from a `Mean` to an `fn` that evaluates its losses through it.
  """

  at_once: Callable[[Any, Any, Any], Any]
  of: Callable[[Mean], Callable[[Any, Any, Any], Any]]


class Loss:
  """A loss, checked: it gives a real scalar, or says why it cannot.

  Args:
    loss: returns a scalar, or (scalar, auxiliary).
    name: what errors call the loss.

  Raises:
    TypeError: at the call, if the value is not a real scalar.
  """

  def __init__(self, loss: Callable[..., Any], name: str):
    """Keeps the function and its name."""
    self._loss, self._name = loss, name

  def full(self, *args: Any) -> tuple[chex.Array, Any]:
    """The loss and its auxiliary output, which is () if there is none."""
    out, auxiliary = self._loss(*args), ()
    if isinstance(out, tuple) and len(out) == 2:
      out, auxiliary = out
    if not hasattr(out, 'dtype') and not isinstance(out, (int, float)):
      raise TypeError(
        f'the {self._name} loss returned {type(out).__name__}, expected a '
        'scalar array or (scalar, auxiliary).'
      )
    value = jnp.asarray(out)
    if value.shape:
      raise TypeError(
        f'the {self._name} loss returned an array of shape {value.shape}, '
        'expected a scalar: reduce it over the batch, with jnp.mean for '
        'instance.'
      )
    if not jnp.issubdtype(value.dtype, jnp.floating):
      raise TypeError(
        f'the {self._name} loss returned {value.dtype}, expected a float '
        'scalar.'
      )
    return value, auxiliary

  def __call__(self, *args: Any) -> chex.Array:
    """The loss alone."""
    return self.full(*args)[0]


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
      parameters with None for a sequence that is left alone, or are a
      `Jacobian`. A fourth result, if any, is what was spent beyond `counts` in
      this evaluation, by the same names. With `outputs`, the last result is
      the auxiliary outputs. For an oracle that is not linear, a `ByMean`.
    names: a name for each value.
    init: makes the first `inner` from the parameters.
    counts: what one evaluation costs, for example
      `{'gradients/lower': 1, 'hessian_vector_products/lower': 1}`; or a
      function of the parameters to that, where it depends on their size.
    moves: names of the sequences that get a gradient; None if all do.
    needs: names of the sequences that the parameters must have; by default
      those in `moves`.
    outputs: a function from the parameters to a pytree of the structure of the
      auxiliary outputs; None for an oracle that has none.
    linear: whether the gradients of a batch are the mean of those of its parts.
      Wrappers that take means refuse an oracle that does not say so.

  Returns:
    A transformation whose `update(batch, state, params)` gives gradients and
    an `OracleState`.

  Raises:
    TypeError: at init, if a leaf of the parameters is no real number, and at
      the call, if the parameters are missing or have other sequences, or if
      the batch is of their own type.
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
    _refuse_around()
    _trees.require_real(params)
    if required:
      _sequences.require_sequences(params, required, 'an oracle')
    kinds = tuple(cost(params))
    return states.OracleState(
      types.named(names, _trees.zeros(len(names), _trees.dtype_of(params))),
      types.named(kinds, _trees.zeros(len(kinds), jnp.int32)),
      init(params),
      () if outputs is None else outputs(params),
    )

  def made(fn, parts):
    def update_fn(batch, state, params=None, **extra_args):
      del extra_args
      require_batch(batch, params)
      if required:
        _sequences.require_sequences(params, required, 'an oracle')
      given: Any = fn(params, batch, state.inner)
      values, gradients, inner, *more = given
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
    fn, of = fn
    again = lambda mean: made(of(mean), mean.parts)
  return made(fn, 1)


def require_batch(batch: Any, params: Any) -> None:
  """Raises TypeError for no parameters, a state or gradients in their place."""
  if params is None:
    raise TypeError(
      'an oracle evaluates losses at the parameters: call '
      'solver.update(batch, state, params).'
    )
  _sequences.refuse_state(batch, 'the batch is')
  _sequences.refuse_state(params, 'the parameters are')
  is_sequences = _sequences.is_sequences(params)
  if isinstance(batch, types.BilevelParams) and not is_sequences:
    raise TypeError(
      'the batch is a BilevelParams, but the parameters are '
      f'{type(params).__name__}: call solver.update(batch, state, params), in '
      'this order.'
    )
  if is_sequences and type(batch) is type(params):
    raise TypeError(
      f'the batch is a {type(batch).__name__}, as the parameters are: a solver '
      'takes the batch where optax takes gradients, so what looks at gradients '
      '(optax.MultiSteps, optax.apply_if_finite) belongs around an optimiser '
      'within the solver, and bj.evaluation.accumulate around its oracle.'
    )


# Modules of optax whose transformations sum up gradients, or skip some.
_READ_GRADIENTS = (
  'optax.transforms._accumulation',
  'optax.transforms._conditionality',
)


def _refuse_around() -> None:
  """Raises TypeError where optax treats an oracle's batch as gradients.

  Such a transformation fails before it evaluates the oracle, or averages
  batches instead of gradients. All that it calls before is `init`, so that only
  the calling frames show it.
  """
  frame: types_of_python.FrameType | None = sys._getframe(1)
  while frame is not None:
    module = frame.f_globals.get('__name__', '')
    if module.partition('.')[0] not in ('bilevel_jax', 'optax'):
      return
    if module in _READ_GRADIENTS:
      name = frame.f_code.co_qualname.partition('.')[0]
      raise TypeError(
        f'optax.{name} wraps a solver or an oracle, and would treat its batch '
        'as gradients: wrap an optimiser within the solver instead, or the '
        'oracle in bj.evaluation.accumulate for the mean over parts of a batch.'
      )
    frame = frame.f_back


def _on_parts(spent: Cost, parts: int) -> Cost:
  """What an evaluation costs that is a mean over parts of a batch."""
  once = ('rounds/', 'projections/')  # Of the mean.
  return {n: c if n.startswith(once) else c * parts for n, c in spent.items()}


def gradients(params: Any, **fields: Any) -> Any:
  """Gradients of the parameters' type: these, and None elsewhere."""
  return _sequences.only(params, **fields)


def outputs_of(problem: types.BilevelProblem, **found: Any) -> tuple[Any, ...]:
  """The outputs of a problem's losses as an oracle's last result, if wanted.

  Args:
    problem: whose `outputs` says which are wanted, or that none are.
    **found: by name of a loss, its auxiliary output.

  Returns:
    A tuple of one dict, or of nothing.
  """
  return () if problem.outputs is None else (found,)


def outputs_only(
  problem: types.BilevelProblem, *names: str
) -> Callable[[Any], Any] | None:
  """A problem's `outputs`, restricted to losses that an oracle evaluates."""
  wanted = problem.outputs
  if wanted is None:
    return None
  return lambda params: {n: t for n, t in wanted(params).items() if n in names}


def as_announced(now: Any, before: Any) -> Any:
  """Outputs in the dtypes of the announced ones; ValueError for others."""
  if isinstance(before, Mapping) and isinstance(now, Mapping):
    now = {name: now[name] for name in before if name in now}
  shapes = lambda tree: jax.tree.map(jnp.shape, tree)
  ours: Any = jax.tree.structure(now)
  theirs: Any = jax.tree.structure(before)
  if ours != theirs or shapes(now) != shapes(before):
    raise ValueError(
      f'the auxiliary outputs are {ours} of shapes {shapes(now)}, but '
      f'`outputs` announced {theirs} of shapes {shapes(before)}.'
    )
  return _trees.as_dtypes_of(now, before)


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
  """A wrapper of an oracle: other functions, the same sequences.

  Args:
    inner: the oracle that is wrapped.
    init: the wrapper's, from the parameters to its state.
    update: likewise, from (batch, state, params) to (gradients, state).
    again: from another oracle to the same wrapper around it. With it, a mean
      over the wrapper's batch is taken of the oracle within. Without it, no
      mean is taken.
    moves: names of the sequences that it moves; by default those of `inner`.
    linear: whether it is linear in its samples.
    inside: whether `bj.evaluation.wrapped` wraps the oracle within, by `again`.

  Returns:
    An oracle.
  """
  one, averaged, within = as_oracle(inner), None, None
  if again is not None and has_mean(one):
    averaged = lambda mean: again(mean_of(one, mean, 'a wrapper'))
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
  """An oracle and the links behind it, aggregators for instance, as an oracle.

  `optax.chain` of the same, that also says which sequences it moves, and of
  which a wrapper that takes means over parts of a batch takes them of the
  oracle: what comes out of most aggregators is not linear in the samples.

  Args:
    one: an oracle.
    *links: from its gradients to others.

  Returns:
    An oracle.

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
  first = as_oracle(one)
  update = optax.chain(first, *links).update
  again = lambda other: aggregated(other, *links)

  def init_fn(params):
    moved = params
    if first.moves is not None:
      # A link that keeps gradients has none for what the oracle leaves alone.
      other = [
        n for n in getattr(params, '_fields', ()) if n not in first.moves
      ]
      moved = params._replace(**dict.fromkeys(other)) if other else params
    return (first.init(params), *(link.init(moved) for link in links))

  inside = first.within is not None
  return wrapped(first, init_fn, update, again=again, inside=inside)


def is_linear(one: optax.GradientTransformation) -> bool:
  """Whether an oracle says that it is linear in its samples."""
  return as_oracle(one).linear


def has_mean(one: optax.GradientTransformation) -> bool:
  """Whether a mean over parts of its batch can be taken of an oracle."""
  return is_linear(one) or as_oracle(one).averaged is not None


def require_linear(
  one: optax.GradientTransformation, who: str, mend: str
) -> None:
  """Raises ValueError unless an oracle is linear in its samples.

  Args:
    one: the oracle.
    who: the wrapper that asks.
    mend: what to do instead.
  """
  if not is_linear(one):
    raise ValueError(
      f'{who} takes means over samples, but the oracle is not linear in its '
      f'samples, or does not say so: {mend}; an oracle of your own says it by '
      'bj.oracle(..., linear=True).'
    )


def mean_of(
  one: optax.GradientTransformation,
  mean: Mean,
  who: str,
  mend: str = 'let it see the whole batch, or chain it to its aggregator by '
  'bj.oracles.aggregated',
) -> Oracle:
  """An oracle whose results are those of the whole batch, from its parts.

  Args:
    one: an oracle.
    mean: the mean over the parts.
    who: the wrapper that asks, for the error.
    mend: what to do if there is no such mean.

  Returns:
    An oracle. Of one that is linear in its samples, the mean; of another, its
    form in which the losses are averaged, and not the results.

  Raises:
    ValueError: if it is neither linear nor has such a form.
  """
  oracle = as_oracle(one)
  again = oracle.averaged
  if again is None:
    require_linear(one, who, mend)
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
  """Names of the sequences that an oracle moves, by word or by structure.

  Args:
    one: an oracle, or a chain of it with an aggregator.
    batch: as for its update.
    state: likewise.
    params: likewise, a NamedTuple of sequences.

  Returns:
    The names in the order of the parameters. An oracle that does not say is
    traced once more, on shapes alone.
  """
  oracle = as_oracle(one)
  names: Iterable[str] | None = oracle.moves
  if names is None:
    gradients, _ = jax.eval_shape(oracle.update, batch, state, params)
    _sequences.require_gradients(gradients, params, 'descend')
    names = [n for n in params._fields if getattr(gradients, n) is not None]
  return tuple(n for n in params._fields if n in names)
