"""Measures the CPU time of an update of each way of training, side by side."""

import time
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.tracking import detections
from experiments.tracklet import learning, rollout_training, windows


def _timed(function: Callable[..., Any], *arguments: Any) -> float:
  """CPU seconds of all threads of this process in a call."""
  start = time.process_time()
  jax.block_until_ready(function(*arguments))
  return time.process_time() - start


def _updates(solver, batch, steps):
  """Compiles some updates of all networks."""

  def one(carry, key):
    params, state, context = carry
    drawn = batch(types.SimpleNamespace(key=key, **context))
    change, state = solver.update(drawn, state, params)
    return (optax.apply_updates(params, change), state, context), None

  def run(params, data, own, key):
    context = {'data': data, 'own': own}
    carry = (params, solver.init(params), context)
    return jax.lax.scan(one, carry, jax.random.split(key, steps))[0][0]

  return jax.jit(jax.vmap(run, in_axes=(0, None, 0, None)))


def measure(
  task: learning.Task,
  sequences: list[detections.Detected],
  weights: Any,
  search: learning.Search,
  settings: rollout_training.Rollouts,
  *,
  updates: int = 10,
  rounds: int = 3,
) -> dict[str, float]:
  """Measures the CPU seconds of an update, the least of some rounds.

  The rounds alternate between the ways, so that other work on the machine slows
  all of them. A redraw of the tracker's histories is shared by its updates.

  Args:
    task: training data.
    sequences: the detections of `task.data`, in order.
    weights: of networks, with a leading axis.
    search: settings of the search.
    settings: of the histories of the tracker.
    updates: of a measurement.
    rounds: measurements.

  Returns:
    CPU seconds of an update of all networks, by way of training.
  """
  count = len(jax.tree.leaves(weights)[0])
  split = [
    {name: np.asarray(x[i]) for name, x in weights.items()}
    for i in range(count)
  ]
  draw_all = lambda seed: rollout_training.stack(
    [
      rollout_training.draw(
        network,
        task,
        sequences,
        settings,
        progress=0.5,
        rng=np.random.default_rng([seed, i]),
      )
      for i, network in enumerate(split)
    ]
  )
  own = {'windows': draw_all(0)}
  true = lambda context: windows.batch(
    context.key, context.data, task.batch, **task.window
  )
  solver = lambda hypotheses: learning.make_solver(
    task, hypotheses, learning.Schedule(1e-4, updates)
  )
  teacher = solver(learning.Search(0))
  runs = {
    'teacher_forcing': _updates(teacher, true, updates),
    'search': _updates(solver(search), true, updates),
    'rollouts': _updates(
      teacher, rollout_training.make_batch(task, settings), updates
    ),
  }
  arguments = (
    jax.tree.map(jnp.asarray, weights),
    jax.tree.map(jnp.asarray, task.data),
    own,
    jax.random.key(0),
  )
  for run in runs.values():
    jax.block_until_ready(run(*arguments))  # Compiles.
  seconds = {name: float('inf') for name in runs}
  redraw = 0.0
  for number in range(rounds):
    for name, run in runs.items():
      seconds[name] = min(seconds[name], _timed(run, *arguments) / updates)
    redraw += _timed(draw_all, number)
  # Parts of all sequences cost differently, so redraws count by their mean.
  seconds['rollouts'] += redraw / rounds / settings.redraw
  return seconds
