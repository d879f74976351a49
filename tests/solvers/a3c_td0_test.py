"""A3C-TD(0): its updates, workers that share a program, what delays do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests.contract import COORDINATES, Row
from tests.references import actor_critic
from tests.tiers import first

STATES, ACTIONS = 6, 3
RADIUS = 0.5
BALL = functools.partial(optax.projections.projection_l2_ball, scale=RADIUS)


def problem(dtype=jnp.float32):
  """A process and features, some transitions impossible."""
  draw = np.random.default_rng(0)
  moves = draw.dirichlet(np.ones(STATES), size=(STATES, ACTIONS))
  moves = np.where(moves > 0.1, moves, 0)
  moves = moves / moves.sum(-1, keepdims=True)
  rewards = draw.uniform(size=(STATES, ACTIONS))
  mdp = bj.rl.make_mdp(
    jnp.asarray(moves, dtype), jnp.asarray(rewards, dtype), discount=0.9
  )
  return mdp, jnp.asarray(draw.normal(size=(STATES, COORDINATES)) / 4, dtype)


def params(seed, dtype=jnp.float32):
  draw = np.random.default_rng(seed + 100).normal
  return bj.sequences(
    actor=jnp.asarray(draw(size=(STATES, ACTIONS)), dtype),
    critic=jnp.asarray(draw(size=COORDINATES) / 10, dtype),
  )


def _row(wrap, rate):
  mdp, features = problem()
  solver = bj.solvers.a3c_td0(
    mdp, features, workers=3, actor=optax.sgd(rate),
    critic=bj.Sequence(optax.sgd(rate), set=BALL), key=0, samples=2,
  )  # fmt: skip
  return bj.evaluation.wrapped(solver, wrap)


ROWS = (
  Row(
    'a3c_td0',
    _row,
    {'samples/transitions': 2, 'projections/critic': 1},
    params=params,
    sets={'critic': lambda z: optax.projections.projection_l2_ball(z, RADIUS)},
    spacings=2,
    parts='none',
    keys=True,
  ),
)


@pytest.mark.slow
@pytest.mark.parametrize('dtype', first(['float64', 'float32']))
@pytest.mark.parametrize('service', ['round_robin', 'random'])
def test_updates_are_the_published_ones_for_the_samples_it_drew(service, dtype):
  up, down = (lambda k: 2 / (1 + k) ** 0.6), (lambda k: 0.8 / (1 + k) ** 0.4)
  with jax.enable_x64(dtype == 'float64'):
    mdp, features = problem(dtype)
    at = params(0, jnp.dtype(dtype))
    solver = bj.solvers.a3c_td0(
      mdp, features, workers=3, actor=optax.sgd(up),
      critic=bj.Sequence(optax.sgd(down), set=BALL),
      key=3, service=service, bound=4,
    )  # fmt: skip

    def body(carry, _):
      at, state = carry
      before = state.oracles[0].inner.inner.states[:, 0]
      updates, state = solver.update(None, state, at)
      at = bj.apply_updates(at, updates)
      seen = (before, bj.values(state))
      chains = state.oracles[0].inner.inner.states[:, 0]
      return (at, state), (
        at,
        seen,
        state.oracles[0].inner.inner.worker,
        chains,
      )

    run = jax.jit(lambda c: jax.lax.scan(body, c, length=40)[1])
    found, (chains, values), turns, after = jax.tree.map(
      np.asarray, run((at, solver.init(at)))
    )
    mdp, features, at = jax.tree.map(np.float64, (mdp, features, at))
  seen = [
    (chains[k, turns[k]], values['reward'][k], values['td_error'][k])
    for k in range(40)
  ]
  delays = values['delay'].astype(int)
  expected = actor_critic.a3c_td0(
    (mdp.transitions, mdp.rewards, mdp.discount), features, at.actor,
    at.critic, seen, delays=delays, actor=up, critic=down, radius=RADIUS,
  )  # fmt: skip
  atol = 1e-10 if dtype == 'float64' else 2e-5
  kept = 0
  for k, (theta, omega, (_, _, to)) in enumerate(expected):
    np.testing.assert_allclose(found.actor[k], theta, atol=atol)
    np.testing.assert_allclose(found.critic[k], omega, atol=atol)
    kept += after[k, turns[k]] == to
  # Nine of ten times the chain goes on to where the critic looked.
  assert 28 <= kept < 40
  np.testing.assert_allclose(
    np.linalg.norm(found.critic, axis=1).max(), RADIUS, rtol=1e-5
  )
  if service == 'round_robin':
    np.testing.assert_array_equal(delays, np.minimum(np.arange(40), 2))


def test_numbers_of_workers_share_a_program():
  mdp, features = problem()

  def run(workers):
    solver = bj.solvers.a3c_td0(
      mdp, features, workers=workers, actor=optax.sgd(0.1),
      critic=optax.sgd(0.1), key=0, bound=7, sampling='iid',
    )  # fmt: skip

    def body(carry, _):
      updates, state = solver.update(None, carry[1], carry[0])
      carry = bj.apply_updates(carry[0], updates), state
      return carry, bj.values(state)['delay']

    start = params(0)
    (end, _), delay = jax.lax.scan(body, (start, solver.init(start)), length=20)
    return end, delay

  ends, delays = jax.jit(jax.vmap(run))(jnp.array([1, 4, 8]))
  np.testing.assert_array_equal(delays[:, -1], [0, 3, 7])
  for i, n in enumerate((1, 4, 8)):
    alone, _ = jax.jit(lambda n=n: run(n))()
    for ours, theirs in zip(ends, alone, strict=True):
      np.testing.assert_allclose(ours[i], theirs, rtol=1e-4, atol=1e-5)


def test_errors():
  mdp, features = problem()
  sgd = optax.sgd(0.1)
  make = lambda **given: bj.solvers.a3c_td0(
    mdp, features, **{'actor': sgd, 'critic': sgd, 'key': 0} | given
  )
  for given, message in (
    ({'workers': 0}, 'workers >= 1'),
    ({'workers': 4, 'bound': 2}, 'bound is at least 3'),
    ({'workers': 2, 'sampling': 'offline'}, 'iid, markov'),
  ):
    with pytest.raises(ValueError, match=message):
      make(**given)
  with pytest.raises(TypeError, match='optax optimiser'):
    make(workers=2, critic=0.1)
  with pytest.raises(TypeError, match='pass key='):
    make(workers=2, key=None)
