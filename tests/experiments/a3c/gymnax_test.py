"""Round-robin workers on gymnax: training, evaluation and resumption."""

import dataclasses
import json

import gymnax as gymnax_lib
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from experiments import harness, tables
from experiments.a3c import gymnax
from experiments.rl import environments, evaluation, networks

KEY = jax.random.key(0)
SETTINGS = gymnax.Settings(
  workers=2,
  environments=4,
  frames=1_600,
  records=5,
  window=10,
  evaluation=evaluation.Settings(episodes=6),
)


def evaluated(workdir, policy='greedy'):
  """Reads the results of an evaluation."""
  path = workdir / 'evaluation' / policy / 'results.json'
  return json.loads(path.read_text())


@pytest.mark.slow
def test_a_run_and_its_resumption(options, results, tmp_path, monkeypatch):
  """A run resumed after half of the records has the same metrics.

  So has its evaluation; sampled actions have another mean.
  """
  full = options(SETTINGS, paper='a3c', binary='gymnax')
  harness.execute(gymnax.main, full)
  stored = results()
  metrics = stored['metrics']
  assert (
    metrics['frames'] == 1_600
    and metrics['worst_training_return/round_robin'] > 5
  )
  assert metrics['delay_share/round_robin/delay=1'] == (2 * 10 - 1) / 20
  assert metrics['training_return/round_robin/half_width'] >= 0
  assert 15 < metrics['random_return'] < 30
  rows = (tmp_path / 'table.md').read_text().splitlines()[2:]
  cells = [[cell.strip() for cell in row.split('|')[3:5]] for row in rows]
  assert cells == [['2', '1600']]
  for name in ('policy.npz', 'policy.gif', 'training_return.png', 'table.md'):
    assert (tmp_path / name).exists()
  train = harness.train

  def half(*given):
    *given, measure = given
    stop = lambda history: len(history['training_return']) >= 2
    return train(*given, measure._replace(stop_when=stop))

  other = full._replace(workdir=str(tmp_path / 'other'))
  with monkeypatch.context() as patch:
    patch.setattr(harness, 'train', half)
    assert gymnax.train(other).step == 4
  harness.execute(gymnax.evaluate, other)
  half_way = evaluated(tmp_path / 'other')['metrics']
  harness.execute(gymnax.main, other)
  again = json.loads((tmp_path / 'other' / 'results.json').read_text())
  same = lambda m: {k: v for k, v in m.items() if 'second' not in k}
  assert same(again['metrics']) == same(metrics)
  sampled = harness.replaced(SETTINGS, {'evaluation.policy': 'sampled'})
  for given in (full, other, full._replace(settings=sampled)):
    harness.execute(gymnax.evaluate, given)
  greedy = evaluated(tmp_path)['metrics']
  assert evaluated(tmp_path / 'other')['metrics'] == greedy != half_way
  assert (half_way['updates'], greedy['updates']) == (8, 20)
  drawn = evaluated(tmp_path, 'sampled')['metrics']
  assert drawn['evaluation_return'] != greedy['evaluation_return']


@pytest.mark.slow
def test_evaluation_of_a_run(options, tmp_path, capsys):
  """Agrees with a plain loop, and does not change the run.

  DeepSea is deterministic: all greedy episodes of a seed are equal.
  """
  settings = dataclasses.replace(
    SETTINGS,
    env='DeepSea-bsuite',
    frames=320,
    records=2,
    evaluation=evaluation.Settings(episodes=5),
  )
  known = environments.make(settings.env)
  given = options(settings, paper='a3c', binary='gymnax')
  with pytest.raises(harness.MissingDataError, match='no checkpoint of a run'):
    harness.execute(gymnax.evaluate, given)
  gymnax.train(given)
  files = lambda: {
    p: p.stat().st_mtime_ns
    for p in (tmp_path / settings.env).rglob('*')
    if p.is_file()
  }
  before = files()
  capsys.readouterr()
  harness.execute(gymnax.evaluate, given)
  assert 'evaluation return, interval over seeds' in capsys.readouterr().out
  assert files() == before  # It does not write there.
  stored = evaluated(tmp_path)
  metrics = stored['metrics']
  assert stored['mode'] == 'evaluate' and metrics['updates'] == 4

  agent = networks.agent(known.shape, known.environment.actions)
  params = jax.eval_shape(agent.init, jax.random.key(0))
  loaded = harness.load(tmp_path, name=settings.env, like=params)
  step, expected = jax.jit(known.environment.step), []
  for seed in range(2):
    actor = jax.tree.map(lambda x, i=seed: x[i], loaded.params.actor)
    observation, state = known.environment.reset(jax.random.key(seed))
    total, over = 0.0, False
    while not over:
      action = jnp.argmax(agent.policy(actor, observation))
      observation, state, reward, terminated, truncated, _ = step(
        jax.random.key(9), state, action
      )
      total += float(reward)
      over = bool(terminated) or bool(truncated)
    expected.append(total)
  per_seed = stored['per_seed']['evaluation_return']
  assert per_seed == pytest.approx(expected)
  assert metrics['evaluation_return'] == pytest.approx(np.mean(expected))
  assert metrics['worst_evaluation_return'] == pytest.approx(min(expected))
  # Float32 returns of equal episodes.
  assert metrics['evaluation_return/over_episodes/half_width'] < 1e-6
  half = 12.7062 * abs(expected[0] - expected[1]) / 2
  assert metrics['evaluation_return/half_width'] == pytest.approx(
    half, abs=1e-5
  )
  rows = (tmp_path / 'evaluation/greedy/episodes.csv').read_text().splitlines()
  assert len(rows) == 1 + 2 * 5 and rows[1].startswith('0,0,')


def test_stored_evaluation_has_its_own_name(tmp_path, options):
  given = options(
    gymnax.PRESETS['quick'], paper='a3c', binary='gymnax', preset='quick'
  )
  episodes = evaluation.Episodes(np.ones((2, 3)), np.ones((2, 3), int))
  mode = lambda options: evaluation.report(
    options,
    options.settings.evaluation,
    episodes,
    seeds=(0, 1),
    updates=1,
    about={},
  )
  harness.execute(mode, given)
  path = tables.store(tmp_path / 'evaluation' / 'greedy', tmp_path)
  assert path.name == 'cartpole_greedy.json'
  command = json.loads(path.read_text())['command']
  assert command.endswith('a3c.gymnax evaluate --preset=quick')


# One of each suite, by default.
QUICK = (
  'CartPole-v1',
  'DeepSea-bsuite',
  'FourRooms-misc',
  'MNISTBandit-bsuite',
)


@pytest.mark.parametrize(
  'env',
  [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in sorted(gymnax_lib.registered_envs)
  ],
)
def test_every_environment_of_gymnax_is_traced(env, tmp_path, monkeypatch):
  """Made within the trace, as a run does; shapes of two updates and a game."""
  settings = gymnax.Settings(env=env, workers=2, environments=2, rollout=2)
  if env == 'MNISTBandit-bsuite':
    # Without the files: see also `environments_test`.
    monkeypatch.setattr(environments, '_MNIST_FOLDER', tmp_path)
    with pytest.raises(harness.MissingDataError, match='needs MNIST'):
      gymnax.check(settings)
    return
  gymnax.check(settings)
  agent, _ = gymnax.make_solver(settings, jax.random.key(0))

  def run(key):
    solver = gymnax.make_solver(settings, key)[1]
    params = agent.init(key)
    state = solver.init(params)
    for _ in range(2):
      updates, state = solver.update(None, state, params)
      params = bj.apply_updates(params, updates)
    return params, state

  params, state = jax.eval_shape(jax.vmap(run), jax.random.split(KEY, 2))
  for part in (params, state):
    assert all(x.shape[0] == 2 for x in jax.tree.leaves(part))
  known = environments.make(env)
  act = evaluation.make_act(agent, known.environment.actions, 'sampled')
  play = lambda actor: evaluation.play(
    known.environment, act, actor, KEY, episodes=3, limit=known.limit
  )
  one = jax.eval_shape(agent.init, KEY)
  assert jax.eval_shape(play, one.actor).returns.shape == (3,)


@pytest.mark.slow
@pytest.mark.parametrize('env', sorted(gymnax_lib.registered_envs))
def test_every_environment_of_gymnax_runs(env, options, results, tmp_path):
  """Training, GIF and evaluation, with the smallest sizes."""
  settings = gymnax.Settings(
    env=env,
    workers=2,
    environments=2,
    rollout=2,
    frames=16,
    evaluation=evaluation.Settings(episodes=3),
  )
  try:
    gymnax.check(settings)
  except harness.MissingDataError:
    assert env == 'MNISTBandit-bsuite'
    return
  given = options(settings, seeds=(0,))
  harness.execute(gymnax.main, given)
  assert results()['metrics']['frames'] == 16
  harness.execute(gymnax.evaluate, given)
  metrics = evaluated(tmp_path)['metrics']
  assert np.isfinite(metrics['evaluation_return'])  # All episodes ended.
  assert metrics['evaluation_length'] >= 1


def test_unknown_environment():
  with pytest.raises(harness.SettingsError, match='did you mean CartPole-v1'):
    gymnax.check(gymnax.Settings(env='CartPole'))


def test_number_of_rounds():
  assert gymnax.count_rounds(gymnax.Settings(frames=2_560 * 7 + 3)) == 7
  assert gymnax.count_rounds(gymnax.Settings(frames=1)) == 1


@pytest.mark.slow
def test_cart_pole_is_solved(options, results):
  harness.execute(gymnax.main, options(gymnax.Settings(), seeds=(0, 1, 2)))
  metrics = results()['metrics']
  assert metrics['training_return/round_robin'] >= 475
  assert metrics['worst_training_return/round_robin'] >= 450


def test_continuous_actions():
  """Gradients on Pendulum are finite and nonzero."""
  settings = gymnax.Settings(env='Pendulum-v1', workers=2, environments=2)
  agent, solver = gymnax.make_solver(settings, jax.random.key(0))
  params = agent.init(jax.random.key(1))
  updates, _ = jax.jit(solver.update)(None, solver.init(params), params)
  leaves = jax.tree.leaves(updates)
  assert all(np.isfinite(x).all() for x in leaves)
  assert any(np.any(x != 0) for x in leaves)
