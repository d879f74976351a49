"""Asynchronous workers: threads with stale copies, and one writer.

A worker copies the newest parameters, plays some steps and computes a gradient
at its copy, in compiled functions that release the GIL. It sends the gradient
to the writer and waits until it is applied. The delay is the number of updates
by other workers in between; it is measured from version numbers, not set.
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
  """A worker thread failed."""


class Published(NamedTuple):
  """Parameters for workers to copy.

  Attributes:
    params: newest parameters.
    version: number of updates before them.
  """

  params: Any
  version: int


class Contribution(NamedTuple):
  """Gradient that a worker sends to the writer.

  Attributes:
    worker: index of the worker.
    version: version of the parameters of the gradient.
    gradient: gradient for one update.
    losses: losses by name.
    steps: number of game steps.
    scores: scores of the games that ended.
    applied: event that the writer sets after the update.
  """

  worker: int
  version: int
  gradient: Any
  losses: Any
  steps: int
  scores: list[float]
  applied: threading.Event


class Failure(NamedTuple):
  """Error of a worker that failed."""

  worker: int
  error: BaseException


class Functions(NamedTuple):
  """Compiled functions, shared by all workers.

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
    value, after = oracle.update(rollout, state, params)
    return value, bj.values(after)

  return Functions(jax.jit(act), jax.jit(gradient))


class Workers:
  """Context manager of threads that play and send gradients.

  Args:
    count: number of workers.
    make_game: makes the game of a worker from its index, in its thread.
    compiled: compiled functions.
    published: initial parameters.
    rollout: steps per gradient.
    key: PRNG key of the actions.
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
    """Creates the threads; `__enter__` starts them."""
    self.published = published
    self._make_game, self._compiled = make_game, compiled
    self._rollout, self._key = rollout, key
    self._sent: queue.Queue[Contribution | Failure] = queue.Queue()
    self._stop = threading.Event()
    self._threads = [
      threading.Thread(target=self._work, args=(i,), name=f'worker {i}')
      for i in range(count)
    ]

  def __enter__(self) -> 'Workers':
    for thread in self._threads:
      thread.daemon = True  # A hanging game must not block process exit.
      thread.start()
    return self

  def __exit__(self, *_: Any) -> None:
    self._stop.set()
    for thread in self._threads:
      thread.join(timeout=10.0)

  def next(self) -> Contribution:
    """Waits for the next gradient.

    Raises:
      WorkerError: if a worker failed; names the worker and its error.
    """
    while True:
      try:
        sent = self._sent.get(timeout=1.0)
      except queue.Empty:
        dead = [t.name for t in self._threads if not t.is_alive()]
        if dead:
          raise WorkerError(
            f'{", ".join(dead)} ended without an error'
          ) from None
        continue
      if isinstance(sent, Failure):
        error = sent.error
        message = (str(error).splitlines() or [''])[0]
        raise WorkerError(
          f'worker {sent.worker} failed: {type(error).__name__}: {message}'
        ) from error
      return sent

  def _work(self, index: int) -> None:
    try:
      self._play(index)
    except BaseException as error:
      self._sent.put(Failure(index, error))

  def _play(self, index: int) -> None:
    game = self._make_game(index)
    act, gradient = self._compiled
    key = jax.random.fold_in(self._key, index)
    observation, score, steps = game.reset(), 0.0, 0
    while not self._stop.is_set():
      params, version = self.published
      transitions, scores = [], []
      for _ in range(self._rollout):
        action = int(act(params.actor, observation, key, np.int32(steps)))
        after = game.step(action)
        steps += 1
        score += after.score
        transitions.append([games.transition(observation, action, after)])
        observation = after.observation
        if after.game_over:
          scores.append(score)
          score = 0.0
        if after.terminated or after.truncated:
          observation = game.reset()
      slope, losses = gradient(params, games.as_rollout(transitions))
      jax.block_until_ready(slope)
      applied = threading.Event()
      self._sent.put(
        Contribution(
          index, version, slope, losses, self._rollout, scores, applied
        )
      )
      while not applied.wait(timeout=0.5) and not self._stop.is_set():
        pass


class Progress(NamedTuple):
  """Counters of the writer, as plain values.

  Attributes:
    steps: game steps so far.
    seconds: training time so far.
    delays: number of gradients by delay.
    scores: scores of the last games.
    episodes: number of games so far.
  """

  steps: int = 0
  seconds: float = 0.0
  delays: Mapping[str, int] = types.MappingProxyType({})
  scores: tuple[float, ...] = ()
  episodes: int = 0

  def after(
    self, sent: Contribution, version: int, seconds: float, keep: int = 100
  ) -> 'Progress':
    """Counters after one more gradient, applied at this version."""
    delay = str(version - sent.version)
    return Progress(
      self.steps + sent.steps,
      self.seconds + seconds,
      {**self.delays, delay: self.delays.get(delay, 0) + 1},
      (*self.scores, *sent.scores)[-keep:],
      self.episodes + len(sent.scores),
    )


def throughput(make_workers: Callable[[], Workers], gradients: int) -> float:
  """Measures game steps per second, without applying gradients.

  Args:
    make_workers: makes new workers.
    gradients: number of gradients to time, after a first one.

  Returns:
    Steps per second.
  """
  with make_workers() as pool:
    pool.next().applied.set()
    start, steps = time.perf_counter(), 0
    for _ in range(gradients):
      sent = pool.next()
      sent.applied.set()
      steps += sent.steps
    return steps / (time.perf_counter() - start)


def make_apply(move: Any) -> Callable[..., Any]:
  """Compiles (params, state, gradient) -> (params, state) from a `mover`."""

  def apply(params, state, gradient):
    updates, state = move.update({'gradient': gradient}, state, params)
    return bj.apply_updates(params, updates), state

  # Without donation, because workers read the parameters.
  return jax.jit(apply)
