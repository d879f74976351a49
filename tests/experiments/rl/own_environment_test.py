"""A user's own environment, and what is wrong with one."""

import sys
import types

import jax
import jax.numpy as jnp
import pytest

import bilevel_jax as bj
from experiments import harness
from experiments.rl import environments


def make(**changes):
  """A walk with six fields of a step, some changed."""

  def step(key, state, action):
    del key, action
    fields = {
      'observation': jnp.zeros(2),
      'state': state + 1,
      'reward': jnp.float32(1),
      'terminated': state > 3,
      'truncated': jnp.array(False),
      'final_observation': jnp.zeros(2),
    }
    return tuple((fields | changes).values())

  reset = lambda key: (jnp.zeros(2), jnp.int32(0))
  return bj.rl.Environment(reset, step, actions=2)


@pytest.fixture
def module(monkeypatch):
  """A module of a user."""
  mine = types.ModuleType('mine')
  monkeypatch.setitem(sys.modules, 'mine', mine)
  return mine


def test_kinds_of_environments(module):
  import gymnax

  module.Walk = make
  module.walk = make()
  module.known = environments.Known('', make(), (), 7)
  module.Pole = type(gymnax.make('CartPole-v1')[0])
  for name, shape, limit in (
    ('mine:Walk', (2,), 10_000),
    ('mine:walk', (2,), 10_000),
    ('mine:known', (2,), 7),
    ('mine:Pole', (4,), 500),
  ):
    known = environments.make(name)
    assert (known.name, known.shape, known.limit) == (name, shape, limit)
    assert known.environment.actions == 2
    assert environments.is_compiled(name)
  _, state = known.environment.reset(jax.random.key(0))
  step = known.environment.step(jax.random.key(0), state, 0)
  assert isinstance(step, bj.rl.Timestep)


@pytest.mark.parametrize(
  ('name', 'match'),
  [
    ('mine:', 'lacks a part: write module:Name'),
    ('nowhere_at_all:A', "no module 'nowhere_at_all'; start in its folder"),
    ('mine:Wolk', "mine has no 'Wolk'; did you mean Walk"),
    ('mine:broken', 'broken.. fails: ValueError: no level'),
    ('mine:number', 'is int, not an environment: make it a bj.rl.Env'),
    ('mine:wide', 'step returns reward of shape .2,., expected a scalar'),
    ('mine:other', 'step returns observation of shape .*expected'),
    ('mine:ends', 'returns terminated as int32, expected bool'),
    ('mine:still', 'actions is 0; give a number of discrete actions'),
  ],
)
def test_errors_say_what_to_change(module, name, match):
  def broken():
    raise ValueError('no level')

  module.Walk, module.broken, module.number = make, broken, 3
  module.wide = make(reward=jnp.zeros(2))
  module.other = make(observation=jnp.zeros(3))
  module.ends = make(terminated=jnp.int32(0))
  module.still = make()._replace(actions=0)
  with pytest.raises(harness.SettingsError, match=match):
    environments.make(name)


@pytest.mark.parametrize(
  ('changes', 'match'),
  [
    ({}, ''),
    ({'step_env': None}, 'for one of gymnax, it lacks step_env'),
    ({'action_space': None}, 'lacks action_space: inherit from gymnax'),
    ({'default_params': 3}, 'default_params has no max_steps_in_episode'),
    ({'action_space': lambda params: 2}, 'has actions of int: action_space'),
    ({'step': lambda *_: (jnp.zeros(2),) * 5}, 'step.* fails: .*expected 6'),
    ({'reset': lambda *_: (jnp.zeros(3), 0)}, 'step returns observation of'),
    ({'reset': lambda *_: jnp.zeros(2)}, 'reset.key. returns one, expected 2'),
    ({'reset': lambda *_: 1 / 0}, 'reset.key. fails: ZeroDivisionError'),
  ],
)
def test_errors_of_an_environment_of_gymnax(module, changes, match):
  from gymnax.environments import environment, spaces

  ends = {'final_observation': jnp.zeros(2)}
  falls = jnp.array(False)
  members = {
    'default_params': environment.EnvParams(),
    'reset': lambda key, params: (jnp.zeros(2), jnp.int32(0)),
    'step': lambda key, state, action, params: (
      *(jnp.zeros(2), state + 1, jnp.float32(1)),
      *(falls, falls, ends),
    ),
    'step_env': 'as step, without a reset',
    'action_space': lambda params: spaces.Discrete(2),
  } | changes
  module.maze = types.SimpleNamespace(
    **{name: each for name, each in members.items() if each is not None}
  )
  if not match:
    assert environments.make('mine:maze').shape == (2,)
    return
  with pytest.raises(harness.SettingsError, match=match):
    environments.make('mine:maze')
