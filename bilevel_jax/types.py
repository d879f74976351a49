"""Types of problems, parameters, gradients and sequences.

The parameters of a nested problem are a NamedTuple whose fields are its
sequences. Gradients have the same type; None in a field means that the sequence
does not move, which costs neither a zero buffer nor an addition.
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


# From an oracle to an oracle; the argument of `bj.evaluation.wrapped`.
Wrapper = Callable[[Any], Any]


class BilevelProblem(NamedTuple):
  r"""A nested problem: minimise an upper loss at the lower loss's minimiser.

  .. math::
    \min_{x} f(x, y) \quad \text{where} \quad y \in \arg\min_{y'} g(x, y')

  Attributes:
    upper: the loss :math:`f(x, y, batch)`; a scalar, or (scalar, auxiliary).
    lower: the loss :math:`g(x, y, batch)`, with the same results. A loss that
      draws random numbers takes its key from the batch.
    outputs: None drops the auxiliary outputs of both losses. Otherwise a
      function from the parameters to a dict of pytrees, shaped like the outputs
      of `upper`, of `lower` or of both. The state keeps these outputs, and
      `bj.outputs` returns them, for instance running statistics of a batch
      normalisation that go into the next batch.
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
  """Numbers by name in one array, which is a single buffer.

  Args:
    names: a name for each number.
    array: the numbers, (numbers,), with leading axes under `jax.vmap`.
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
    """A call that makes an equal value."""
    return f'Named({self.names}, {self.array})'


def named(names: ListLike[str], array: Any) -> Named | None:
  """Makes numbers by name; None without names, as a node needs a leaf.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> print(bj.types.named(['a', 'b'], jnp.array([1.0, 2.0]))['b'])
    2.0
  """
  return Named(names, array) if names else None


# Registered as a dataclass, which is flattened without a call of Python.
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
  """Losses and evaluations by name, in two arrays and one node.

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


class _SeveralObjectives(type):
  """A type whose name explains a missing aggregator in errors of JAX.

  optax applies a transformation to any pytree, so that the first error of a
  chain without an aggregator comes from JAX and names types of pytrees.
  """

  def __repr__(cls) -> str:
    return (
      f'<{cls.__name__}, gradients of several objectives: put an aggregator '
      'between the oracle and the optimiser, for instance '
      'bj.aggregators.mgda(objectives)>'
    )


class _Jacobian(NamedTuple):
  rows: Any
  rest: Mapping[str, Any] | None = None
  values: Any = None


class Jacobian(_Jacobian, metaclass=_SeveralObjectives):
  """Gradients of several objectives at one point.

  Attributes:
    rows: gradients in the structure of the parameters; each leaf has a leading
      axis of objectives.
    rest: by name of a sequence, gradients that are not weighted, or None.
    values: the objectives' losses, (objectives,), or None if not measured.
  """

  __slots__ = ()

  def __radd__(self, params: Any) -> Any:
    # optax adds any update to parameters that are one array.
    raise TypeError(f'{type(self)!r} cannot be added to parameters.')


class Gramian(NamedTuple):
  r"""The Gram matrix of a Jacobian :math:`J`, without the memory of its rows.

  It holds lengths and cosines instead of the products :math:`J J^\top`, which
  leave the range of float32 for gradients shorter than 1e-19 or longer than
  1e19. It is a pytree of arrays: a compiled function may return it, but its
  mean over parts of a batch has no meaning.

  Attributes:
    lengths: the norms of the rows, (objectives,).
    cosines: between all pairs of rows, (objectives, objectives); zero for a row
      that vanishes.
    combine: a `jax.tree_util.Partial` from weights (objectives,) to the
      gradient :math:`J^\top w`, together with the gradients that are not
      weighted.
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


class Sequence(
  collections.namedtuple(
    '_Sequence', 'optimiser set steps batch_at start restart'
  )
):
  r"""How one sequence moves; `descend` takes a record for each sequence.

  The oracle determines the gradient and where it is evaluated. The record
  determines the step, the number of steps and the set. A bare optax optimiser
  is converted to a record.

  **Schedules** count updates of the solver in every sequence, whatever the
  number of its steps. A step size, a penalty and a hyperparameter under
  `optax.inject_hyperparams` are at the same point of their schedules. The age
  of a moment, for instance Adam's, counts the steps of the sequence. A schedule
  within your own transformation counts as you write it.

  **A restart** resets the sequence to its `start`, and its optimiser except for
  the count of schedules: no momentum passes from one update to the next. The
  state of its set, for instance the key of a lazy projection, does not change.

  **Unset fields** are None. Then the solver's default holds, for instance the
  set of the lower variable for a value sequence, or else the default below.

  Attributes:
    optimiser: any optax transformation from a gradient to an update.
    set: the set of the sequence: a projection, that is a function from a point
      to the nearest point of the set, for instance of `optax.projections`; an
      affine set; or one of `bj.projections.Lazy`, `Relaxed` and `Joint`. Sets
      that depend on the upper variable use its new value. Unset, the whole
      space; where a solver has another default, write `lambda z: z` for the
      whole space.
    steps: steps in one update, each with a new gradient. Unset, one. An oracle
      is evaluated as often as the sequences that it moves require; a sequence
      with one step moves in the last evaluation.
    batch_at: the batch of step t, from (batch, t), t an int32 scalar. Unset,
      each step sees the whole batch. Sequences that one oracle moves see the
      same batch in each evaluation, so that their `batch_at` has to be the same
      function.
    start: from the parameters to the first value of a sequence that is in the
      solver's state only; with `restart`, to the first value in each update.
    restart: whether the sequence returns to its start in each update. Unset,
      False.

  Raises:
    TypeError: if a field has another type.
    ValueError: if the steps are not a whole number >= 1.
  """

  __slots__ = ()

  def __new__(
    cls,
    optimiser: Any,
    set: Any = None,
    steps: Any = None,
    batch_at: Callable[[Any, Any], Any] | None = None,
    start: Callable[[Any], Any] | None = None,
    restart: Any = None,
  ) -> 'Sequence':
    """Checks the fields."""
    _checks.optimiser('bj.Sequence takes an optax optimiser', optimiser)
    _checks.sequence_fields(set, steps, batch_at, start, restart)
    return super().__new__(cls, optimiser, set, steps, batch_at, start, restart)


# What a named solver takes for each of its sequences.
SequenceLike: TypeAlias = Sequence | optax.GradientTransformation


def as_sequence(record: Any, name: str, **defaults: Any) -> Sequence:
  """Converts an optimiser to a `Sequence` and fills in its unset fields.

  Args:
    record: a `Sequence`, or an optax transformation.
    name: name of the sequence, for the error.
    **defaults: values for unset fields.

  Returns:
    A `Sequence` with `steps` and `restart`.

  Raises:
    TypeError: for anything else, for instance a number.

  Example:
    >>> import bilevel_jax as bj, optax
    >>> record = bj.types.as_sequence(optax.sgd(0.1), 'lower', steps=5)
    >>> print(record.steps, record.restart)
    5 False
  """
  if not isinstance(record, Sequence):
    expected = f'{name} takes an optax optimiser or a bj.Sequence of one'
    _checks.optimiser(expected, record)
    record = Sequence(record)
  usual = {'steps': 1, 'restart': False} | defaults
  unset = {n: v for n, v in usual.items() if getattr(record, n) is None}
  return record._replace(**unset)


def value_sequence(
  record: SequenceLike | None, lower: Sequence, **defaults: Any
) -> Sequence:
  """The record of a sequence that follows the lower loss's minimiser.

  Args:
    record: an optimiser or a record; None for the optimiser of `lower`.
    lower: the record of the lower variable; its set is the default.
    **defaults: values for other unset fields.

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
  chosen = Sequence(lower.optimiser) if record is None else record
  return as_sequence(chosen, 'value', **defaults)


def linear_sequence(record: SequenceLike | None, lower: Sequence) -> Sequence:
  """The record of a sequence that solves a system in the lower Hessian.

  Args:
    record: an optimiser or a record; None for the optimiser of `lower`.
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
  chosen = Sequence(lower.optimiser) if record is None else record
  zero = lambda params: optax.tree.zeros_like(params.lower)
  return as_sequence(chosen, 'linear', start=zero)


@functools.cache
def _sequences_type(names: tuple[str, ...]) -> type:
  # Cached, because a scan requires equal pytrees in two traces, and pytrees of
  # different classes are not equal.
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
