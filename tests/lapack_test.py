"""The warning of batched factorisations that can deadlock."""

import warnings

import jax
import jax.numpy as jnp
import optax
import pytest

import bilevel_jax as bj
from bilevel_jax import _lapack

SGD = optax.sgd(0.1)
SEEDS = bj.BilevelParams(jnp.ones((2, 3)), jnp.ones((2, 3)))
pytestmark = pytest.mark.skipif(
  not _lapack.AFFECTED, reason='This jaxlib has no such deadlock.'
)


@pytest.fixture(autouse=True)
def _at_risk(monkeypatch):
  """Without the flag in the environment; the running XLA has read it."""
  monkeypatch.setenv('XLA_FLAGS', '')
  monkeypatch.setattr(_lapack, '_warned', False)


def _solves(count):
  def lower(x, y, batch):
    loss = jnp.sum((y - x) ** 2)
    for shift in range(count):
      matrix = jnp.diag(2 + shift + y**2)
      loss += jnp.sum(jnp.linalg.solve(matrix, x) ** 2)
    return loss

  return bj.BilevelProblem(lambda x, y, batch: jnp.sum((y - 1) ** 2), lower)


def _v_pbgd(problem):
  return bj.v_pbgd(problem, penalty=1.0, upper=SGD, lower=SGD)


def _traced(solver, params):
  """An update of both seeds, traced in three ways."""

  def steps(params):
    step = lambda carry, _: (
      carry[0],
      solver.update(None, carry[1], carry[0])[1],
    )
    carry = (params, solver.init(params))
    return jax.lax.scan(lambda c, t: (step(c, t), None), carry, length=2)[0]

  yield lambda: jax.eval_shape(jax.vmap(steps), params)
  yield lambda: jax.eval_shape(jax.vmap(jax.jit(steps)), params)
  yield lambda: jax.eval_shape(jax.jit(jax.vmap(steps)), params)


@pytest.mark.parametrize('way', range(3))
def test_seeds_of_a_loss_with_two_solves_warn_once(way, monkeypatch):
  trace = list(_traced(_v_pbgd(_solves(2)), SEEDS))[way]
  with pytest.warns(RuntimeWarning, match='XLA_FLAGS=--xla_cpu') as caught:
    trace()
  assert len(caught) == 1
  monkeypatch.setattr(_lapack, '_warned', False)
  monkeypatch.setenv('XLA_FLAGS', f'--{_lapack.FLAG}=false')
  list(_traced(_v_pbgd(_solves(2)), SEEDS))[way]()


def test_a_batch_within_a_loss_warns():
  def loss(x, batch):
    matrices = jnp.eye(3) * (2 + x**2) * jnp.ones((4, 1, 1))
    return sum(jnp.linalg.slogdet(matrices * k)[1].sum() for k in (1, 2))

  oracle, x = bj.gradient(loss), jnp.ones(3)
  state = oracle.init(x)
  with pytest.warns(RuntimeWarning, match='can deadlock'):
    jax.eval_shape(oracle.update, None, state, x)


def test_one_seed_one_solve_and_our_own_factorisations_do_not_warn():
  one = jax.tree.map(lambda z: z[0], SEEDS)
  solver = _v_pbgd(_solves(2))
  jax.eval_shape(solver.update, None, solver.init(one), one)
  ours = [
    _v_pbgd(_solves(1)),
    bj.solvers.stable(
      _solves(0), upper=SGD, lower=SGD, decay=0.5, least_curvature=0.1
    ),
    bj.solvers.pzobo(_solves(0), upper=SGD, lower=SGD, key=0, directions=2),
    *(
      bj.aid_bilevel(_solves(0), upper=SGD, lower=SGD, solve=solve)
      for solve in (
        bj.linear_solvers.nystrom(2, 0.1),
        bj.linear_solvers.gmres(2),
        bj.linear_solvers.dense_solve(),
      )
    ),
  ]
  losses = lambda x, batch: jnp.stack([x @ x, jnp.sum(x), jnp.sum(x**3)])
  links = (bj.aggregators.upgrad(3), bj.aggregators.aligned_mtl(3))
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    for solver in ours:
      next(_traced(solver, SEEDS))()
    for link in links:
      chain = optax.chain(bj.multi_objective(losses, 3), link, SGD)
      next(_traced(chain, SEEDS.upper))()
