"""The actor-critic oracle: gradients, environments and errors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests import problems
from tests.references import returns

LIMIT, GOAL = 5, 3


def _step(key, state, action):
  """A walk from 0: terminates at the goal, truncated after `LIMIT` steps."""
  del key
  position, time = state
  position, time = position + 2 * action - 1, time + 1
  terminated = position >= GOAL
  truncated = (time >= LIMIT) & ~terminated
  ends = terminated | truncated
  after = (jnp.where(ends, 0, position), jnp.where(ends, 0, time))
  reward = jnp.where(terminated, 1.0, -0.1)
  return _see(after), after, reward, terminated, truncated, _see((position,))


def _see(state):
  return jnp.stack([jnp.sin(1.0 * state[0]), jnp.cos(1.0 * state[0])])


WALK = bj.rl.Environment(
  lambda key: (_see((0,)), (0, 0)), lambda *args: _step(*args), actions=2
)


def _steer(key, state, action):
  noise = jax.random.normal(key)
  after = 0.5 * state + action[0] + 0.1 * noise
  end = jnp.abs(after) > 2
  state = jnp.where(end, 0, after)
  no = jnp.array(False)
  return state[None], state, -(after**2), end, no, after[None]


STEER = bj.rl.Environment(
  lambda key: (jnp.zeros(1), jnp.zeros([])), _steer, actions=(1,)
)


def policy(actor, observation):
  hidden = jnp.tanh(actor['a'] @ observation)
  return actor['b'] @ hidden


def value(critic, observation):
  return jnp.tanh(critic['a'] @ observation) @ critic['b']


def normal_policy(actor, observation):
  return policy(actor, observation), actor['deviation']


def make_params(seed=0, dtype=jnp.float32, inputs=2, outputs=2):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  actor = {'a': draw(3, inputs), 'b': draw(outputs, 3)}
  if inputs == 1:
    actor['deviation'] = draw(outputs) / 5
  critic = {'a': draw(4, inputs), 'b': draw(4)}
  return bj.rl.ActorCriticParams(actor, critic)


def make(env=WALK, act=policy, **changes):
  """An oracle; changes may name fields of its records."""
  settings = dict(environments=3, steps=8, discount=0.9, key=0) | changes
  take = lambda kind: kind(
    **{n: settings.pop(n) for n in kind._fields if n in settings}
  )
  collection, advantages = take(bj.rl.Collection), take(bj.rl.Advantages)
  return bj.rl.actor_critic(
    act, value, env, collection=collection, advantages=advantages, **settings
  )


def next_rollout(oracle, env, act, params, state):
  """The rollout of an oracle's next update."""
  family = bj.rl.action_distribution(env.actions)
  collector = bj.rl.rollouts(
    env,
    lambda p, key, o: family.sample(key, jax.vmap(act, (None, 0))(p.actor, o)),
    environments=3,
    steps=8,
  )
  return collector.collect(params, state.inner[0])[0]


def reference_loss(params, rollout, act, at, *, entropy, scale, normalise):
  """The loss with advantages and targets constant at `at`, in float64."""
  numbers = lambda fn, p, o: np.array(
    [[fn(p, jnp.asarray(x)) for x in row] for row in np.asarray(o)], float
  )
  values = lambda p, o: numbers(value, p.critic, o)
  actual = returns.advantages(
    scale * np.asarray(rollout.rewards, float),
    values(at, rollout.observations),
    values(at, rollout.next_observations),
    np.asarray(rollout.terminated),
    np.asarray(rollout.truncated),
    0.9,
    0.95,
  )
  targets = values(at, rollout.observations) + actual
  if normalise:
    actual = (actual - actual.mean()) / actual.std()
  critic = np.mean((values(params, rollout.observations) - targets) ** 2) / 2
  actions = np.asarray(rollout.actions)
  if act is policy:
    logits = numbers(act, params.actor, rollout.observations)
    logits = logits - logits.max(-1, keepdims=True)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.take_along_axis(p, actions[..., None], -1)[..., 0]
    logs, spread = np.log(chosen), -(p * np.log(p)).sum(-1)
  else:
    mean = numbers(policy, params.actor, rollout.observations)[..., 0]
    deviation = np.exp(float(params.actor['deviation'][0]))
    density = np.exp(-(((actions[..., 0] - mean) / deviation) ** 2) / 2)
    logs = np.log(density / deviation / np.sqrt(2 * np.pi))
    spread = np.log(deviation * np.sqrt(2 * np.pi * np.e))
  actor = -np.mean(logs * actual)
  return actor + critic - entropy * np.mean(spread), (actor, critic)


@pytest.mark.slow
@pytest.mark.parametrize('env', ['walk', 'steer'])
def test_gradients_match_differences_of_the_reference_loss(x64, env):
  """Discrete actions with all options; continuous actions without."""
  if env == 'walk':
    env, act, params = WALK, policy, make_params(dtype=jnp.float64)
    options = {'entropy': 0.3, 'scale': 0.5, 'normalise': True}
  else:
    env, act = STEER, normal_policy
    params = make_params(dtype=jnp.float64, inputs=1, outputs=1)
    options = {'entropy': 0.2, 'scale': 1.0, 'normalise': False}
  oracle = make(
    env,
    act,
    entropy_bonus=options['entropy'],
    reward_scale=options['scale'],
    normalise=options['normalise'],
  )
  state = oracle.init(params)
  rollout = next_rollout(oracle, env, act, params, state)
  actual, after = jax.jit(oracle.update)(None, state, params)
  _, (actor, critic) = reference_loss(params, rollout, act, params, **options)
  np.testing.assert_allclose(bj.values(after)['actor'], actor, rtol=1e-6)
  np.testing.assert_allclose(bj.values(after)['critic'], critic, rtol=1e-6)
  # Central differences along random directions of each sequence.
  rng = np.random.default_rng(1)
  for name in ('actor', 'critic'):
    way = jax.tree.map(
      lambda x: rng.normal(size=x.shape), getattr(params, name)
    )
    move = lambda size, name=name, way=way: params._replace(
      **{
        name: jax.tree.map(
          lambda x, d: x + size * d, getattr(params, name), way
        )
      }
    )
    up, down = (
      reference_loss(move(s), rollout, act, params, **options)[0]
      for s in (1e-5, -1e-5)
    )
    slope = optax.tree.vdot(getattr(actual, name), way)
    np.testing.assert_allclose(slope, (up - down) / 2e-5, rtol=1e-5)


def test_one_step_gives_temporal_differences():
  """Gives delta grad log pi and delta grad V for a known action and critic."""
  params = make_params()
  oracle = make(environments=1, steps=1, decay=0.0, discount=0.5)
  state = oracle.init(params)
  actual, after = jax.jit(oracle.update)(None, state, params)
  at = _see((0,))
  action = int(after.inner[0].state[0][0] > 0)
  ahead = _see((2 * action - 1,))
  delta = -0.1 + 0.5 * value(params.critic, ahead) - value(params.critic, at)
  slope = jax.grad(lambda a: jax.nn.log_softmax(policy(a, at))[action])
  scale = lambda tree: jax.tree.map(lambda x: -delta * x, tree)
  chex.assert_trees_all_close(
    actual.actor, scale(slope(params.actor)), rtol=1e-5
  )
  chex.assert_trees_all_close(
    actual.critic, scale(jax.grad(value)(params.critic, at)), rtol=1e-5
  )


def test_environments_continue_and_episodes_are_recorded():
  """Against the same environments run one by one in Python."""
  right = lambda params, key, observations: jnp.array([1, 0, 1], jnp.int32)
  collector = bj.rl.rollouts(WALK, right, environments=3, steps=4, window=4)
  state = collector.init(jax.random.key(0))
  collect, finished = jax.jit(collector.collect), []
  now, returns_now = [(0, 0)] * 3, [0.0] * 3
  for update in range(4):
    rollout, state = collect(None, state)
    for t in range(4):
      for e, action in enumerate((1, 0, 1)):
        assert rollout.actions[t, e] == action
        np.testing.assert_allclose(
          rollout.observations[t, e], _see(now[e]), rtol=1e-5, atol=1e-6
        )
        position, time = now[e][0] + 2 * action - 1, now[e][1] + 1
        np.testing.assert_allclose(
          rollout.next_observations[t, e],
          _see((position,)),
          rtol=1e-5,
          atol=1e-6,
        )
        ended, cut = position >= GOAL, time >= LIMIT and position < GOAL
        assert rollout.terminated[t, e] == ended
        assert rollout.truncated[t, e] == cut
        returns_now[e] += 1.0 if ended else -0.1
        now[e] = (position, time)
        if ended or cut:
          finished.append((returns_now[e], time, 4 * update + t + 1))
          now[e], returns_now[e] = (0, 0), 0.0
    episodes = state.episodes
    assert episodes.count == len(finished)
    remembered = sorted(zip(*(np.asarray(x).tolist() for x in episodes[:3])))
    remembered = [x for x in remembered if x[2] >= 0]
    np.testing.assert_allclose(remembered, sorted(finished[-4:]), rtol=1e-6)
  ends = [e[0] for e in finished[-4:]]
  np.testing.assert_allclose(
    bj.rl.mean_return(state.episodes, last=9), np.mean(ends), rtol=1e-6
  )


def test_the_ring_has_the_latest_of_many_episodes():
  def step(key, state, action):
    yes = jnp.array(True)
    return 0.0, state + 1, state * 1.0, yes, ~yes, 0.0

  env = bj.rl.Environment(lambda key: (0.0, 0), step, actions=2)
  act = lambda params, key, observations: jnp.zeros(2, jnp.int32)
  collector = bj.rl.rollouts(env, act, environments=2, steps=9, window=5)
  state = collector.init(jax.random.key(0))
  assert jnp.isnan(bj.rl.mean_return(state.episodes))
  _, state = collector.collect(None, state)
  assert state.episodes.count == 18
  np.testing.assert_array_equal(
    np.sort(state.episodes.returns), [6, 7, 7, 8, 8]
  )


def test_learns_to_walk_with_vmapped_seeds():
  """The optimal policy ends each episode in three steps with return 0.8."""

  def run(key):
    solver = bj.descend(
      make(key=key, environments=8, entropy_bonus=0.01),
      actor=optax.adam(0.03),
      critic=optax.adam(0.1),
    )
    params = make_params()

    def step(carry, _):
      updates, state = solver.update(None, carry[1], carry[0])
      return (optax.apply_updates(carry[0], updates), state), None

    carry = (params, solver.init(params))
    return jax.lax.scan(step, carry, length=200)[0]

  _, state = jax.jit(jax.vmap(run))(jnp.arange(2))
  episodes = bj.outputs(state)['episodes']
  assert (jax.vmap(bj.rl.mean_return)(episodes) > 0.7).all()
  assert (episodes.returns[0] != episodes.returns[1]).any()
  counts = bj.counts(state)
  np.testing.assert_array_equal(counts['steps/environment'], [12_800] * 2)
  np.testing.assert_array_equal(counts['gradients/actor'], [200] * 2)


@pytest.mark.slow
def test_mean_over_environments_is_the_mean_over_parts():
  """Without normalisation, the inner oracle is linear in environments."""
  params = make_params()
  rollout = next_rollout(None, WALK, policy, params, make().init(params))
  give = lambda **options: bj.rl.actor_critic_gradient(
    policy,
    value,
    distribution=bj.rl.categorical(),
    advantages=bj.rl.Advantages(0.9, **options),
  )
  split = lambda batch, parts: jax.tree.map(
    lambda x: jnp.stack(jnp.split(x, parts, axis=1)), batch
  )
  full, parts = give(), bj.evaluation.accumulate(give(), 3, split=split)
  actual = [o.update(rollout, o.init(params), params)[0] for o in (full, parts)]
  chex.assert_trees_all_close(*actual, rtol=2e-5, atol=1e-6)
  with pytest.raises(ValueError, match='not linear'):
    bj.evaluation.accumulate(give(normalise=True), 3)


@pytest.mark.slow
def test_entropy_gradient_matches_differences(x64):
  """With zero advantages only the entropy has a gradient."""
  params = make_params(dtype=jnp.float64)
  rollout = next_rollout(None, WALK, policy, params, make().init(params))
  rollout = rollout._replace(rewards=jnp.zeros_like(rollout.rewards))
  zero = params._replace(critic=jax.tree.map(jnp.zeros_like, params.critic))
  oracle = bj.rl.actor_critic_gradient(
    policy,
    value,
    distribution=bj.rl.categorical(),
    advantages=bj.rl.Advantages(0.9),
    entropy_bonus=1.0,
  )
  actual, _ = oracle.update(rollout, oracle.init(zero), zero)

  def loss(actor):
    logits = jax.vmap(jax.vmap(lambda o: policy(actor, o)))(
      rollout.observations
    )
    p = jax.nn.softmax(logits)
    return jnp.mean(jnp.sum(p * jnp.log(p), -1))

  exact = problems.by_differences(loss, zero.actor)
  chex.assert_trees_all_close(actual.actor, exact, atol=1e-8)


def test_bad_input_is_an_error():
  params = make_params()
  with pytest.raises(TypeError, match=r'2 discrete actions.*logits'):
    make(act=lambda actor, o: (o, o)).init(params)
  with pytest.raises(TypeError, match=r'continuous actions of shape \(1,\)'):
    make(STEER, act=lambda actor, o: jnp.zeros(2)).init(params)
  bad_value = bj.rl.actor_critic(
    policy,
    lambda critic, o: o,
    WALK,
    collection=bj.rl.Collection(1, 1),
    advantages=bj.rl.Advantages(0.9),
    key=0,
  )
  with pytest.raises(TypeError, match=r'scalar, got shape \(2,\)'):
    bad_value.init(params)
  with pytest.raises(TypeError, match='the sequences actor, critic'):
    make().init(bj.BilevelParams(jnp.ones(2), jnp.ones(2)))
  with pytest.raises(TypeError, match='draws random numbers'):
    make(key=None)
  for name, message in (
    ('environments', 'whole number of environments >= 1, got 0'),
    ('steps', 'whole number of steps'),
    ('window', 'episodes in the window'),
  ):
    with pytest.raises(ValueError, match=message):
      make(**{name: 0})
  with pytest.raises(ValueError, match='discount is in'):
    make(discount=1.1)
  with pytest.raises(ValueError, match='entropy_bonus'):
    make(entropy_bonus=-1.0)


def test_a_delayed_actor_acts_with_old_parameters():
  """Environments continue in the state while the parameters lag."""
  oracle = make(environments=2, steps=3)
  late = bj.evaluation.delayed(oracle, workers=3)
  first, other = make_params(0), make_params(1)
  state, plain = late.init(first), oracle.init(first)
  update, now = jax.jit(late.update), jax.jit(oracle.update)
  for finished in (first, other, other):
    actual, state = update(None, state, finished)
    expected, plain = now(None, plain, first)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)
  assert bj.values(state)['delay'] == 2
  assert bj.counts(state)['steps/environment'] == 3 * 6
