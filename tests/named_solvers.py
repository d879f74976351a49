"""Builders of all named solvers that take records of sequences.

Their signatures have a parameter for a `Sequence`. `NUMBERS` has the other
arguments, so that most new solvers need no entry here.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj

S = bj.Sequence
SEQUENCES = (bj.types.SequenceLike, bj.types.SequenceLike | None)
NUMBERS: dict[str, Any] = {
  'averaging': 0.5,
  'decay': 0.5,
  'key': 0,
  'least_curvature': 0.1,
  'levels': lambda params: (jnp.zeros(2),),
  'order': 2,
  'parts': 1,
  'penalty': 2.0,
  'period': 2,
  'proximity': 0.5,
  'step': 0.1,
  'step_size': 0.3,
  'temperature': 0.5,
  'terms': 2,
  'tracking': 0.5,
  'workers': 2,
}
BATCH = {
  'c': np.array([0.7, -0.4], np.float32),
  'd': np.array([1.2, 0.8], np.float32),
  'row': np.array([0, 2]),
}
NESTED = bj.BilevelParams(
  np.array([0.5, -0.3], np.float32), np.array([0.4, 0.9], np.float32)
)


class Case(NamedTuple):
  """A solver without its records.

  Attributes:
    make: maps records by name to the solver.
    params: the initial parameters.
    base: records of sequences that take no bare optimiser.
    updates: the number of updates that show a difference.
  """

  make: Callable[..., Any]
  params: Any = NESTED
  base: Mapping[str, Any] = {}
  updates: int = 1


def _upper_loss(x, y, batch):
  pull = jnp.sum((x - batch['c']) ** 2) + jnp.sum(x * y)
  return jnp.sum((y - batch['c']) ** 2) / 4 + pull / 2


def _lower_loss(x, y, batch):
  error = y - x[::-1] * batch['d']
  return jnp.sum(error**2) / 2 + jnp.sum(error**4) / 20


PROBLEM = bj.BilevelProblem(_upper_loss, _lower_loss)


def _process(x):
  chances = jnp.array([[[0.7, 0.3], [0.2, 0.8]], [[0.5, 0.5], [0.9, 0.1]]])
  rewards = jnp.stack([jnp.array([1.0, 0.0]), x])
  return bj.rl.make_mdp(chances, rewards, discount=0.5)


def _policy_loss(x, y, batch):
  return jax.nn.softmax(y)[0, 1] * x[0] + jnp.sum((x - batch['c']) ** 2)


def _bound(call: Callable[..., Any], *args: Any) -> Callable[..., Any]:
  """A solver with all of its arguments except the records."""
  wanted = inspect.signature(call).parameters
  more = {n: NUMBERS[n] for n in wanted if n in NUMBERS}
  return functools.partial(call, *args, **more)


def _levels(call):
  inner = lambda x, batch: jnp.sin(x) * batch['d']
  outer = lambda y, batch: jnp.sum((y - batch['c']) ** 2)
  return Case(_bound(call, [inner, outer]), bj.sequences(main=NESTED.upper))


def _stsa():
  increments = {
    'x': lambda z, batch: z.y - 2 * z.x,
    'y': lambda z, batch: jnp.sin(z.x) * batch['d'] + batch['c'] - z.y,
  }
  params = bj.sequences(x=NESTED.upper, y=NESTED.lower)
  return Case(lambda **records: bj.stsa(increments, steps=records), params)


def _seal():
  upper = lambda y, batch: jnp.sum((y - batch['c']) ** 2)
  rows = lambda y, batch: (y - batch['d']) ** 2
  index = lambda batch: batch['row']
  make = _bound(bj.solvers.seal, upper, rows)
  scores = lambda selector: bj.solvers.RowScores(selector, 3, index)
  return Case(
    lambda selector, **records: make(scores=scores(selector), **records),
    NESTED.lower,
  )


def _a3c():
  mdp = bj.rl.random_mdp(0, states=3, actions=2, discount=0.5)
  features = bj.rl.random_features(1, states=3, size=2)
  params = bj.sequences(actor=jnp.zeros((3, 2)), critic=jnp.ones(2))
  return Case(_bound(bj.solvers.a3c_td0, mdp, features), params)


def _line(keep=lambda line: line):
  line = keep(bj.projections.affine_set([[1.0, 1.0]], [1.0]))
  return {'lower': S(optax.sgd(0.2), set=line)}


def _lv_hba(problem):
  inside = bj.projections.Joint(
    lambda pair: tuple(jnp.minimum(z, 0.5) for z in pair), ('upper',)
  )

  def make(multiplier, proximal, **records):
    return bj.solvers.lv_hba(
      problem,
      lambda x, y: y - 0.5,
      penalty=2.0,
      multipliers=bj.solvers.Multipliers(multiplier, proximal),
      **records,
    )

  return Case(make, base={'lower': S(optax.sgd(0.2), set=inside)})


def _two_losses(problem):
  """A problem with a second upper loss, for solvers that take several."""

  def upper(x, y, batch):
    out = problem.upper(x, y, batch)
    out, *aux = out if isinstance(out, tuple) else (out,)
    losses = jnp.stack([out, out / 2 + jnp.sum((y - 1) ** 2)])
    return (losses, *aux) if aux else losses

  return problem._replace(upper=upper)


def _lazy(line):
  return bj.projections.Lazy(line, 0.5, key=0)


OTHER_PROBLEMS: dict[str, Callable[[], Case]] = {
  'a3c_td0': _a3c,
  'nasa': lambda: _levels(bj.solvers.nasa),
  'pbrl': lambda: Case(
    _bound(bj.solvers.pbrl, _policy_loss, _process),
    bj.BilevelParams(NESTED.upper, jnp.zeros((2, 2))),
  ),
  'scgd': lambda: _levels(bj.solvers.scgd),
  'scsc': lambda: _levels(bj.solvers.scsc),
  'seal': _seal,
  'stsa': _stsa,
}
# Nested problems for which a solver needs a set, or more than `NUMBERS`.
SPECIAL: dict[str, Callable[[Any], Case]] = {
  'forum': lambda p: Case(
    functools.partial(bj.solvers.forum, _two_losses(p), 2)
  ),
  'aipod': lambda p: Case(_bound(bj.aipod, p), base=_line()),
  'e_aipod': lambda p: Case(_bound(bj.e_aipod, p), base=_line(_lazy)),
  'lv_hba': _lv_hba,
  'moml': lambda p: Case(functools.partial(bj.solvers.moml, _two_losses(p), 2)),
  'srba': lambda p: Case(_bound(bj.solvers.srba, p), updates=2),
  't_rhg': lambda p: Case(functools.partial(bj.t_rhg, p, truncate=1)),
  'v_pbsgd': lambda p: Case(
    _bound(
      functools.partial(
        bj.solvers.v_pbsgd, value=bj.solvers.RandomStop(0.3, 2, key=0)
      ),
      p,
    )
  ),
  # The first move of a period sees the large batch.
  'vrbo': lambda p: Case(_bound(bj.solvers.vrbo, p), updates=2),
}


# Sequences in a record of a solver's own.
IN_RECORDS = {'lv_hba': ('multiplier', 'proximal'), 'seal': ('selector',)}


def record_names(solver: str) -> tuple[str, ...]:
  """The sequences that a solver takes a record for."""
  if solver == 'stsa':
    return ('x', 'y')
  call = getattr(bj.solvers, 'rhg' if solver == 't_rhg' else solver)
  found = inspect.signature(call).parameters.items()
  own = tuple(n for n, p in found if p.annotation in SEQUENCES)
  return own + IN_RECORDS.get(solver, ())


def make_case(solver: str, problem: bj.BilevelProblem = PROBLEM) -> Case:
  """A solver without its records, on a nested problem if it takes one."""
  if solver in OTHER_PROBLEMS:
    return OTHER_PROBLEMS[solver]()
  if solver in SPECIAL:
    return SPECIAL[solver](problem)
  return Case(_bound(getattr(bj.solvers, solver), problem))


def make_records(solver: str) -> dict[str, bj.Sequence]:
  """A record of plain descent for each of its sequences."""
  usual = {n: S(optax.sgd(0.2)) for n in record_names(solver)}
  return usual | dict(make_case(solver).base)


SOLVERS = [
  name for name in bj.solvers.__all__ if name.islower() and record_names(name)
]
NESTED_SOLVERS = [
  name
  for name in bj.solvers.__all__
  if 'problem' in inspect.signature(getattr(bj.solvers, name)).parameters
]

# Slow in some tests: the code of another solver with other numbers or in
# another order, one that solves linear systems in each step, and those that
# move twice.
VARIANTS = {
  'aid_bilevel',
  'aipod',
  'alset',
  'alt_pbgd',
  'amigo',
  'bome',
  'bsa',
  'e_aipod',
  'f2sa',
  'f2sa_p',
  'forum',
  'fsla',
  'lv_hba',
  'ma_soba',
  'meha',
  'moml',
  'mrbo',
  'pbgd_free',
  'pbrl',
  'pzobo',
  'saba',
  'srba',
  'sustain',
  't_rhg',
  'ttsa',
  'v_pbsgd',
  'vrbo',
}
