"""Reinforcement learning from human feedback, as a bilevel problem.

Paper: Shen, Yang and Chen, Principled Penalty-based Methods for Bilevel
Reinforcement Learning and RLHF, 2024.

    python -m experiments.pbrl.rlhf --env=CartPole-v1 --preset=quick
    python -m experiments.pbrl.rlhf --env=Breakout-MinAtar --preset=quick
    python -m experiments.pbrl.rlhf --suite=atari --preset=quick
    python -m experiments.pbrl.rlhf render --preset=quick
    python -m experiments.pbrl.rlhf export --preset=quick
    python -m experiments.pbrl.rlhf --labels=pairs.jsonl --preset=quick

Expected: of 500, PBRL 472 ± 44, DRLHF 460 ± 99, the true reward 487 ± 12,
random labels 32 ± 55, and a constant reward 487 ± 12, as the true one: CartPole
cannot show what preferences teach. Time: 5 CPU-minutes.

The upper level fits a reward model to preferences between fragments of what the
policy does; the lower level is the policy, best for that reward. PBRL, DRLHF,
an actor-critic on the true reward, and two controls at equal labels and equal
steps: PBRL's two policies have half of the environments each. The controls are
labels drawn by a coin, and a reward of 1 for every step, which learns nothing
from labels: preferences have taught something only above both. True returns are
those of the training's last episodes, actions drawn, truncated at the
environment's limit; `area` is their mean over the records of a run. `export`
writes pairs for people to label, `--labels` trains on them; `render` shows the
policy.
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
  """Runs all methods, keeps their policies, and draws an episode of one."""
  settings = rlhf_settings.resolve(options.settings)
  suite = rlhf_compiled if settings.suite == 'gymnax' else rlhf_games
  outcomes = suite.run(options, settings)
  if all(outcome.failure for outcome in outcomes.values()):
    raise harness.AllStoppedError('no method came to an end.')
  report = rlhf_report.report(options, settings, outcomes)
  render(options)
  return report


def _trained(options, settings):
  """The policy that is kept: PBRL's, or that of the first method."""
  folder = pathlib.Path(options.workdir)
  names = sorted(settings.methods, key=lambda name: name != 'pbrl')
  files = [folder / rlhf_report.policy_file(name) for name in names]
  return next((f for f in files if f.exists()), files[0])


def render(options: harness.Options) -> None:
  """Draws an episode of the policy that was kept."""
  settings = rlhf_settings.resolve(options.settings)
  policies.show(_trained(options, settings))


def export(options: harness.Options) -> None:
  """Writes pairs for people to label, of the kept policy or of a first one."""
  settings = rlhf_settings.resolve(options.settings)
  if settings.suite != 'gymnax':
    raise harness.SettingsError('export takes an environment of gymnax.')
  pairs, count = settings.preferences, settings.preferences.start_pairs
  agent = rlhf_compiled.parts_of(settings, 'drlhf').agent
  keys = jax.random.split(jax.random.key(0), 4)
  policy, kept = agent.init(keys[0]), _trained(options, settings)
  if kept.exists():
    policy = policy._replace(actor=policies.load(kept).actor)
  collector = rlhf_compiled.collector_of(
    settings, agent, settings.rollouts.environments
  )
  dtype = jnp.dtype(rlhf_settings.played(settings).dtype)

  def make(key):
    def body(state, key):
      rollout, state = collector.collect(policy, state)
      shape = (pairs.pairs, 2)
      return state, preferences.draw(key, rollout, shape, pairs.fragment, dtype)

    several = jax.random.split(key, -(-count // pairs.pairs))
    return jax.lax.scan(body, collector.init(keys[1]), several)[1]

  drawn = jax.device_get(jax.jit(make)(keys[2]))
  drawn = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], drawn)
  first, second = (jax.tree.map(lambda x, i=i: x[:, i], drawn) for i in (0, 1))
  path = pathlib.Path(options.workdir) / 'pairs.jsonl'
  none = np.full(len(first.returns), 0.5, np.float32)
  labels.write(path, preferences.Pairs(first, second, none), labelled=False)
  of = f'the policy of {kept}' if kept.exists() else 'a first policy'
  print(f'{path}: {len(none)} pairs of {of}. Put 0, 1 or 0.5 for each null.')


STUDY = harness.Study(
  main,
  PRESETS,
  paper='pbrl',
  binary='rlhf',
  check=rlhf_settings.check,
  modes={'render': render, 'export': export},
  renamed=rlhf_settings.RENAMED,
)


if __name__ == '__main__':
  harness.run(STUDY)
