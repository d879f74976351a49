"""Training of one federated method, and rounds to an accuracy."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.aipod import client_digits, clients, fednest, tasks
from experiments.harness.study import comparison

DECAY = 0.05  # Weight decay of the lower variable, published.
LINEAR_RATE = 0.05  # Step size of the Neumann series.


class Method(NamedTuple):
  """Settings of a method other than its step sizes."""

  lower_steps: int = 0  # S of E-AiPOD; 0 for FedNest.
  taking_part: int = 0  # Clients per update of E-AiPOD; 0 for all.
  lower_rounds: int = 0  # T of FedNest.
  local_steps: int = 0  # tau of FedNest.
  upper_steps: int = 1  # Local upper steps of FedNest.

  def fields(self) -> dict[str, int]:
    """Nonzero fields by name."""
    return {name: value for name, value in self._asdict().items() if value}


def make_task(settings: Any, digits: client_digits.Digits) -> tasks.Task:
  """Makes the task of the settings."""
  if settings.task == 'hyper_representation':
    return tasks.hyper_representation(settings.hidden, DECAY)
  labels = np.asarray(digits.train.labels).ravel()
  prior = np.bincount(labels, minlength=client_digits.CLASSES) / len(labels)
  return tasks.loss_tuning(settings.hidden, DECAY, prior)


def make_solver(
  method: Method, settings: Any, task: tasks.Task, hyper: Any
) -> optax.GradientTransformationExtraArgs:
  """Makes the solver of a method for all clients."""
  series = bj.linear_solvers.neumann(settings.products, LINEAR_RATE)

  def client_solver(axis_name):
    if method.lower_rounds:
      return fednest.fednest(
        task.problem,
        axis_name,
        upper_rate=hyper['upper_rate'],
        lower_rate=hyper['lower_rate'],
        loops=fednest.Loops(
          method.lower_rounds, method.local_steps, method.upper_steps
        ),
        solve=series,
        batch_at=client_digits.batch_at,
      )
    consensus = bj.projections.consensus_set(axis_name)
    return bj.e_aipod(
      task.problem,
      upper=bj.Sequence(optax.sgd(hyper['upper_rate']), set=consensus),
      lower=bj.Sequence(
        optax.sgd(hyper['lower_rate']),
        set=bj.projections.Lazy(
          consensus, settings.probability, key=hyper['projection_key']
        ),
        steps=method.lower_steps,
        batch_at=client_digits.batch_at,
      ),
      solve=series,
    )

  mesh = None
  if settings.devices > 1:
    kind = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh(
      (settings.devices,), (clients.DEVICES,), axis_types=kind
    )
  solver = clients.over_clients(client_solver, mesh)
  if method.taking_part:
    solver = clients.sampled_clients(
      solver, method.taking_part, hyper['projection_key'] + 1
    )
  return solver


def rounds_per_update(method: Method, settings: Any) -> float:
  """Expected communication rounds per update."""
  if method.lower_rounds:
    return 2 * method.lower_rounds + settings.products + 3
  lower = method.lower_steps * settings.probability
  return lower + settings.products + 2 + bool(method.taking_part)


def train(
  method: Method,
  settings: Any,
  digits: client_digits.Digits,
  job: comparison.Job,
) -> harness.Trained:
  """Trains until all members (in tuning, the best point) reach the goal.

  Args:
    method: method to run.
    settings: settings of the binary.
    digits: digits of all clients.
    job: job with the hyperparameters `upper_rate` and `lower_rate`.

  Returns:
    The run, including the history of seeds before they became non-finite.
  """
  task, goal = make_task(settings, digits), settings.goal / 100
  times = max(
    method.lower_steps,
    method.lower_rounds * method.local_steps,
    method.upper_steps,
  )

  def init(context):
    one = task.init(context.seed_key, digits.test.images.shape[-1])
    return jax.tree.map(lambda z: jnp.stack([z] * settings.digits.clients), one)

  def batch(context):
    return client_digits.draw_batch(
      context.key, context.data, settings.batch, times
    )

  def evaluate(context, params, state):
    mean = clients.mean_client(params)
    metrics = {}
    for part in ('selection', 'test'):
      images, labels = getattr(context.data, part)
      metrics[f'{part}_accuracy'] = tasks.accuracy(
        task.logits(mean, images),
        labels,
        balanced=settings.task == 'loss_tuning',
      )
    counts = bj.counts(state)
    rounds = [n for k, n in counts.items() if k.startswith('rounds/')]
    return metrics | {'rounds': sum(rounds)}

  def done(history):
    if not job.tuning:
      return bool(np.all(np.isfinite(rounds_to(history, goal))))
    points = len(job.settings['tried'])
    return decided(history, goal, points)

  limit = settings.grid.rounds if job.tuning else settings.rounds
  try:
    return harness.train(
      lambda context: make_solver(method, settings, task, context.hyper),
      harness.Task(
        init,
        batch,
        data=digits,
        hyper=job.hyper | {'projection_key': np.asarray(job.seeds, np.uint32)},
      ),
      job.training(
        steps=int(np.ceil(limit / rounds_per_update(method, settings))),
        chunk=1,
        # vmap over members would evaluate both branches of each projection.
        at_once=1,
      ),
      harness.Measure(evaluate, stop_when=done),
    )
  except harness.AllStoppedError as error:
    # All seeds diverged; keep their history until then.
    return error.trained


def rounds_to(
  history: dict[str, np.ndarray], goal: float, part: str = 'test'
) -> np.ndarray:
  """Rounds until an accuracy is reached, per member; infinity if it is not."""
  # The history of a stopped seed is NaN after its stop.
  reached = np.nan_to_num(history[f'{part}_accuracy']) >= goal
  row = np.argmax(reached, axis=0)
  rounds = history['rounds'][row, np.arange(reached.shape[1])]
  return np.where(reached.any(axis=0), rounds, np.inf)


def decided(history: dict[str, np.ndarray], goal: float, points: int) -> bool:
  """Whether further rounds cannot change the best point of a tuning run.

  Args:
    history: history of the tuning run.
    goal: accuracy on the selection digits.
    points: number of points, each with the same number of seeds.

  Returns:
    True if a point has reached the goal with all seeds, and each other point
    has too, or has a seed that spent at least as many rounds without.
  """
  rounds = rounds_to(history, goal, 'selection').reshape(points, -1)
  spent = np.nan_to_num(history['rounds'][-1], nan=np.inf)
  lower_bound = np.where(np.isfinite(rounds), rounds, spent.reshape(points, -1))
  best = rounds.max(axis=1).min()
  open_ = ~np.isfinite(rounds).all(axis=1)
  return bool(
    np.isfinite(best) and np.all(lower_bound.max(axis=1)[open_] >= best)
  )


def scores(
  history: dict[str, np.ndarray], goal: float, limit: float
) -> np.ndarray:
  """Tuning score per member: minus the rounds to the goal on selection digits.

  A member that misses the goal scores -limit (2 - best accuracy). A small term
  of the best accuracy breaks ties.
  """
  rounds = rounds_to(history, goal, 'selection')
  best = np.nan_to_num(history['selection_accuracy']).max(axis=0)
  missed = limit * (2 - best)
  return -np.where(np.isfinite(rounds), rounds, missed) + 1e-3 * best
