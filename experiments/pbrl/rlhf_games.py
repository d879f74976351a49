"""RLHF where environments are stepped in Python: the games of the Atari.

The learner is that of the compiled suite; here rollouts come from games that
are stepped one after another, and seeds run one after another too. A run goes
on after a kill from its parameters, optimisers, pairs and scores; episodes that
were under way begin anew.
"""

import contextlib
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel_jax as bj
from experiments import harness
from experiments.harness import checkpoints, files, termination
from experiments.pbrl import (
  feedback,
  preferences,
  rlhf_compiled,
  rlhf_report,
  rlhf_settings,
)
from experiments.pbrl import learner as learner_lib
from experiments.rl import games


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
        before, after = self._seen[i], game.step(int(actions[i]))
        row.append(
          (
            before,
            np.int32(actions[i]),
            np.float32(after.reward),
            after.terminated,
            after.truncated,
            after.observation,
          )
        )
        self._scores[i] += after.score
        self._seen[i] = after.observation
        if after.terminated or after.truncated:
          ended.append(self._scores[i])
          self._seen[i], self._scores[i] = game.reset(), 0.0
      rows.append([np.stack(column) for column in zip(*row, strict=True)])
    columns = (np.stack(column) for column in zip(*rows, strict=True))
    return bj.rl.Rollout(*columns), ended


class Run:
  """A method, compiled once for all its seeds.

  Args:
    settings: of the run, resolved.
    name: of the method.
  """

  def __init__(self, settings: rlhf_settings.Settings, name: str):
    """Compiles nothing yet."""
    self.settings, self.name = settings, name
    self.method = feedback.METHODS[name]
    parts = rlhf_compiled.parts_of(settings, name, settings.rates[0])
    self.parts, self.learner = parts, parts.learner
    self._given = rlhf_compiled.file_buffer(settings)

    def act(at, observations, key, step):
      logits = jax.vmap(parts.agent.policy, (None, 0))(at.actor, observations)
      return jax.random.categorical(jax.random.fold_in(key, step), logits)

    self._act = jax.jit(act)
    self._add = jax.jit(self.learner.add, donate_argnums=0)
    self._warm_up = jax.jit(
      self.learner.warm_up, static_argnums=2, donate_argnums=0
    )
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
      pool = self.pool(seed, 2, settings.environments // 2, 0)
      for i in range(rlhf_settings.start_epochs_of(settings)):
        rollout, _ = pool.collect(policy, settings.rollout)
        start = self._add(start, jax.random.fold_in(keys[2], i), rollout)
      if self._given is not None:
        start = start._replace(
          buffer=jax.tree.map(jnp.copy, self._given),
          labels=jnp.copy(self._given.count),
        )
      start = self._warm_up(start, keys[3], settings.warm_up)
    params = bj.BilevelParams(start.upper, policy)
    return params, self.learner.init(params, jnp.copy(keys[3]), start)

  def train(
    self, options: harness.Options, seed: int
  ) -> tuple[Any, dict[str, np.ndarray]]:
    """Trains a seed, and resumes it if it was killed.

    Args:
      options: what the flags say.
      seed: the seed.

    Returns:
      The params, and metrics by name, (records, 1).

    Raises:
      AllStoppedError: if losses are no longer finite.
      SystemExit: after a SIGTERM, with what is learnt saved.
    """
    settings = self.settings
    with contextlib.ExitStack() as stack:
      terminated = stack.enter_context(termination.deferred())
      folder = pathlib.Path(options.workdir) / self.name / f'seed_{seed}'
      stack.enter_context(files.locked(files.make_folder(folder)))
      kept = harness.settings_of(settings, 'methods', 'sizes')
      checkpoints.check_settings(folder / 'settings.json', kept)
      saved = checkpoints.Checkpoints(folder / 'checkpoints')
      stack.callback(saved.close)
      shapes = jax.eval_shape(lambda: self._shapes(seed))
      found = saved.restore(shapes)
      epoch, scores, second = 0, [], []
      if found is not None:
        (params, state), epoch = found.tree, found.step
        scores, second = found.extra['scores'], found.extra['second']
      else:
        params, state = self.first(seed)
      records = harness.MetricsWriter(folder, step=epoch or -1)
      stack.callback(records.close)
      epochs = rlhf_settings.epochs_of(settings)
      every = -(-epochs // settings.records)
      count = settings.environments // (2 if self.method.second else 1)
      if epoch < epochs:
        pools = {'lower': self.pool(seed, 0, count, epoch)}
        if self.method.second:
          pools['value'] = self.pool(seed, 1, count, epoch)
      saved_at, saved_epoch = time.monotonic(), epoch

      def save():
        extra = {'scores': scores, 'second': second}
        saved.save(epoch, (params, state), extra)
        saved.wait()
        return time.monotonic(), epoch

      while epoch < epochs and not terminated():
        for update in range(settings.updates):
          rollouts, ended = {}, {}
          for who, pool in pools.items():
            actor = params.lower
            if who == 'value':
              actor = self.learner.second(state)
            rollouts[who], ended[who] = pool.collect(actor, settings.rollout)
          scores = [*scores, *ended['lower']][-settings.episodes :]
          second = [*second, *ended.get('value', [])][-settings.episodes :]
          params, state = self._step(
            params, state, rollouts, reward_epoch=update == settings.updates - 1
          )
        epoch += 1
        if epoch % every == 0 or epoch == epochs:
          records.write(epoch, self._record(params, state, scores, second))
        due = time.monotonic() - saved_at >= options.save_seconds
        if due or epoch == epochs:
          saved_at, saved_epoch = save()
      if epoch != saved_epoch:
        save()
      if epoch < epochs:
        print(
          f'{self.name}: terminated after epoch {epoch}; the same command goes '
          'on.',
          file=sys.stderr,
          flush=True,
        )
        termination.leave()
      return params, records.history()[1]

  def _nothing(self, seed):
    """Keys, a policy, and a start without pairs."""
    keys = rlhf_compiled.keys_of(jax.random.key(seed))
    sampling = self.parts.sampling
    if not self.method.model:  # No pairs: one in their place.
      sampling = sampling._replace(capacity=1, held=1)
    shape = rlhf_settings.played(self.settings).shape
    upper = self.parts.reward.init(keys[1])
    start = learner_lib.nothing(upper, sampling, shape)
    return keys, self.parts.agent.init(keys[0]), start

  def _shapes(self, seed):
    """What a checkpoint holds, without a game."""
    keys, policy, start = self._nothing(seed)
    params = bj.BilevelParams(start.upper, policy)
    return params, self.learner.init(params, keys[3], start)

  def _record(self, params, state, scores, second):
    mean = lambda found: np.array([np.mean(found) if found else np.nan])
    known = {
      'return': mean(scores),
      'episodes': np.array([len(scores)]),
      **{f'count/{n}': np.array([x]) for n, x in bj.counts(state).items()},
      **{f'loss/{n}': np.asarray(x)[None] for n, x in bj.values(state).items()},
    }
    losses = [v for n, v in known.items() if n.startswith('loss/')]
    if not np.isfinite(losses).all():
      raise harness.AllStoppedError(
        f'{self.name}: the losses became non-finite; the likely mend is a '
        'smaller --rates.'
      )
    if self.method.model:
      found = self._accuracy(params.upper, state.held)
      known['accuracy'] = np.asarray(found)[None]
    if self.method.second:
      known['second_return'] = mean(second)
    return known


def results(
  options: harness.Options, settings: rlhf_settings.Settings
) -> dict[str, rlhf_report.Result]:
  """Runs all methods and seeds, one after another."""
  found = {}
  each = settings.rollout * settings.environments // 2
  start = rlhf_settings.start_epochs_of(settings) * each
  for name in settings.methods:
    run = Run(settings, name)
    trained = [run.train(options, seed) for seed in options.seeds]
    method = run.method

    def series(metric, trained=trained):
      return np.concatenate([history[metric] for _, history in trained], axis=1)

    stack = lambda *leaves: np.stack([np.asarray(x) for x in leaves])
    found[name] = rlhf_report.Result(
      returns=series('return'),
      accuracy=series('accuracy') if method.model else None,
      labels=series('count/labels') * method.learns_labels,
      steps=series('count/steps/environment') + start * method.learns_labels,
      suboptimality=series('loss/suboptimality') if method.second else None,
      second=series('second_return') if method.second else None,
      actors=jax.tree.map(stack, *(p.lower.actor for p, _ in trained)),
      rate=settings.rates[0],
    )
  return found
