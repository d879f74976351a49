"""RLHF where environments are stepped in Python: the games of the Atari.

The learner is that of the compiled suite; here rollouts come from games that
are stepped one after another, and seeds run one after another too. A run goes
on after a kill from its parameters, optimisers, pairs and scores; episodes that
were under way begin anew.
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
  """Games side by side, whose episodes go on from rollout to rollout.

  Args:
    make: from an index to a game.
    count: of games.
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
    self._seen = [game.reset() for game in self._games]
    self._scores = [0.0] * count

  def collect(
    self, actor: Any, steps: int
  ) -> tuple[bj.rl.Rollout, list[float]]:
    """A rollout (steps, games) with true rewards, and scores of what ended."""
    rows, ended = [], []
    for _ in range(steps):
      actions = np.asarray(
        self._act(actor, np.stack(self._seen), self._key, np.int32(self._step))
      )
      self._step += 1
      row = []
      for i, game in enumerate(self._games):
        after = game.step(int(actions[i]))
        row.append(games.transition(self._seen[i], actions[i], after))
        self._scores[i] += after.score
        self._seen[i] = after.observation
        if after.terminated or after.truncated:
          ended.append(self._scores[i])
          self._seen[i], self._scores[i] = game.reset(), 0.0
      rows.append(row)
    return games.as_rollout(rows), ended


class Run:
  """A method, compiled once for all its seeds.

  Args:
    settings: of the run, resolved.
    name: of the method.
  """

  def __init__(self, settings: Settings, name: str):
    """Compiles nothing yet."""
    self.settings, self.name = settings, name
    self.method = rlhf_settings.METHODS[name]
    parts = rlhf_compiled.parts_of(settings, name, settings.rates[0])
    self.parts, self.learner = parts, parts.learner
    self._given = rlhf_compiled.file_buffer(settings)

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
      lambda upper, held: preferences.accuracy(parts.reward.apply, upper, held)
    )

  def pool(self, seed: int, of: int, count: int, since: int) -> Pool:
    """Games of a seed; other ones for each part of a run, and each policy."""

    def make(i):
      rng = np.random.default_rng((seed, of, i, since))
      return games.make(str(self.settings.env), rng)

    key = jax.random.fold_in(jax.random.key(seed), 1_000 + of)
    return Pool(make, count, self._act, jax.random.fold_in(key, since))

  def first(self, seed: int) -> tuple[bj.BilevelParams, learner_lib.State]:
    """Parameters and state before the policy learns."""
    settings = self.settings
    keys, policy, start = self._nothing(seed)
    if self.method.model:
      pool = self.pool(seed, 2, settings.rollouts.environments // 2, 0)
      for i in range(rlhf_settings.start_epochs_of(settings)):
        rollout, _ = pool.collect(policy, settings.rollouts.steps)
        start = self._add(start, jax.random.fold_in(keys[2], i), rollout)
      if self._given is not None:
        start = start._replace(
          buffer=jax.tree.map(jnp.copy, self._given),
          labels=jnp.copy(self._given.count),
        )
      start = self._warm_up(start, keys[3])
    params = bj.BilevelParams(start.upper, policy)
    return params, self.learner.init(params, jnp.copy(keys[3]), start)

  def train(
    self, options: harness.Options, seed: int
  ) -> tuple[Any, np.ndarray, dict[str, np.ndarray]]:
    """Trains a seed, and resumes it if it was killed.

    Args:
      options: what the flags say.
      seed: the seed.

    Returns:
      The params, the epochs of the records, and metrics by name, (records, 1).

    Raises:
      AllStoppedError: if losses are no longer finite.
      SystemExit: after a SIGTERM, with what is learnt saved.
    """
    settings, epochs = self.settings, rlhf_settings.epochs_of(self.settings)
    with stepped.opened(
      pathlib.Path(options.workdir) / self.name / f'seed_{seed}',
      harness.settings_of(settings, 'methods', 'sizes'),
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
    """Games of the policy, and of the second one."""
    who = ('lower', 'value') if self.method.second else ('lower',)
    count = self.settings.rollouts.environments // len(who)
    return {w: self.pool(seed, i, count, epoch) for i, w in enumerate(who)}

  def _epoch(self, params, state, pools, scores):
    """Updates of the policies, the last with a reward epoch behind it."""
    rollouts = self.settings.rollouts
    for left in reversed(range(rollouts.updates)):
      collected = {}
      for who, pool in pools.items():
        actor = params.lower if who == 'lower' else self.learner.second(state)
        collected[who], ended = pool.collect(actor, rollouts.steps)
        scores[who] = [*scores[who], *ended][-rlhf_settings.EPISODES :]
      params, state = self._step(
        params, state, collected, reward_epoch=not left
      )
    return params, state

  def _nothing(self, seed):
    """Keys, a policy, and a start without pairs."""
    keys = rlhf_compiled.keys_of(jax.random.key(seed))
    shape = rlhf_settings.played(self.settings).shape
    start = self.learner.nothing(self.parts.reward.init(keys[1]), shape)
    return keys, self.parts.agent.init(keys[0]), start

  def _shapes(self, seed):
    """What a checkpoint holds, without a game."""
    keys, policy, start = self._nothing(seed)
    params = bj.BilevelParams(start.upper, policy)
    return params, self.learner.init(params, keys[3], start)

  def _record(self, params, state, scores):
    mean = lambda of: np.array([np.mean(of or np.nan)])
    losses = {
      f'loss/{n}': np.asarray(x)[None] for n, x in bj.values(state).items()
    }
    if not np.isfinite(list(losses.values())).all():
      raise harness.AllStoppedError(
        f'{self.name}: the losses became non-finite; the likely mend is a '
        'smaller --rates.'
      )
    known = losses | {
      'return': mean(scores['lower']),
      'episodes': np.array([len(scores['lower'])]),
      **{f'count/{n}': np.array([x]) for n, x in bj.counts(state).items()},
    }
    if self.method.model:
      found = self._accuracy(params.upper, state.held)
      known['accuracy'] = np.asarray(found)[None]
    if self.method.second:
      known['second_return'] = mean(scores['value'])
    return known


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
