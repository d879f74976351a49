"""Really asynchronous workers: threads with stale copies, and one writer.

A worker copies the newest parameters, plays some steps and computes a gradient
at its copy, all in compiled functions that leave Python's lock. It hands the
gradient to the writer, waits until that has applied it, and begins anew. The
others have updated meanwhile: the delay is what the writer's version was ahead
of the copy's, and nobody decides it.
"""

import queue
import threading
import time
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

import bilevel_jax as bj
from experiments import harness
from experiments.rl import games


class WorkerError(harness.UserError, RuntimeError):
  """A worker thread died."""


class Published(NamedTuple):
  """What workers copy.

  Attributes:
    params: the newest.
    version: updates before them.
  """

  params: Any
  version: int


class Contribution(NamedTuple):
  """What a worker hands over.

  Attributes:
    worker: its index.
    version: of the parameters of the gradient.
    gradient: for one update.
    losses: by name.
    steps: of the game.
    scores: of the games that ended.
    applied: is set when the update is made.
  """

  worker: int
  version: int
  gradient: Any
  losses: Any
  steps: int
  scores: list[float]
  applied: threading.Event


class Died(NamedTuple):
  """What a worker hands over that has failed."""

  worker: int
  error: BaseException


class Functions(NamedTuple):
  """What is compiled, once for all workers.

  Attributes:
    act: (actor, observation, key, step) -> action.
    gradient: (params, rollout) -> (gradient, losses).
  """

  act: Callable[..., Any]
  gradient: Callable[..., Any]


def functions(agent: Any, oracle: Any, params: Any) -> Functions:
  """Compiles a policy and an oracle whose batch is a rollout."""
  state = oracle.init(params)

  def act(actor, observation, key, step):
    logits = agent.policy(actor, observation)
    return jax.random.categorical(jax.random.fold_in(key, step), logits)

  def gradient(params, rollout):
    found, after = oracle.update(rollout, state, params)
    return found, bj.values(after)

  return Functions(jax.jit(act), jax.jit(gradient))


class Workers:
  """Threads that play and hand over gradients, while this is entered.

  Args:
    count: of workers.
    make_game: from a worker's index to its game; called in its thread.
    compiled: what they run.
    published: what they copy at first.
    rollout: steps for a gradient.
    key: of their actions.
  """

  def __init__(
    self,
    count: int,
    make_game: Callable[[int], Any],
    compiled: Functions,
    published: Published,
    *,
    rollout: int,
    key: Any,
  ):
    """Makes the threads; `__enter__` starts them."""
    self.published = published
    self._make_game, self._compiled = make_game, compiled
    self._rollout, self._key = rollout, key
    self._handed: queue.Queue[Contribution | Died] = queue.Queue()
    self._stop = threading.Event()
    self._threads = [
      threading.Thread(target=self._work, args=(i,), name=f'worker {i}')
      for i in range(count)
    ]

  def __enter__(self) -> 'Workers':
    for thread in self._threads:
      thread.daemon = True  # One that hangs in a game cannot keep the process.
      thread.start()
    return self

  def __exit__(self, *_: Any) -> None:
    self._stop.set()
    for thread in self._threads:
      thread.join(timeout=10.0)

  def next(self) -> Contribution:
    """Waits for the next gradient.

    Raises:
      WorkerError: if a worker has died; says which, and why.
    """
    while True:
      try:
        found = self._handed.get(timeout=1.0)
      except queue.Empty:
        dead = [t.name for t in self._threads if not t.is_alive()]
        if dead:
          raise WorkerError(f'{", ".join(dead)} ended without a word') from None
        continue
      if isinstance(found, Died):
        error = found.error
        said = (str(error).splitlines() or [''])[0]
        raise WorkerError(
          f'worker {found.worker} died: {type(error).__name__}: {said}'
        ) from error
      return found

  def _work(self, index: int) -> None:
    try:
      self._play(index)
    except BaseException as error:
      self._handed.put(Died(index, error))

  def _play(self, index: int) -> None:
    game = self._make_game(index)
    act, gradient = self._compiled
    key = jax.random.fold_in(self._key, index)
    observation, score, steps = game.reset(), 0.0, 0
    while not self._stop.is_set():
      params, version = self.published
      made, scores = [], []
      for _ in range(self._rollout):
        action = int(act(params.actor, observation, key, np.int32(steps)))
        after = game.step(action)
        steps += 1
        score += after.score
        made.append([games.transition(observation, action, after)])
        observation = after.observation
        if after.game_over:
          scores.append(score)
          score = 0.0
        if after.terminated or after.truncated:
          observation = game.reset()
      slope, losses = gradient(params, games.as_rollout(made))
      jax.block_until_ready(slope)
      applied = threading.Event()
      self._handed.put(
        Contribution(
          index, version, slope, losses, self._rollout, scores, applied
        )
      )
      while not applied.wait(timeout=0.5) and not self._stop.is_set():
        pass


class Progress(NamedTuple):
  """What the writer knows beside the parameters; plain values.

  Attributes:
    steps: of games so far.
    seconds: at work.
    delays: how many gradients were so many updates old, by the number.
    scores: of the last games.
    episodes: games so far.
  """

  steps: int = 0
  seconds: float = 0.0
  delays: Mapping[str, int] = types.MappingProxyType({})
  scores: tuple[float, ...] = ()
  episodes: int = 0

  def after(
    self, found: Contribution, version: int, seconds: float, keep: int = 100
  ) -> 'Progress':
    """With one more gradient, applied to this version."""
    delay = str(version - found.version)
    return Progress(
      self.steps + found.steps,
      self.seconds + seconds,
      {**self.delays, delay: self.delays.get(delay, 0) + 1},
      (*self.scores, *found.scores)[-keep:],
      self.episodes + len(found.scores),
    )


def throughput(make_workers: Callable[[], Workers], gradients: int) -> float:
  """Steps a second where no gradient changes anything; for a comparison.

  Args:
    make_workers: new ones.
    gradients: to wait for, after the first of each worker.

  Returns:
    Steps a second.
  """
  with make_workers() as pool:
    pool.next().applied.set()
    start, steps = time.perf_counter(), 0
    for _ in range(gradients):
      found = pool.next()
      found.applied.set()
      steps += found.steps
    return steps / (time.perf_counter() - start)


def apply_of(move: Any) -> Callable[..., Any]:
  """Compiles (params, state, gradient) -> (params, state), of a `mover`."""

  def apply(params, state, gradient):
    updates, state = move.update({'gradient': gradient}, state, params)
    return bj.apply_updates(params, updates), state

  # No donation: workers hold the parameters.
  return jax.jit(apply)
