"""Reinforcement learning from human feedback as a bilevel problem.

Paper: Shen, Yang and Chen, Principled Penalty-based Methods for Bilevel
Reinforcement Learning and RLHF, 2024.

    python -m experiments.pbrl.rlhf --env=CartPole-v1 --preset=quick
    python -m experiments.pbrl.rlhf --env=Breakout-MinAtar --preset=quick
    python -m experiments.pbrl.rlhf --env=Catch-bsuite --preset=informative
    python -m experiments.pbrl.rlhf --suite=atari --preset=quick
    python -m experiments.pbrl.rlhf render --preset=quick
    python -m experiments.pbrl.rlhf export --preset=quick
    python -m experiments.pbrl.rlhf --labels=pairs.jsonl --preset=quick

Expected: of 500, PBRL 472 ± 44, DRLHF 460 ± 99, the true reward 487 ± 12,
random labels 32 ± 55, and a constant reward 487 ± 12 like the true one, so that
CartPole cannot show learning from preferences. Time: 5 CPU-minutes.

The upper level fits a reward model to preferences between fragments of the
policy's episodes; the lower level is the optimal policy for that reward. PBRL,
DRLHF, an actor-critic on the true reward and two controls have equal labels and
equal steps; PBRL's two policies share the environments. The controls are random
labels, and a reward of 1 per step, which uses no labels: a method has learnt
from preferences only if it is above both. True returns are those of the last
training episodes, with sampled actions, truncated at the environment's limit;
`area` is their mean over the records of a run. `export` writes pairs for people
to label, `--labels` trains on them, and `render` draws the policy.

The preset `informative` is for games on which a constant reward orders few
pairs, Catch-bsuite and SpaceInvaders-MinAtar. Ties are labelled 0.5, labels
have less noise, advantages are normalised, the penalty is never negative, and
three rates are tried for each row. There are two more rows: a constant reward
of -1, and an ensemble that chooses the pairs it disagrees on.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness
from experiments.pbrl import (
  labels,
  preferences,
  rlhf_compiled,
  rlhf_games,
  rlhf_report,
  rlhf_settings,
)
from experiments.rl import policies

PRESETS = rlhf_settings.PRESETS


def main(options: harness.Options) -> harness.Report:
  """Runs all methods, saves their policies, and draws an episode."""
  settings = rlhf_settings.resolve(options.settings)
  suite = rlhf_compiled if settings.suite == 'gymnax' else rlhf_games
  outcomes = suite.run(options, settings)
  if all(outcome.failure for outcome in outcomes.values()):
    raise harness.AllStoppedError('all methods failed.')
  report = rlhf_report.report(options, settings, outcomes)
  render(options)
  return report


def _policy_file(options, settings):
  """File of the saved policy of PBRL, else of another method."""
  folder = pathlib.Path(options.workdir)
  names = sorted(settings.methods, key=lambda name: name != 'pbrl')
  files = [folder / rlhf_report.policy_file(name) for name in names]
  return next((f for f in files if f.exists()), files[0])


def render(options: harness.Options) -> None:
  """Draws an episode of the saved policy."""
  settings = rlhf_settings.resolve(options.settings)
  policies.show(_policy_file(options, settings))


def export(options: harness.Options) -> None:
  """Writes pairs of the saved or an initial policy, for people to label."""
  settings = rlhf_settings.resolve(options.settings)
  if settings.suite != 'gymnax':
    raise harness.SettingsError('export needs --suite=gymnax.')
  pairs, count = settings.preferences, settings.preferences.start_pairs
  agent = rlhf_compiled.make_parts(settings, 'drlhf').agent
  keys = jax.random.split(jax.random.key(0), 4)
  policy, file = agent.init(keys[0]), _policy_file(options, settings)
  if file.exists():
    policy = policy._replace(actor=policies.load(file).actor)
  collector = rlhf_compiled.make_collector(
    settings, agent, settings.rollouts.environments
  )
  dtype = jnp.dtype(rlhf_settings.environment_spec(settings).dtype)

  def make(key):
    def body(state, key):
      rollout, state = collector.collect(policy, state)
      shape = (pairs.pairs, 2)
      return state, preferences.draw(key, rollout, shape, pairs.fragment, dtype)

    rollout_keys = jax.random.split(key, -(-count // pairs.pairs))
    return jax.lax.scan(body, collector.init(keys[1]), rollout_keys)[1]

  drawn = jax.device_get(jax.jit(make)(keys[2]))
  drawn = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], drawn)
  first, second = (jax.tree.map(lambda x, i=i: x[:, i], drawn) for i in (0, 1))
  path = pathlib.Path(options.workdir) / 'pairs.jsonl'
  unlabelled = np.full(len(first.returns), 0.5, np.float32)
  pairs = preferences.Pairs(first, second, unlabelled)
  labels.write(path, pairs, labelled=False)
  source = f'the policy of {file}' if file.exists() else 'an initial policy'
  print(
    f'{path}: {len(unlabelled)} pairs of {source}. Replace each null by 0, 1 '
    'or 0.5.'
  )


STUDY = harness.Study(
  main,
  PRESETS,
  check=rlhf_settings.check,
  modes={'render': render, 'export': export},
  renamed=rlhf_settings.RENAMED,
)


if __name__ == '__main__':
  harness.run(STUDY)
