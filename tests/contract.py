"""What a row of the contract says, the problem that rows share, and the rows.

`contract_test` runs everything that a solver of this library promises over a
table of methods. A row of it stands beside its method's test: a module of tests
names its rows `ROWS`, and `collect` finds them. A row is always a whole solver,
the method in its natural place, on one of two small problems:

- nested: two variables, `{'a': (10,)}` above and `{'b': (10,)}` below, whose
  losses are means over examples, with noise in both directions and a curvature
  that differs from example to example and from point to point;
- flat: one variable, `{'z': (10,)}`, and one loss, or three.

Coordinates do not mix, so that a sharded parameter needs no communication; that
a method is right where they do is shown by `tests/references`.
"""

import functools
import importlib
import itertools
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj

EXAMPLES = 16
INNER = 3  # Steps of the solvers with an inner loop.
# No state of a method's own, an array over objectives for instance, has a last
# axis of this length: what has one is taken for coordinates of the parameters.
COORDINATES = 10
OBJECTIVES = 3
PENALTY, RATE = 2.0, 0.1

_DRAW = np.random.default_rng(0).uniform
_A, _T, _C = _DRAW(-1, 1, (3, COORDINATES)) * np.array([[0.8], [1.0], [2.0]])
_H = _DRAW(0.5, 1.2, COORDINATES)


def _residual(variable, target):
  return variable - target.reshape(-1, COORDINATES).astype(variable.dtype)


def upper_loss(x, y, batch):
  """Noise `c` in the lower variable's slope, `e` in the upper one's."""
  fit = (_residual(y['b'], batch['c']) ** 2).sum(-1).mean() / 2
  own = (_residual(x['a'] - _T.astype(x['a'].dtype), batch['e']) ** 2).sum(-1)
  return fit + own.mean() / 2 + jnp.sin(x['a']) @ y['b'] / 8


def lower_loss(x, y, batch):
  """Each example has a curvature of its own. An auxiliary comes with it."""
  weight = batch['w'].reshape(-1, 1).astype(y['b'].dtype)
  pull = weight * (_A.astype(weight.dtype) * x['a'])
  error = _residual(y['b'] - pull, batch['d'])
  height = _H.astype(error.dtype) * (error**2 + error**4 / 40)
  return (weight * height).sum(-1).mean() / 2, error


def flat_loss(params, batch):
  return (_residual(params['z'], batch['c']) ** 2).sum(-1).mean() / 2


_CURVES = _DRAW(0.1, 0.7, (OBJECTIVES, COORDINATES))
_SHIFTS = _DRAW(-1, 2, (OBJECTIVES, COORDINATES))


def three_losses(params, batch):
  """Three objectives whose minimisers differ."""
  error = _residual(params['z'], batch['c'])[:, None]
  error = error - _SHIFTS.astype(error.dtype)
  return jnp.mean(_CURVES.astype(error.dtype) * error**2, axis=0).sum(-1) / 2


PROBLEM = bj.BilevelProblem(upper=upper_loss, lower=lower_loss)
X_SET = functools.partial(
  optax.projections.projection_box, lower={'a': -1.0}, upper={'a': 0.25}
)
# Bounds that differ from coordinate to coordinate.
Y_SET = functools.partial(
  optax.projections.projection_box,
  lower={'b': jnp.linspace(-2.0, -0.2, COORDINATES)},
  upper={'b': jnp.linspace(0.2, 2.0, COORDINATES)},
)


def random_batch(seed: int, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
  """A batch whose examples differ; its first leaf is of whole numbers."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(size=(EXAMPLES, *shape, COORDINATES))
  given = {
    'c': _C + normal(),
    'd': 0.3 + normal(INNER) / 2,
    'e': normal() / 2,
    'w': rng.uniform(0.5, 1.5, size=(EXAMPLES, INNER)),
  }
  numbers = {'at': jnp.arange(EXAMPLES, dtype=jnp.int32)}
  return numbers | {name: jnp.asarray(x, dtype) for name, x in given.items()}


def inner_batch(batch, t):
  """What inner step t sees: its own examples of the lower loss."""
  pick = lambda leaf: jnp.take(leaf, t, axis=1)
  return batch | {'d': pick(batch['d']), 'w': pick(batch['w'])}


def nested_params(seed: int, dtype: Any = jnp.float32) -> bj.BilevelParams:
  x, y = np.random.default_rng(seed + 100).uniform(size=(2, COORDINATES))
  return bj.BilevelParams(
    upper={'a': jnp.asarray(x, dtype)}, lower={'b': jnp.asarray(y / 2, dtype)}
  )


def with_sequence(**made: np.ndarray) -> Callable[..., Any]:
  """Nested parameters and one more lower variable, for bare oracles."""

  def params(seed: int, dtype: Any = jnp.float32):
    more = {name: {'b': jnp.asarray(z, dtype)} for name, z in made.items()}
    return bj.sequences(**nested_params(seed, dtype)._asdict(), **more)

  return params


def flat_params(seed: int, dtype: Any = jnp.float32):
  z = np.random.default_rng(seed + 100).normal(size=COORDINATES)
  return {'z': jnp.asarray(z, dtype)}


def by_descent(oracle: Any, **rates: Any) -> Any:
  """An oracle whose sequences all move by plain descent."""
  return bj.descend(oracle, **{n: optax.sgd(r) for n, r in rates.items()})


class Row(NamedTuple):
  """One method, and what is true of it.

  Attributes:
    name: of the row; its first word is the public name that the row is for.
    make: `make(wrap, **hyper)` gives a solver. `wrap` goes round its oracles.
      Look public names up in here, not beside it: a name that is missing then
      fails this row alone.
    counts: evaluations in one update, by the keys of `bj.counts`.
    covers: further public names that the row is for.
    params: gives parameters from a seed and a dtype.
    random_counts: further keys of `bj.counts`, of what is drawn at random.
    hyper: the numbers that `make` takes, also as arrays that are traced.
    schedules: those of them that may be schedules; None if all may.
    sets: the sequences that stay in a set, by name.
    spacings: how many spacings of floats they can be outside by rounding.
    same_as: the name of another row with the same updates.
    parts: what is equal on a whole batch and on the mean over parts of it:
      `exact` if gradients and losses are, `gradients` if they alone are, `none`
      for a method that is not linear in its samples.
    keys: whether what an evaluation sees depends on the ones before it, by a
      key or a warm start: then parts of a batch see other things.
    wraps: whether `make` gives `wrap` its oracles.
    devices: whether the row is run on eight devices too. One row for each
      oracle, wrapper or aggregator that treats its arrays in a way of its own.
    light: whether another row has the same code but for a number or a name:
      then one program is compiled, and what needs more is left to that row.
  """

  name: str
  make: Callable[..., optax.GradientTransformationExtraArgs]
  counts: Mapping[str, int]
  covers: tuple[str, ...] = ()
  params: Callable[..., Any] = nested_params
  random_counts: tuple[str, ...] = ()
  hyper: Mapping[str, float] = {'rate': RATE}
  schedules: tuple[str, ...] | None = None
  sets: Mapping[str, Any] = {}
  spacings: int = 1
  same_as: str | None = None
  parts: str = 'exact'
  keys: bool = False
  wraps: bool = True
  devices: bool = False
  light: bool = False

  @property
  def method(self) -> str:
    """The public name that the row is for."""
    return re.split(r'\W', self.name, maxsplit=1)[0]


# Hyperparameters of the penalty methods.
PENALISED = {'penalty': PENALTY, 'rate': RATE}

# Public names of these packages that are no method: types, and functions that
# solve nothing by themselves. What is neither here nor in a row is an error.
HELPERS = frozenset(
  {
    'DelayedState',
    'DynamicBarrierState',
    'EAipodPlan',
    'FamoState',
    'GapState',
    'ImplicitState',
    'MixedState',
    'MocoState',
    'Oracle',
    'OracleState',
    'ProxLinearState',
    'Rule',
    'SagaState',
    'SealState',
    'ScaleByPenaltyState',
    'SelectState',
    'Solve',
    'StormState',
    'WeightsState',
    'aggregated',
    'deal_batch',
    'e_aipod_plan',
    'jacobian_like',
    'power_schedule',
    'unmeasured',
    'seal_penalty',
    'split_batch',
  }
)
# Records of `descend` that have rows too.
RECORDS = ('descend', 'Lazy', 'Relaxed', 'Joint')

TESTS = pathlib.Path(__file__).parent


class Found(NamedTuple):
  """The rows of all modules of tests.

  Attributes:
    rows: by name, in the order of the modules.
    broken: by module, why its rows could not be read.
  """

  rows: dict[str, Row]
  broken: dict[str, str]


def collect(files: Iterable[pathlib.Path] | None = None) -> Found:
  """Finds the rows beside the tests; a module that fails hides no other.

  Args:
    files: modules of tests; by default all. Those that name `ROWS` and the
      contract are imported.
  """
  found = Found({}, {})
  for path in sorted(TESTS.rglob('*.py')) if files is None else files:
    text = path.read_text()
    if 'contract' not in text or not re.search(r'^ROWS\b', text, re.MULTILINE):
      continue
    parts = path.resolve().relative_to(TESTS.parent).with_suffix('').parts
    module = '.'.join(parts)
    try:
      for row in importlib.import_module(module).ROWS:
        if row.name in found.rows:
          raise ValueError(f'two rows have the name {row.name!r}')
        found.rows[row.name] = row
    except Exception as error:  # Whatever a method's author got wrong.
      found.broken[module] = f'{type(error).__name__}: {error}'
  return found


def public_names() -> dict[str, tuple[str, ...]]:
  """What needs a row, by package."""
  packages = ('aggregators', 'evaluation', 'oracles', 'solvers')
  names = {name: tuple(getattr(bj, name).__all__) for name in packages}
  return names | {'records': RECORDS}


def missing(
  public: Mapping[str, tuple[str, ...]], rows: Iterable[Row]
) -> list[str]:
  """The public names, by package, that have no row and are no helper."""
  rows = list(rows)
  covered = {row.method for row in rows}
  covered |= set(itertools.chain.from_iterable(row.covers for row in rows))
  return [
    f'{package}.{name}'
    for package, names in public.items()
    for name in names
    if name not in covered and name not in HELPERS
  ]
