"""Problems, parameters and gradients: types only.

Parameters of a nested problem are a NamedTuple whose fields are its sequences.
Gradients have the same type; a field is None where a link leaves that sequence
alone, so an untouched sequence costs neither a zero buffer nor an addition.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as ListLike
from typing import Any, NamedTuple, TypeAlias

import chex
import jax
import optax

from bilevel_jax import _checks

# A number, or an optax schedule from the number of updates so far.
ScalarOrSchedule = float | jax.Array | Callable[[chex.Numeric], chex.Numeric]
# (upper variable, lower variable, batch) -> scalar, or (scalar, auxiliary).
Loss = Callable[[Any, Any, Any], Any]


# From an oracle to an oracle: what `bj.evaluation.wrapped` puts around each.
Wrapper = Callable[[Any], Any]


class BilevelProblem(NamedTuple):
  r"""A nested problem: minimise an upper loss at the lower loss's minimiser.

  .. math::
    \min_{x} f(x, y) \quad \text{where} \quad y \in \arg\min_{y'} g(x, y')

  Attributes:
    upper: the loss :math:`f(x, y, batch)`; a scalar, or (scalar, auxiliary).
    lower: the loss :math:`g(x, y, batch)`; likewise. Randomness comes in the
      batch, as a key.
    outputs: None drops the auxiliary outputs of both losses. Else a function
      from the parameters to a dict of pytrees, shaped like the outputs of
      `upper`, of `lower` or of both: these are kept in the state for
      `bj.outputs`. Running statistics, of a batch normalisation for instance,
      go into the next batch from there.
  """

  upper: Loss
  lower: Loss
  outputs: Callable[[Any], Mapping[str, Any]] | None = None


class BilevelParams(NamedTuple):
  """The two variables of a nested problem.

  Attributes:
    upper: the upper variable, any pytree of arrays.
    lower: the lower variable, any pytree of arrays.
  """

  upper: Any
  lower: Any


class Named(Mapping):
  """Numbers by name, held in one array: one buffer, however many there are.

  Args:
    names: a name for each number.
    array: their values, (numbers,); an axis may come before, from `jax.vmap`.
  """

  def __init__(self, names: ListLike[str], array: Any):
    """Keeps the names as structure and the array as a leaf."""
    self.names, self.array = tuple(names), array

  def __getitem__(self, name: str) -> Any:
    """The number of this name."""
    if name not in self.names:
      raise KeyError(name)
    return self.array[..., self.names.index(name)]

  def __iter__(self) -> Iterator[str]:
    """The names, in order."""
    return iter(self.names)

  def __len__(self) -> int:
    """How many numbers there are."""
    return len(self.names)

  def __repr__(self) -> str:
    """As a call that makes it."""
    return f'Named({self.names}, {self.array})'


def named(names: ListLike[str], array: Any) -> Named | None:
  """Numbers by name, or None without names: a node needs a leaf.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> print(bj.types.named(['a', 'b'], jnp.array([1.0, 2.0]))['b'])
    2.0
  """
  return Named(names, array) if names else None


# As a dataclass: flattened without a call of Python.
jax.tree_util.register_dataclass(
  Named, data_fields=['array'], meta_fields=['names']
)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['value_array', 'count_array'],
  meta_fields=['value_names', 'count_names'],
)
@dataclasses.dataclass(slots=True)  # A frozen one is slow to make.
class Numbers:
  """Losses and evaluations by name, in one array each and one node.

  Attributes:
    value_names: a name for each loss.
    value_array: the losses, or None.
    count_names: a name for each counter.
    count_array: the counters, int32, or None.
  """

  value_names: tuple[str, ...]
  value_array: Any
  count_names: tuple[str, ...]
  count_array: Any

  @property
  def values(self) -> Named | None:
    """The losses."""
    return named(self.value_names, self.value_array)

  @property
  def counts(self) -> Named | None:
    """The evaluations."""
    return named(self.count_names, self.count_array)

  def _replace(self, **fields: Any) -> 'Numbers':
    return dataclasses.replace(self, **fields)


class _OfSeveral(type):
  """A type that says in the errors of JAX why a pytree of it does not fit.

  optax applies a transformation to whatever pytree comes out of an oracle, so
  that the first error of a chain without an aggregator is one of JAX, about
  types of pytrees.
  """

  def __repr__(cls) -> str:
    return (
      f'<{cls.__name__}, gradients of several objectives: put an aggregator '
      'between the oracle and the optimiser, bj.aggregators.mgda(objectives) '
      'for instance>'
    )


class _Jacobian(NamedTuple):
  rows: Any
  rest: Mapping[str, Any] | None = None
  values: Any = None


class Jacobian(_Jacobian, metaclass=_OfSeveral):
  """Gradients of several objectives at one point.

  Attributes:
    rows: the parameters' structure; each leaf has a leading axis of objectives.
    rest: gradients, by sequence name, that no weight may touch; None where
      there are none.
    values: the objectives' losses, (objectives,), or None if not measured.
  """

  __slots__ = ()

  def __radd__(self, params: Any) -> Any:
    # Where the parameters are one array, optax adds any update to it.
    raise TypeError(f'{type(self)!r} cannot be added to parameters.')


class Gramian(NamedTuple):
  r"""What most aggregators need of a Jacobian :math:`J`, without its memory.

  Lengths and cosines stand for the products :math:`J J^\top`, whose squares
  leave the range of float32 for gradients shorter than 1e-19 or longer than
  1e19. It is a pytree of arrays: it may be returned from a compiled function,
  but not averaged over parts of a batch.

  Attributes:
    lengths: the norms of the rows, (objectives,).
    cosines: between all pairs of rows, (objectives, objectives); zero for a row
      that vanishes.
    combine: a `jax.tree_util.Partial` from weights (objectives,) to the
      gradient :math:`J^\top w`, with the gradients that no weight may touch in
      their places.
    values: the objectives' losses, (objectives,), or None if not measured.
  """

  lengths: Any
  cosines: Any
  combine: Callable[[Any], Any]
  values: Any = None

  @property
  def matrix(self) -> Any:
    r"""The products :math:`J J^\top`, (objectives, objectives)."""
    return self.lengths[:, None] * self.cosines * self.lengths


class Sequence(NamedTuple):
  r"""How one sequence moves: `descend` takes one of these for each.

  Where it is evaluated, and along what, is the oracle's; how far, how often and
  in which set is said here. A bare optax optimiser stands for a record of it.

  **What a schedule counts.** Updates of the solver, in every sequence, whatever
  the number of its steps: a step size, a penalty and a hyperparameter under
  `optax.inject_hyperparams` are at the same point of their schedules at the
  same time. The age of a moment, Adam's for instance, counts the sequence's own
  steps. (A schedule that a transformation of your own counts is its own.)

  **What a restart resets.** The sequence, to its `start`, and all of its
  optimiser but the count of schedules: no momentum passes from one update to
  the next. The state of its set, a coin's key for instance, stays.

  **Unset fields.** None means that a field is unset. Then the solver's own
  default holds, the set of the lower variable for a value sequence for
  instance, or else the one below.

  Attributes:
    optimiser: any optax transformation from a gradient to an update.
    set: where the sequence stays: a function from a point to the nearest point
      of the set, such as those of `optax.projections`; an affine set; or one of
      `bj.projections.Lazy`, `Relaxed` and `Joint`. Sets that depend on the
      upper variable are taken at its new value. Unset, the whole space; where a
      solver has another default, `lambda z: z` is the whole space.
    steps: steps in one update, each with a new gradient. Unset, one. An oracle
      is evaluated as often as the sequences that it moves require; a sequence
      with one step moves in the last evaluation.
    batch_at: the batch of step t, from (batch, t), t an int32 scalar. Unset,
      each step sees the whole batch. Sequences that move by one oracle see one
      batch in each evaluation, so their `batch_at` has to be the same function.
    start: makes a sequence that only the solver has, from the parameters, or
      with `restart` the point from which any sequence starts in each update.
    restart: whether the sequence goes back to its start in each update. Unset,
      False.
  """

  optimiser: Any
  set: Any = None
  steps: Any = None
  batch_at: Callable[[Any, Any], Any] | None = None
  start: Callable[[Any], Any] | None = None
  restart: Any = None


# What a named solver takes for each of its sequences.
SequenceLike: TypeAlias = Sequence | optax.GradientTransformation


def as_sequence(given: Any, name: str, **defaults: Any) -> Sequence:
  """Converts an optimiser to a `Sequence` and fills in its unset fields.

  Args:
    given: a `Sequence`, or an optax transformation.
    name: of the sequence, for the error.
    **defaults: values for the fields that the record leaves unset.

  Returns:
    A `Sequence` whose steps and restart are set.

  Raises:
    TypeError: for anything else, a number for instance; if `batch_at` or
      `start` is no function, or `restart` no boolean.
    ValueError: if the steps are no whole number >= 1.

  Example:
    >>> import bilevel_jax as bj, optax
    >>> record = bj.types.as_sequence(optax.sgd(0.1), 'lower', steps=5)
    >>> print(record.steps, record.restart)
    5 False
  """
  found = given if isinstance(given, Sequence) else Sequence(given)
  optimiser = found.optimiser
  if not isinstance(optimiser, optax.GradientTransformation):
    remedy = (
      'give it as optax.MultiSteps(...).gradient_transformation()'
      if isinstance(optimiser, optax.MultiSteps)
      else 'optax.sgd(0.1) for instance'
    )
    raise TypeError(
      f'{name} takes an optax optimiser or a bj.Sequence of one, got '
      f'{type(optimiser).__name__}: {remedy}.'
    )
  usual = {'steps': 1, 'restart': False} | defaults
  unset = {n: v for n, v in usual.items() if getattr(found, n) is None}
  found = found._replace(**unset)
  _checks.whole(f'the sequence {name}', 'steps', found.steps)
  for field, signature in (
    ('batch_at', 'lambda batch, t: batch[t]'),
    ('start', 'lambda params: params.lower'),
  ):
    value = getattr(found, field)
    if value is not None and not callable(value):
      raise TypeError(
        f'{field} of the sequence {name} is a function, got '
        f'{type(value).__name__}: {signature} for instance.'
      )
  if not isinstance(found.restart, bool):
    raise TypeError(
      f'restart of the sequence {name} is True or False, got {found.restart!r}.'
    )
  return found


def value_sequence(
  given: SequenceLike | None, lower: Sequence, **defaults: Any
) -> Sequence:
  """The record of a sequence that follows the lower loss's minimiser.

  Args:
    given: the caller's, None for the optimiser of the lower variable.
    lower: the record of the lower variable, whose set is the value's too.
    **defaults: further fields for what the record leaves open.

  Returns:
    A record that starts at the lower variable.

  Example:
    >>> import bilevel_jax as bj, optax
    >>> lower = bj.Sequence(optax.sgd(0.1), set=abs)
    >>> record = bj.types.value_sequence(None, lower, restart=True)
    >>> print(record.set is abs, record.steps, record.restart)
    True 1 True
  """
  defaults = {'set': lower.set, 'start': lambda p: p.lower} | defaults
  chosen = Sequence(lower.optimiser) if given is None else given
  return as_sequence(chosen, 'value', **defaults)


def linear_sequence(given: SequenceLike | None, lower: Sequence) -> Sequence:
  """The record of a sequence that solves a system in the lower Hessian.

  Args:
    given: the caller's, None for the optimiser of the lower variable.
    lower: the record of the lower variable.

  Returns:
    A record that starts at zero.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp, optax
    >>> record = bj.types.linear_sequence(None, bj.Sequence(optax.sgd(0.1)))
    >>> params = bj.BilevelParams(jnp.ones(3), jnp.ones(2))
    >>> print(record.start(params))
    [0. 0.]
  """
  chosen = Sequence(lower.optimiser) if given is None else given
  zero = lambda params: optax.tree.zeros_like(params.lower)
  return as_sequence(chosen, 'linear', start=zero)


@functools.cache
def _sequences_type(names: tuple[str, ...]) -> type:
  # One class for each set of names: pytrees compare equal only if their
  # classes do, and a scan compares the pytrees of two traces.
  return collections.namedtuple('Sequences', names)


def sequences(**fields: Any) -> Any:
  """Makes a NamedTuple of named sequences.

  Args:
    **fields: a pytree for each name.

  Returns:
    A NamedTuple `Sequences` with these fields; the same names give the same
    type.

  Example:
    >>> import bilevel_jax as bj
    >>> bj.sequences(actor=1.0, critic=2.0)
    Sequences(actor=1.0, critic=2.0)
  """
  return _sequences_type(tuple(fields))(**fields)
