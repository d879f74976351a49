"""Tables of adaptive model design against unrolled backups."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.pbrl import contexts

STATES, ACTIONS, WEIGHTS, DISCOUNT, TAU = 4, 3, 5, 0.8, 0.3
_DRAW = np.random.default_rng(3).normal
_MIX = [_DRAW(size=(STATES, ACTIONS, n, WEIGHTS)) for n in (STATES, 1, 1)]


def process(x):
  """A process in which all quantities depend on all weights."""
  logits, rewards, leader_rewards = (z @ x for z in _MIX)
  return contexts.Process(
    jax.nn.softmax(logits),
    jnp.tanh(rewards[..., 0]),
    jnp.sin(leader_rewards[..., 0]),
    jnp.full(STATES, 1 / STATES),
    DISCOUNT,
  )


def test_straight_is_the_softmax_wherever_its_logits_are():
  z = jnp.asarray(_DRAW(size=(STATES, ACTIONS)), jnp.float32) + 1e5
  policy, slope = jax.jvp(contexts.straight, (z,), (jnp.ones_like(z),))
  np.testing.assert_array_equal(policy, jax.nn.softmax(z))
  np.testing.assert_array_equal(slope, 1)


def test_slopes_are_those_of_the_backups(x64):
  x = jnp.asarray(_DRAW(size=WEIGHTS))

  def unrolled(x, backups):
    """Values of follower and leader by plain backups."""
    p = process(x)
    v = u = jnp.zeros(STATES)
    for _ in range(backups):
      q = p.rewards + DISCOUNT * jnp.einsum('sat,t->sa', p.transitions, v)
      pi = jnp.exp(q / TAU)
      pi = pi / pi.sum(1, keepdims=True)
      rewards = pi * (q - TAU * jnp.log(pi))
      expected = p.leader_rewards + DISCOUNT * jnp.einsum(
        'sat,t->sa', p.transitions, u
      )
      v, u = rewards.sum(1), (pi * expected).sum(1)
    return v, u

  @jax.jit
  def tabled(x, backups):
    step = lambda _, t: contexts.design_step(process, x, t, TAU)
    begin = contexts.zero_tables(STATES, WEIGHTS, x.dtype)
    return jax.lax.fori_loop(0, backups, step, begin)

  tables = tabled(x, 3)
  expected = jax.jit(
    lambda x: (*unrolled(x, 3), *jax.jacrev(lambda x: unrolled(x, 3))(x))
  )(x)
  for one, two in zip(tables, expected, strict=True):
    np.testing.assert_allclose(one, two, rtol=1e-10, atol=1e-12)

  # At the fixed point the slopes are derivatives through the optimum.
  @jax.jit
  def at_optimum(x):
    here = process(x)
    better = lambda _, z: contexts.improve(here, z, TAU)
    z = jax.lax.fori_loop(0, 20, better, jnp.zeros((STATES, ACTIONS)))
    best = jax.nn.softmax(contexts.optimum(here, z, TAU))
    return contexts.leader_return(here, best)

  far = tabled(x, 300)
  np.testing.assert_allclose(far.leader_values.mean(), at_optimum(x), rtol=1e-9)
  np.testing.assert_allclose(
    far.leader_slopes.mean(0), jax.grad(at_optimum)(x), rtol=1e-8, atol=1e-10
  )
