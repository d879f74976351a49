"""PZOBO: the hypergradient on average, and exactly with all directions."""

import jax
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests import contract, problems
from tests.contract import INNER, RATE, Row

S = bj.Sequence


def _row(wrap, rate, inner):
  solver = bj.solvers.pzobo(
    contract.PROBLEM,
    upper=optax.sgd(rate),
    lower=S(optax.sgd(inner), steps=INNER, batch_at=contract.inner_batch),
    smoothing=0.5,
    directions=2,
    key=jax.random.key(5),
  )
  return bj.evaluation.wrapped(solver, wrap)


ROWS = (
  Row(
    'pzobo',
    _row,
    {'gradients/lower': 3 * INNER, 'gradients/upper': 1},
    hyper={'rate': RATE, 'inner': RATE},
    keys=True,
    parts='none',
  ),
)


def pzobo(key, directions=1, smoothing=0.1):
  return bj.solvers.pzobo(
    problems.MIXED,
    upper=optax.sgd(1.0),
    lower=S(optax.sgd(0.4), steps=60),
    smoothing=smoothing,
    directions=directions,
    key=key,
  )


def test_is_the_hypergradient_on_average():
  params = problems.mixed_params()
  keys = jax.random.split(jax.random.key(0), 500)

  @jax.jit
  def found():
    def one(key, directions):
      made = pzobo(key, directions)
      return -made.update(None, made.init(params), params)[0].upper

    return [jax.vmap(lambda key, q=q: one(key, q))(keys) for q in (1, 2, 3)]

  exact = problems.mixed_hypergradient(params.upper)
  for directions, slopes in enumerate(found(), 1):
    error = slopes.std(0) / np.sqrt(len(keys))
    assert np.all(np.abs(slopes.mean(0) - exact) < 5 * error + 1e-3), directions
  # All directions: no noise is left.
  assert slopes.std(0).max() < 1e-3


def test_its_key_outlives_a_donated_state():
  key = jax.random.key(3)
  solver, params = pzobo(key), problems.mixed_params()
  step = jax.jit(solver.update, donate_argnums=1)
  for _ in range(2):
    step(None, solver.init(params), params)
  assert not key.is_deleted()


def test_errors():
  with pytest.raises(ValueError, match='smoothing is a finite number > 0'):
    pzobo(0, smoothing=0.0)
  with pytest.raises(ValueError, match='directions >= 1'):
    pzobo(0, directions=0)
  with pytest.raises(TypeError, match='pass key='):
    pzobo(None).init(problems.mixed_params())


def test_records_say_no_more_than_inner_loops_do():
  sgd = optax.sgd(0.1)
  square = lambda x, y, batch: (x - y) ** 2
  problem = bj.BilevelProblem(square, square)
  with pytest.raises(ValueError, match='has no lower set'):
    bj.solvers.pzobo(problem, upper=sgd, lower=bj.Sequence(sgd, set=abs), key=0)
  lazy = bj.Sequence(sgd, steps=2, set=bj.projections.Lazy(abs, 0.5, key=0))
  with pytest.raises(TypeError, match='each step of its inner loop'):
    bj.rhg(problem, upper=sgd, lower=lazy)
  with pytest.raises(TypeError, match='each step of its inner loop'):
    bj.solvers.v_pbsgd(
      problem,
      penalty=1.0,
      upper=sgd,
      lower=lazy,
      value=bj.solvers.RandomStop(0.1, 2, key=0),
    )
