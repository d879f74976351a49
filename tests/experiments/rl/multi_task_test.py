"""One policy for several tasks: shared and masked outputs, played tasks."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from experiments.rl import minatar, multi_task

GAMES = ('Breakout', 'Asterix')


@pytest.fixture(scope='module')
def model():
  return multi_task.make_model(minatar.make_tasks(GAMES))


@pytest.mark.slow
def test_games_look_alike(model):
  games = minatar.make_tasks((*GAMES, 'SpaceInvaders'))
  assert games.shape == (10, 10, 6) and games.actions == 5
  assert games.allowed.sum(axis=1).tolist() == [3, 5, 4]
  params = model.init(jax.random.key(0))
  observations = jnp.ones([4, 10, 10, 4])
  logits, values = model.outputs(params, observations, 0)
  assert values.shape == (4,) and (logits[:, 3:] < -1e8).all()
  # The policy never draws actions that the game does not have.
  family = bj.rl.categorical()
  drawn = family.sample(jax.random.key(1), jnp.tile(logits[:1], (500, 1)))
  assert set(drawn.tolist()) == {0, 1, 2}
  np.testing.assert_allclose(
    family.entropy(logits), family.entropy(logits[:, :3]), rtol=1e-6
  )


@pytest.mark.slow
def test_gradients_of_both_games_are_those_of_each_game(model):
  """The trunk gets the mean over games, the heads the sum."""
  learning = multi_task.Learning(environments=2, rollout=3)
  params, key = model.init(jax.random.key(0)), jax.random.key(3)
  both = multi_task.make_oracle(
    model, bj.aggregators.mean(2), learning, key=key
  )
  state = both.init(params)
  gradients, after = jax.jit(both.update)(None, state, params)
  halves = []
  for game in (0, 1):
    one = multi_task.make_oracle(
      model, bj.aggregators.mean(1), learning, key=key, played=[game]
    )
    start = one.init(params)
    # The same environments give the same rollout.
    inner = ((state.inner[0][game],), start.inner[1])
    halves.append(
      jax.jit(one.update)(None, start._replace(inner=inner), params)[0]
    )
  half = lambda a, b: (a + b) / 2
  chex.assert_trees_all_close(
    gradients.trunk, jax.tree.map(half, *(h.trunk for h in halves)), atol=1e-5
  )
  heads = jax.tree.map(jnp.add, *(h.heads for h in halves))
  chex.assert_trees_all_close(gradients.heads, heads, atol=1e-5)
  assert bj.counts(after)['steps/environment'] == 2 * 2 * 3
  assert len(bj.outputs(after)['episodes']) == 2
