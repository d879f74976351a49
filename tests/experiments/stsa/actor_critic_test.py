"""The tabular actor-critic: closed forms, samples and assumptions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from experiments.stsa import actor_critic, chains


@pytest.fixture(scope='module')
def process():
  return actor_critic.make_process()


@pytest.fixture(scope='module')
def chain(process):
  return actor_critic.actor_critic_chain(process)


@pytest.fixture
def x():
  return jax.random.normal(jax.random.key(3), (8,))


def test_values_solve_the_bellman_equation(process, x):
  moves, rewards = process.under(x)
  values = process.values(x)
  np.testing.assert_allclose(
    values, rewards + process.discount * moves @ values, rtol=1e-5
  )
  np.testing.assert_allclose(moves.sum(1), 1, rtol=1e-5)
  np.testing.assert_allclose(process.visits(x).sum(), 1, rtol=1e-5)


def test_policy_gradient_is_the_mean_increment_at_the_values(process, x):
  actor, critic = actor_critic.mean_increments(process, x, process.values(x))
  np.testing.assert_allclose(actor, jax.grad(process.objective)(x), atol=1e-6)
  np.testing.assert_allclose(critic, 0, atol=1e-6)


@pytest.mark.slow
def test_samples_have_the_mean_increments(process, chain, x):
  y = jnp.array([0.3, -1.0, 2.0, 0.0])
  z = bj.sequences(x=x, y1=y)
  keys = jax.random.split(jax.random.key(0), 100_000)
  means = actor_critic.mean_increments(process, x, y)
  for name, mean in zip(chain.names, means, strict=True):
    draw = jax.vmap(lambda k, n=name: chain.increments[n](z, k))
    drawn = jax.jit(draw)(keys)
    error = np.abs(drawn.mean(0) - mean)
    assert np.all(error < 5 * drawn.std(0) / np.sqrt(len(keys)))


@pytest.mark.slow
def test_inner_error_vanishes_at_the_start(chain):
  z = chain.start(jax.random.key(1))
  assert chain.errors(z)['inner'] == 0
  assert chain.errors(z)['main'] > 1e-5


def test_assumptions_hold_and_are_checked(process, chain):
  spectrum = chains.check_assumptions(
    chain, ratio=2.0, scale=0.25, offset=1.0, fast=False
  )
  assert spectrum.rate > 0
  with pytest.raises(chains.AssumptionError, match='larger offset'):
    chains.check_assumptions(
      chain, ratio=2.0, scale=3.0, offset=1.0, fast=False
    )
  # The value of a state without visits cannot be learned.
  trapped = process._replace(
    moves=jnp.zeros((4, 3, 4)).at[:, :, 0].set(1.0),
    restart=jnp.array([1.0, 0, 0, 0]),
  )
  with pytest.raises(chains.AssumptionError, match='Restart in every state'):
    actor_critic.actor_critic_chain(trapped)
  assert actor_critic.check_critic(process) > 0.01
