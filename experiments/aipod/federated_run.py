"""Training of one federated method, and rounds to an accuracy."""

import functools
from collections.abc import Callable
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
  probability: float = 0.0  # p of E-AiPOD.
  taking_part: int = 0  # Clients per update; 0 for all.
  lower_rounds: int = 0  # T of FedNest.
  local_steps: int = 0  # tau of FedNest.
  upper_steps: int = 1  # Local upper steps of FedNest.
  variant: fednest.Variant = 'fednest'
  count_redundant: bool = True  # See `fednest.fednest`.

  def fields(self) -> dict[str, float]:
    """Nonzero numbers by name, without the probability."""
    named = self._asdict()
    for name in ('probability', 'variant', 'count_redundant'):
      del named[name]
    return {name: value for name, value in named.items() if value}

  @property
  def loops(self) -> fednest.Loops:
    """Loops of FedNest."""
    return fednest.Loops(self.lower_rounds, self.local_steps, self.upper_steps)


class Federation(NamedTuple):
  """Problem and sizes, the same for all methods.

  Attributes:
    task: losses of a client.
    clients: number of clients.
    batch: training digits per client and gradient; None for all.
    products: Hessian-vector products N' of the linear system.
    linear_rate: step size of the Neumann series; None for that of the lower
      variable.
    balanced: whether accuracy is the mean of the accuracies per class.
    devices: number of devices for the clients.
  """

  task: tasks.Task
  clients: int
  batch: int | None
  products: int
  linear_rate: float | None = LINEAR_RATE
  balanced: bool = False
  devices: int = 1


def make_federation(settings: Any, digits: client_digits.Digits) -> Federation:
  """Makes the federation of the settings of `federated`."""
  tuning_loss = settings.task == 'loss_tuning'
  if tuning_loss:
    labels = np.asarray(digits.train.labels).ravel()
    prior = np.bincount(labels, minlength=client_digits.CLASSES) / len(labels)
    task = tasks.loss_tuning(settings.hidden, DECAY, prior)
  else:
    task = tasks.hyper_representation(settings.hidden, DECAY)
  return Federation(
    task,
    settings.digits.clients,
    settings.batch,
    settings.products,
    balanced=tuning_loss,
    devices=settings.devices,
  )


def make_solver(
  method: Method, federation: Federation, hyper: Any
) -> optax.GradientTransformationExtraArgs:
  """Makes the solver of a method for all clients."""
  problem = federation.task.problem
  batch_at = None if federation.batch is None else client_digits.batch_at
  rate = federation.linear_rate
  series = bj.linear_solvers.neumann(
    federation.products, hyper['lower_rate'] if rate is None else rate
  )

  def client_solver(axis_name):
    if method.lower_rounds:
      return fednest.fednest(
        problem,
        axis_name,
        upper_rate=hyper['upper_rate'],
        lower_rate=hyper['lower_rate'],
        loops=method.loops,
        solve=series,
        batch_at=batch_at,
        variant=method.variant,
        count_redundant=method.count_redundant,
      )
    consensus = bj.projections.consensus_set(axis_name)
    return bj.e_aipod(
      problem,
      upper=bj.Sequence(optax.sgd(hyper['upper_rate']), set=consensus),
      lower=bj.Sequence(
        optax.sgd(hyper['lower_rate']),
        set=bj.projections.Lazy(
          consensus, method.probability, key=hyper['projection_key']
        ),
        steps=method.lower_steps,
        batch_at=batch_at,
      ),
      solve=series,
    )

  mesh = None
  if federation.devices > 1:
    kind = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh(
      (federation.devices,), (clients.DEVICES,), axis_types=kind
    )
  solver = clients.over_clients(client_solver, mesh)
  if method.taking_part:
    solver = clients.sampled_clients(
      solver,
      method.taking_part,
      hyper['projection_key'] + 1,
      # FedNest ends with the mean.
      rounds=0 if method.lower_rounds else 1,
    )
  return solver


def rounds_per_update(method: Method, products: int) -> float:
  """Expected communication rounds per update."""
  if method.lower_rounds:
    linear = 0 if method.variant == 'lfednest' else products + 1
    counts = fednest.count_rounds(
      method.loops, method.variant, method.count_redundant
    )
    return sum(counts) + linear
  lower = method.lower_steps * method.probability
  return lower + products + 2 + bool(method.taking_part)


class Functions(NamedTuple):
  """Functions of a run; see `harness.train`."""

  solver: Callable[[Any], Any]
  init: Callable[[Any], Any]
  batch: Callable[[Any], Any]
  evaluate: Callable[..., dict[str, Any]]


@functools.cache
def make_functions(method: Method, federation: Federation) -> Functions:
  """Makes the functions of a run, once, so that runs share their program.

  `context.own` may replace parts of the digits in `context.data`.
  """
  task = federation.task
  times = max(
    method.lower_steps,
    method.lower_rounds * method.local_steps,
    method.upper_steps,
  )

  def read(context):
    return context.data._replace(**dict(context.own))

  def init(context):
    pixels = context.data.test.images.shape[-1]
    one = task.init(context.seed_key, pixels)
    return jax.tree.map(lambda z: jnp.stack([z] * federation.clients), one)

  def batch(context):
    digits = read(context)
    if federation.batch is None:
      return client_digits.Batch(digits.train, digits.validation)
    return client_digits.draw_batch(
      context.key, digits, federation.batch, times
    )

  def evaluate(context, params, state):
    mean = clients.mean_client(params)
    metrics = {}
    for part in ('selection', 'test'):
      images, labels = getattr(context.data, part)
      metrics[f'{part}_accuracy'] = tasks.accuracy(
        task.logits(mean, images), labels, balanced=federation.balanced
      )
    counts = bj.counts(state)
    rounds = [n for k, n in counts.items() if k.startswith('rounds/')]
    return metrics | {'rounds': sum(rounds)}

  solver = lambda context: make_solver(method, federation, context.hyper)
  return Functions(solver, init, batch, evaluate)


def train(
  method: Method,
  federation: Federation,
  digits: client_digits.Digits,
  job: comparison.Job,
  *,
  rounds: int,
  stop_when: Callable[[dict[str, np.ndarray]], bool] | None = None,
  own: Any = (),
  at_once: int | None = 1,
  chunk: int = 1,
) -> harness.Trained:
  """Trains all members of a job.

  Args:
    method: method to run.
    federation: problem and sizes.
    digits: digits of all clients.
    job: job with the hyperparameters `upper_rate` and `lower_rate`.
    rounds: maximum number of expected rounds.
    stop_when: from the history to whether the run ends.
    own: parts of the digits by name, with a leading axis of members.
    at_once: members that are mapped by `vmap`, which evaluates both branches of
      each projection; None for all.
    chunk: updates between two records.

  Returns:
    The run, including the history of seeds before they became non-finite.
  """
  functions = make_functions(method, federation)
  updates = rounds / rounds_per_update(method, federation.products)
  try:
    return harness.train(
      functions.solver,
      harness.Task(
        functions.init,
        functions.batch,
        data=digits,
        own=own,
        hyper=job.hyper | {'projection_key': np.asarray(job.seeds, np.uint32)},
      ),
      job.training(steps=int(np.ceil(updates)), chunk=chunk, at_once=at_once),
      harness.Measure(functions.evaluate, stop_when=stop_when),
    )
  except harness.AllStoppedError as error:
    # All seeds diverged; keep their history until then.
    return error.trained


def rounds_to(
  history: dict[str, np.ndarray], goal: Any, part: str = 'test'
) -> np.ndarray:
  """Rounds until an accuracy is reached, per member; infinity if it is not.

  Args:
    history: history of a run.
    goal: accuracy to reach, one number or one per member.
    part: the digits of the accuracy, `test` or `selection`.

  Returns:
    Rounds, (members,).
  """
  # The history of a stopped seed is NaN after its stop.
  reached = np.nan_to_num(history[f'{part}_accuracy']) >= goal
  row = np.argmax(reached, axis=0)
  rounds = history['rounds'][row, np.arange(reached.shape[1])]
  return np.where(reached.any(axis=0), rounds, np.inf)


def decided(history: dict[str, np.ndarray], goal: Any, points: int) -> bool:
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
  history: dict[str, np.ndarray], goal: Any, limit: float
) -> np.ndarray:
  """Tuning score per member: minus the rounds to the goal on selection digits.

  A member that misses the goal scores -limit (2 - best accuracy). A small term
  of the best accuracy breaks ties.
  """
  rounds = rounds_to(history, goal, 'selection')
  best = np.nan_to_num(history['selection_accuracy']).max(axis=0)
  missed = limit * (2 - best)
  return -np.where(np.isfinite(rounds), rounds, missed) + 1e-3 * best
