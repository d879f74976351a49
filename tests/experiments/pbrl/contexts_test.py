"""Tables of adaptive model design, against their definition, unrolled."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.pbrl import contexts

STATES, ACTIONS, WEIGHTS, DISCOUNT, HEAT = 4, 3, 5, 0.8, 0.3
_DRAW = np.random.default_rng(3).normal
_MIX = [_DRAW(size=(STATES, ACTIONS, n, WEIGHTS)) for n in (STATES, 1, 1)]


def process(x):
  """Everything depends on all weights."""
  moves, rewards, gains = (z @ x for z in _MIX)
  return contexts.Process(
    jax.nn.softmax(moves),
    jnp.tanh(rewards[..., 0]),
    jnp.sin(gains[..., 0]),
    jnp.full(STATES, 1 / STATES),
    DISCOUNT,
  )


def test_straight_is_the_softmax_wherever_its_logits_are():
  z = jnp.asarray(_DRAW(size=(STATES, ACTIONS)), jnp.float32) + 1e5
  found, slope = jax.jvp(contexts.straight, (z,), (jnp.ones_like(z),))
  np.testing.assert_array_equal(found, jax.nn.softmax(z))
  np.testing.assert_array_equal(slope, 1)


def test_slopes_are_those_of_the_backups(x64):
  x = jnp.asarray(_DRAW(size=WEIGHTS))

  def unrolled(x, backups):
    """Values and expectations by plain backups, to be differentiated."""
    p = process(x)
    v = u = jnp.zeros(STATES)
    for _ in range(backups):
      q = p.rewards + DISCOUNT * jnp.einsum('sat,t->sa', p.moves, v)
      pi = jnp.exp(q / HEAT)
      pi = pi / pi.sum(1, keepdims=True)
      earned = pi * (q - HEAT * jnp.log(pi))
      expected = p.gains + DISCOUNT * jnp.einsum('sat,t->sa', p.moves, u)
      v, u = earned.sum(1), (pi * expected).sum(1)
    return v, u

  @jax.jit
  def tabled(x, backups):
    step = lambda _, t: contexts.design_step(process, x, t, HEAT)
    begin = contexts.zero_tables(STATES, WEIGHTS, x.dtype)
    return jax.lax.fori_loop(0, backups, step, begin)

  found = tabled(x, 3)
  expected = jax.jit(
    lambda x: (*unrolled(x, 3), *jax.jacrev(lambda x: unrolled(x, 3))(x))
  )(x)
  for one, two in zip(found, expected, strict=True):
    np.testing.assert_allclose(one, two, rtol=1e-10, atol=1e-12)

  # At the fixed point they are those through the optimum.
  @jax.jit
  def at_optimum(x):
    here = process(x)
    better = lambda _, z: contexts.improve(here, z, HEAT)
    z = jax.lax.fori_loop(0, 20, better, jnp.zeros((STATES, ACTIONS)))
    best = jax.nn.softmax(contexts.optimum(here, z, HEAT))
    return contexts.leader_return(here, best)

  far = tabled(x, 300)
  np.testing.assert_allclose(far.gains.mean(), at_optimum(x), rtol=1e-9)
  np.testing.assert_allclose(
    far.gain_slopes.mean(0), jax.grad(at_optimum)(x), rtol=1e-8, atol=1e-10
  )
