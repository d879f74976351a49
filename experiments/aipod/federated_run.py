"""One federated run: which method, until when, and after how many rounds."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.aipod import client_digits, clients, fednest, tasks
from experiments.harness.study import comparison

DECAY = 0.05  # Of the squared norm of the lower variable, published.
LINEAR_RATE = 0.05  # Step size of the linear system's series.


class Method(NamedTuple):
  """A method with what the grid of step sizes does not hold."""

  lower_steps: int = 0  # S of E-AiPOD; 0 for FedNest.
  taking_part: int = 0  # Clients in an update of E-AiPOD; 0 is all.
  lower_rounds: int = 0  # T of FedNest.
  local_steps: int = 0  # tau of FedNest.
  upper_steps: int = 1  # Local ones of FedNest.

  def given(self) -> dict[str, int]:
    """What it has, by name."""
    return {name: value for name, value in self._asdict().items() if value}


def make_task(settings: Any, digits: client_digits.Digits) -> tasks.Task:
  """The task of the settings."""
  if settings.task == 'hyper_representation':
    return tasks.hyper_representation(settings.hidden, DECAY)
  labels = np.asarray(digits.train.labels).ravel()
  prior = np.bincount(labels, minlength=client_digits.CLASSES) / len(labels)
  return tasks.loss_tuning(settings.hidden, DECAY, prior)


def make_solver(
  method: Method, settings: Any, task: tasks.Task, hyper: Any
) -> optax.GradientTransformationExtraArgs:
  """The solver of a method, for all clients at once."""
  series = bj.linear_solvers.neumann(settings.products, LINEAR_RATE)

  def one_client(axis_name):
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
    agree = bj.projections.consensus_set(axis_name)
    return bj.e_aipod(
      task.problem,
      upper=bj.Sequence(optax.sgd(hyper['upper_rate']), set=agree),
      lower=bj.Sequence(
        optax.sgd(hyper['lower_rate']),
        set=bj.projections.Lazy(agree, settings.probability, key=hyper['coin']),
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
  solver = clients.over_clients(one_client, mesh)
  if method.taking_part:
    solver = clients.sampled_clients(
      solver, method.taking_part, hyper['coin'] + 1
    )
  return solver


def rounds_an_update(method: Method, settings: Any) -> float:
  """Communication rounds of one update, on average."""
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
  """Runs members until all, or in tuning the best point, reach the goal.

  Args:
    method: of the run.
    settings: of the binary.
    digits: of all clients.
    job: its hyperparameters are `upper_rate` and `lower_rate`.

  Returns:
    The run; what seeds reached before they became non-finite counts.
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
    measured = {}
    for part in ('selection', 'test'):
      images, labels = getattr(context.data, part)
      measured[f'{part}_accuracy'] = tasks.accuracy(
        task.logits(mean, images),
        labels,
        balanced=settings.task == 'loss_tuning',
      )
    counted = bj.counts(state)
    rounds = [n for k, n in counted.items() if k.startswith('rounds/')]
    return measured | {'rounds': sum(rounds)}

  def over(history):
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
        hyper=job.hyper | {'coin': np.asarray(job.seeds, np.uint32)},
      ),
      job.training(
        steps=int(np.ceil(limit / rounds_an_update(method, settings))),
        chunk=1,
        # One coin for each member: mapped at once, both its sides were
        # computed.
        at_once=1,
      ),
      harness.Measure(evaluate, stop_when=over),
    )
  except harness.AllStoppedError as error:
    # Too large a step for all seeds; what they reached before counts.
    return error.trained


def rounds_to(
  history: dict[str, np.ndarray], goal: float, part: str = 'test'
) -> np.ndarray:
  """Rounds until an accuracy is reached, by member; infinity where not."""
  # A seed that stopped has NaN from there on.
  reached = np.nan_to_num(history[f'{part}_accuracy']) >= goal
  row = np.argmax(reached, axis=0)
  rounds = history['rounds'][row, np.arange(reached.shape[1])]
  return np.where(reached.any(axis=0), rounds, np.inf)


def decided(history: dict[str, np.ndarray], goal: float, points: int) -> bool:
  """Whether no further round changes which of the points is the best.

  Args:
    history: of a tuning run.
    goal: accuracy on the selection digits.
    points: how many are tried, each with as many seeds.

  Returns:
    Whether a point has all its seeds at the goal, and each other one has them
    too or has a seed that has spent as many rounds without.
  """
  rounds = rounds_to(history, goal, 'selection').reshape(points, -1)
  spent = np.nan_to_num(history['rounds'][-1], nan=np.inf)
  least = np.where(np.isfinite(rounds), rounds, spent.reshape(points, -1))
  best = rounds.max(axis=1).min()
  open_ = ~np.isfinite(rounds).all(axis=1)
  return bool(np.isfinite(best) and np.all(least.max(axis=1)[open_] >= best))


def scores(
  history: dict[str, np.ndarray], goal: float, limit: float
) -> np.ndarray:
  """By member, what tuning prefers: few rounds to the goal on selection digits.

  Where it is not reached, the limit and what the accuracy lacks count; a tie of
  rounds goes to the more accurate.
  """
  rounds = rounds_to(history, goal, 'selection')
  best = np.nan_to_num(history['selection_accuracy']).max(axis=0)
  missed = limit * (2 - best)
  return -np.where(np.isfinite(rounds), rounds, missed) + 1e-3 * best
