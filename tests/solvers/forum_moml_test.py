"""FORUM and MOML: several upper losses, one lower problem."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests import contract, problems
from tests.contract import INNER, RATE, Row

S = bj.Sequence


def _two_losses(x, y, batch):
  """The upper loss, and the distance to another point."""
  other = ((y['b'] + 1) ** 2).sum() / 4 + ((x['a'] - 1) ** 2).sum() / 2
  return jnp.stack([contract.upper_loss(x, y, batch), other])


PROBLEM = contract.PROBLEM._replace(upper=_two_losses)


def _forum(wrap, eta, rate):
  sgd = optax.sgd(rate)
  value = S(sgd, steps=INNER, batch_at=contract.inner_batch)
  solver = bj.solvers.forum(
    PROBLEM, 2, rate=eta, upper=sgd, lower=sgd, value=value
  )
  return bj.evaluation.wrapped(solver, wrap)


def _moml(wrap, rate):
  sgd = optax.sgd(rate)
  lower = S(sgd, steps=INNER, batch_at=contract.inner_batch)
  solver = bj.solvers.moml(PROBLEM, ('one', 'two'), upper=sgd, lower=lower)
  return bj.evaluation.wrapped(solver, wrap)


ROWS = (
  Row(
    'forum',
    _forum,
    {'gradients/upper': 2, 'gradients/lower': 2 + INNER},
    covers=('multi_objective_gap',),
    hyper={'eta': 1.0, 'rate': RATE},
  ),
  Row(
    'moml',
    _moml,
    {
      'gradients/upper': 2,
      'gradients/lower': INNER,
      'hessian_vector_products/lower': 2 * INNER,
    },
    parts='none',
  ),
)

TARGETS = np.array([[1.0, 0.0], [3.0, 1.0]])
# The lower minimiser is x; the upper losses pull it to two points.
FRONT = bj.BilevelProblem(
  upper=lambda x, y, batch: jnp.sum((y - jnp.asarray(TARGETS)) ** 2, axis=1),
  lower=lambda x, y, batch: jnp.sum((y - x) ** 2) / 2,
)


def distance_to_front(x):
  """From the segment between the two targets, on which all is optimal."""
  line = TARGETS[1] - TARGETS[0]
  share = np.clip((x - TARGETS[0]) @ line / (line @ line), 0, 1)
  return np.linalg.norm(x - TARGETS[0] - share * line)


def falling(rate):
  return optax.sgd(lambda count: rate / (1 + count / 100))


@pytest.mark.slow
def test_both_end_on_the_pareto_front(x64):
  start = bj.BilevelParams(jnp.array([0.0, 3.0]), jnp.array([-1.0, 2.0]))
  sgd = optax.sgd(0.5)
  for solver, room in (
    (
      bj.solvers.forum(
        FRONT, 2, upper=falling(0.1), lower=falling(0.1), rate=1.0,
        value=S(sgd, steps=10),
      ),
      1e-2,
    ),
    (
      bj.solvers.moml(
        FRONT, 2, upper=optax.sgd(0.1), lower=S(sgd, steps=20)
      ),
      1e-6,
    ),
  ):  # fmt: skip
    params, state = bj.testing.run(solver, start, 3_000)
    assert distance_to_front(np.asarray(params.upper)) < room
    np.testing.assert_allclose(params.lower, params.upper, atol=2 * room)
    assert set(bj.values(state)) >= {'objective_0', 'objective_1', 'lower'}


@pytest.mark.slow
def test_one_upper_loss_is_bome_and_rhg():
  upper, lower = problems.QUADRATIC[:2]
  single = bj.BilevelProblem(
    lambda x, y, batch: upper(x, y, batch)[None], lower
  )
  sgd = optax.sgd(0.1)
  loop = {'upper': sgd, 'lower': S(sgd, steps=3)}
  value = {'upper': sgd, 'lower': sgd, 'value': S(sgd, steps=3)}
  pairs = (
    (
      bj.solvers.forum(single, 1, rate=0.5, **value),
      bj.bome(problems.QUADRATIC, eta=0.5, **value),
    ),
    (
      bj.solvers.moml(single, 1, **loop),
      bj.rhg(problems.QUADRATIC, **loop),
    ),
  )
  for ours, theirs in pairs:
    one, _ = bj.testing.run(ours, problems.start(), 5)
    two, _ = bj.testing.run(theirs, problems.start(), 5)
    np.testing.assert_allclose(one.upper, two.upper, rtol=1e-4)
    np.testing.assert_allclose(one.lower, two.lower, rtol=1e-4)


def test_moml_takes_another_aggregator_and_starts():
  start = bj.BilevelParams(jnp.array([0.0, 3.0]), jnp.array([-1.0, 2.0]))
  sgd = optax.sgd(0.5)
  mean = bj.solvers.moml(
    FRONT, 2, upper=optax.sgd(0.1), aggregator=bj.aggregators.mean(2),
    lower=S(sgd, steps=20, start=lambda p: jnp.zeros(2), restart=True),
  )  # fmt: skip
  params, _ = bj.testing.run(mean, start, 300)
  np.testing.assert_allclose(params.upper, TARGETS.mean(0), atol=1e-4)


def test_errors():
  sgd = optax.sgd(0.1)
  with pytest.raises(ValueError, match='a start of the inner loop'):
    bj.solvers.moml(FRONT, 2, upper=sgd, lower=S(sgd, restart=True))
  three = bj.solvers.forum(FRONT, 3, upper=sgd, lower=sgd, value=sgd)
  params = bj.BilevelParams(jnp.zeros(2), jnp.zeros(2))
  with pytest.raises(TypeError, match=r'shape \(2,\), expected \(3,\)'):
    three.update(None, three.init(params), params)
  with pytest.raises(ValueError, match='distinct objectives'):
    bj.oracles.multi_objective_gap(FRONT, ('a', 'a'))
  for wrong in (0, 2.0, 'ab'):
    for make in (
      lambda n: bj.solvers.forum(FRONT, n, upper=sgd, lower=sgd, value=sgd),
      lambda n: bj.solvers.moml(FRONT, n, upper=sgd, lower=sgd),
      lambda n: bj.multi_objective(FRONT.upper, n),
    ):
      with pytest.raises(ValueError, match='a whole number of objectives >= 1'):
        make(wrong)
