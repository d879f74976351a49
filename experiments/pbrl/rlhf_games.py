"""RLHF in environments that Python steps: the games of the Atari.

The learner is that of the compiled suite. Games and seeds run one after
another. After a kill a run resumes from its parameters, optimisers, pairs and
scores; current episodes begin again.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel_jax as bj
from experiments import harness
from experiments.harness.app import termination
from experiments.harness.study import comparison
from experiments.pbrl import learner as learner_lib
from experiments.pbrl import preferences, rlhf_compiled, rlhf_settings
from experiments.pbrl.rlhf_settings import Settings
from experiments.rl import games, stepped


class Pool:
  """Games whose episodes continue from rollout to rollout.

  Args:
    make: from an index to a game.
    count: number of games.
    act: compiled, (actor, observations, key, step) -> actions.
    key: of actions.
  """

  def __init__(
    self,
    make: Callable[[int], games.Game],
    count: int,
    act: Callable[..., Any],
    key: jax.Array,
  ):
    """Begins the episodes."""
    self._games = [make(i) for i in range(count)]
    self._act, self._key, self._step = act, key, 0
    self._observations = [game.reset() for game in self._games]
    self._scores = [0.0] * count

  def collect(
    self, actor: Any, steps: int
  ) -> tuple[bj.rl.Rollout, list[float]]:
    """Collects a rollout (steps, games), and scores of finished episodes."""
    rows, ended = [], []
    for _ in range(steps):
      actions = np.asarray(
        self._act(
          actor, np.stack(self._observations), self._key, np.int32(self._step)
        )
      )
      self._step += 1
      row = []
      for i, game in enumerate(self._games):
        after = game.step(int(actions[i]))
        row.append(games.transition(self._observations[i], actions[i], after))
        self._scores[i] += after.score
        self._observations[i] = after.observation
        if after.terminated or after.truncated:
          ended.append(self._scores[i])
          self._observations[i], self._scores[i] = game.reset(), 0.0
      rows.append(row)
    return games.as_rollout(rows), ended


class Run:
  """A method, compiled once for all seeds.

  Args:
    settings: of the run, resolved.
    name: of the method.
  """

  def __init__(self, settings: Settings, name: str):
    """Makes the functions that the first call compiles."""
    self.settings, self.name = settings, name
    self.method = rlhf_settings.METHODS[name]
    parts = rlhf_compiled.make_parts(settings, name, settings.rates[0])
    self.parts, self.learner = parts, parts.learner
    self._labelled = rlhf_compiled.file_buffer(settings)

    def act(at, observations, key, step):
      logits = jax.vmap(parts.agent.policy, (None, 0))(at.actor, observations)
      return jax.random.categorical(jax.random.fold_in(key, step), logits)

    self._act = jax.jit(act)
    self._add = jax.jit(self.learner.add, donate_argnums=0)
    self._warm_up = jax.jit(self.learner.warm_up, donate_argnums=0)
    self._step = jax.jit(
      self.learner.step, static_argnames='reward_epoch', donate_argnums=(0, 1)
    )
    self._accuracy = jax.jit(
      lambda upper, held_out: preferences.accuracy(
        parts.reward.apply, upper, held_out
      )
    )

  def pool(self, seed: int, role: int, count: int, epoch: int) -> Pool:
    """Makes the games of a seed for a policy, from an epoch on."""

    def make(i):
      rng = np.random.default_rng((seed, role, i, epoch))
      return games.make(str(self.settings.env), rng)

    key = jax.random.fold_in(jax.random.key(seed), 1_000 + role)
    return Pool(make, count, self._act, jax.random.fold_in(key, epoch))

  def first(self, seed: int) -> tuple[bj.BilevelParams, learner_lib.State]:
    """Makes parameters and state before the policy learns."""
    settings = self.settings
    keys, policy, start = self._empty_start(seed)
    if self.method.learned_reward:
      pool = self.pool(seed, 2, settings.rollouts.environments // 2, 0)
      for i in range(rlhf_settings.count_start_epochs(settings)):
        rollout, _ = pool.collect(policy, settings.rollouts.steps)
        start = self._add(start, jax.random.fold_in(keys[2], i), rollout)
      if self._labelled is not None:
        start = start._replace(
          buffer=jax.tree.map(jnp.copy, self._labelled),
          labels=start.labels.at[0].set(self._labelled.count),
        )
      start = self._warm_up(start, keys[3])
    params = bj.BilevelParams(start.upper, policy)
    return params, self.learner.init(params, jnp.copy(keys[3]), start)

  def train(
    self, options: harness.Options, seed: int
  ) -> tuple[Any, np.ndarray, dict[str, np.ndarray]]:
    """Trains a seed, or resumes it after a kill.

    Args:
      options: of the binary.
      seed: the seed.

    Returns:
      The params, the epochs of the records, and metrics by name, (records, 1).

    Raises:
      AllStoppedError: if losses become non-finite.
      SystemExit: after a SIGTERM, with a checkpoint saved.
    """
    settings, epochs = self.settings, rlhf_settings.count_epochs(self.settings)
    with stepped.opened(
      pathlib.Path(options.workdir) / self.name / f'seed_{seed}',
      harness.run_settings(settings, 'methods', 'sizes'),
      jax.eval_shape(lambda: self._shapes(seed)),
      options.save_seconds,
    ) as session:
      epoch, scores = session.saved_step, {'lower': [], 'value': []}
      if session.restored is not None:
        params, state = session.restored.tree
        scores = session.restored.extra
      else:
        params, state = self.first(seed)
      pools = self._pools(seed, epoch) if epoch < epochs else {}
      every = -(-epochs // settings.records)
      while epoch < epochs and not session.terminated():
        params, state = self._epoch(params, state, pools, scores)
        epoch += 1
        if epoch % every == 0 or epoch == epochs:
          session.records.write(epoch, self._record(params, state, scores))
        if session.due() or epoch == epochs:
          session.save(epoch, (params, state), scores)
      session.save(epoch, (params, state), scores)
      if epoch < epochs:
        stepped.say_terminated(self.name, f'epoch {epoch}')
        termination.leave()
      return params, *session.records.history()

  def _pools(self, seed, epoch):
    """Games of each policy, by sequence."""
    names = ('lower', 'value') if self.method.second_policy else ('lower',)
    count = self.settings.rollouts.environments // len(names)
    return {n: self.pool(seed, i, count, epoch) for i, n in enumerate(names)}

  def _epoch(self, params, state, pools, scores):
    """Updates the policies; the last update is followed by a reward epoch."""
    rollouts = self.settings.rollouts
    for left in reversed(range(rollouts.updates)):
      collected = {}
      for name, pool in pools.items():
        actor = params.lower
        if name == 'value':
          actor = self.learner.second_policy(state)
        collected[name], ended = pool.collect(actor, rollouts.steps)
        scores[name] = [*scores[name], *ended][-rlhf_settings.EPISODES :]
      params, state = self._step(
        params, state, collected, reward_epoch=not left
      )
    return params, state

  def _empty_start(self, seed):
    """Makes keys, a policy, and a start without pairs."""
    keys = rlhf_compiled.split_key(jax.random.key(seed))
    shape = rlhf_settings.environment_spec(self.settings).shape
    start = self.learner.empty_start(self.parts.reward.init(keys[1]), shape)
    return keys, self.parts.agent.init(keys[0]), start

  def _shapes(self, seed):
    """The tree of a checkpoint; needs no games."""
    keys, policy, start = self._empty_start(seed)
    params = bj.BilevelParams(start.upper, policy)
    return params, self.learner.init(params, keys[3], start)

  def _record(self, params, state, scores):
    mean = lambda values: np.array([np.mean(values or np.nan)])
    losses = {
      f'loss/{n}': np.asarray(x)[None] for n, x in bj.values(state).items()
    }
    if not np.isfinite(list(losses.values())).all():
      raise harness.AllStoppedError(
        f'{self.name}: the losses became non-finite: take smaller --rates.'
      )
    measures = losses | {
      'return': mean(scores['lower']),
      'episodes': np.array([len(scores['lower'])]),
      **{f'count/{n}': np.array([x]) for n, x in bj.counts(state).items()},
    }
    if self.method.learned_reward:
      accuracy = self._accuracy(params.upper, state.held_out)
      measures['accuracy'] = np.asarray(accuracy)[None]
    if self.method.second_policy:
      measures['second_return'] = mean(scores['value'])
    return measures


def run(
  options: harness.Options, settings: Settings
) -> dict[str, comparison.Outcome]:
  """Runs all methods and seeds, one after another."""
  outcomes = {}
  for name in settings.methods:
    method = Run(settings, name)
    trained_seeds = [method.train(options, seed) for seed in options.seeds]
    params, steps, histories = zip(*trained_seeds, strict=True)
    stack = lambda *leaves: np.stack([np.asarray(x) for x in leaves])
    trained = harness.Trained(
      params=jax.tree.map(stack, *params),
      state=(),
      best=(),
      step=int(steps[0][-1]),
      steps=steps[0],
      history={
        k: np.concatenate([history[k] for history in histories], axis=1)
        for k in histories[0]
      },
      stopped=(),
      seconds=0.0,
      compile_seconds=0.0,
    )
    point, members = {'rate': settings.rates[0]}, np.arange(len(trained_seeds))
    outcomes[name] = comparison.Outcome(
      name, point, trained=trained, members=members
    )
  return outcomes
