"""Federated loss tuning of a linear classifier, drawn again for each seed.

The lower loss is strongly convex, as the analysis assumes. For one seed, all
heterogeneities have the same digits and so the same problem; only the
assignment to clients differs.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness, vision
from experiments.aipod import client_digits, federated_run, tasks
from experiments.harness.study import comparison

# Of five digits that follow one another by label, three are training digits.
BLOCK, TRAIN = 5, 3
# Of the references: lower steps per update, and step sizes.
_STEPS, _RATES = 20, {'upper_rate': 1.0, 'lower_rate': 0.016}


class Pool(NamedTuple):
  """Digits from which the clients of each seed draw.

  Attributes:
    clients: digits for clients, as NumPy arrays.
    shared: selection and test digits; the other fields are empty.
  """

  clients: vision.DigitPart
  shared: client_digits.Digits


def load_pool(data_dir: str | None, settings: Any) -> tuple[Pool, Any]:
  """Loads the digits of all seeds.

  Args:
    data_dir: a folder with MNIST or a data set in its format; None for the
      packaged digits.
    settings: settings of `regimes`.

  Returns:
    The pool and its source.
  """
  sizes = {'test': settings.test, 'selection': settings.selection}
  parts, source = vision.load_digits(
    data_dir, sizes | {'clients': None}, own_test=True
  )
  part = lambda name, size: vision.DigitPart(
    jnp.asarray(
      client_digits.pool(parts[name].images[:size], settings.pooling)
    ),
    jnp.asarray(parts[name].labels[:size]),
  )
  shared = client_digits.Digits(
    (), (), part('selection', None), part('test', settings.test)
  )
  return Pool(parts['clients'], shared), source


def draw_clients(
  pool: Pool, settings: Any, shards: int, seed: int
) -> dict[str, vision.DigitPart]:
  """Draws the digits of all clients of one seed.

  Args:
    pool: digits to draw from.
    settings: settings of `regimes`.
    shards: label-sorted shards per client; 0 for clients that draw from the
      same distribution.
    seed: seed of the draw; the digits do not depend on the shards.

  Returns:
    Training and validation digits, with a leading axis of clients.

  Raises:
    SettingsError: if there are too few digits.
  """
  rng = np.random.default_rng(seed)
  images, labels = pool.clients
  rows = rng.permutation(len(labels))
  rows = rows[client_digits.imbalance(labels[rows], settings.ratio)]
  count, clients = settings.digits_per_client, settings.clients
  if count * clients > len(rows):
    raise harness.SettingsError(
      f'{len(rows):,} imbalanced digits are too few for {clients} clients with '
      f'{count} each: take fewer, or more digits with --data_dir.'
    )
  rows = rng.permutation(rows)[: count * clients]
  # Training and validation digits of a client have the same classes.
  rows = rows[np.argsort(labels[rows], kind='stable')].reshape(-1, BLOCK)
  rows = rng.permuted(rows, axis=1)
  order = rng.permutation(clients * shards)
  split = {}
  for name, part in (
    ('train', rows[:, :TRAIN]),
    ('validation', rows[:, TRAIN:]),
  ):
    if shards:
      part = part.reshape(clients * shards, -1)[order]
    else:
      part = rng.permutation(part.ravel())
    part = part.reshape(clients, -1)
    flat = client_digits.pool(images[part.ravel()], settings.pooling)
    split[name] = vision.DigitPart(
      flat.reshape(*part.shape, -1), labels[part].astype(np.int32)
    )
  return split


def make_federation(settings: Any) -> federated_run.Federation:
  """Makes the federation, with the designed frequencies of the classes."""
  classes = np.arange(client_digits.CLASSES)
  prior = settings.ratio ** (-classes / (client_digits.CLASSES - 1))
  return federated_run.Federation(
    tasks.loss_tuning(0, settings.decay, prior / prior.sum()),
    settings.clients,
    None,
    settings.products,
    linear_rate=None,
    balanced=True,
  )


class References(NamedTuple):
  """Accuracies of centralised training by seed.

  Attributes:
    control: highest one without upper steps, by part of the digits and seed.
    best: highest one with upper steps.
  """

  control: dict[str, dict[int, float]]
  best: dict[str, dict[int, float]]

  def goal(self, part: str, share: float, seeds: Any) -> np.ndarray:
    """Returns goals at a share of the way from the control to the best."""
    control, best = (
      np.array([table[part][s] for s in seeds]) for table in self
    )
    return control + share * (best - control)


def train_references(
  pool: Pool,
  options: harness.Options,
  federation: federated_run.Federation,
  seeds: tuple[int, ...],
) -> References:
  """Trains on the digits of all clients at one place.

  Args:
    pool: digits to draw from.
    options: options of the run, with settings of `regimes`.
    federation: problem and sizes.
    seeds: all seeds.

  Returns:
    The accuracies.
  """
  settings = options.settings
  draws = [draw_clients(pool, settings, 0, s) for s in seeds * 2]
  own = jax.tree.map(lambda *z: jnp.stack(z), *draws)
  # One client with all digits.
  own = jax.tree.map(lambda z: z.reshape(len(z), 1, -1, *z.shape[3:]), own)
  hyper = {
    'upper_rate': np.repeat([0.0, _RATES['upper_rate']], len(seeds)),
    'lower_rate': np.full(2 * len(seeds), _RATES['lower_rate']),
  }
  hyper = {name: np.asarray(x, np.float32) for name, x in hyper.items()}
  identity = harness.run_settings(settings, 'seeds')
  job = comparison.Job(
    'references', False, hyper, seeds * 2, 'references', identity, options
  )
  method = federated_run.Method(lower_steps=_STEPS, probability=1.0)
  one = federation._replace(clients=1)
  cost = federated_run.rounds_per_update(method, settings.products)
  trained = federated_run.train(
    method,
    one,
    pool.shared,
    job,
    rounds=int(cost * settings.reference_updates),
    own=own,
    at_once=None,
    chunk=10,
  )
  control, best = {}, {}
  for part in ('selection', 'test'):
    values = trained.history[f'{part}_accuracy']
    values = values.reshape(len(values), 2, len(seeds))
    control[part] = dict(zip(seeds, values[:, 0].max(axis=0), strict=True))
    best[part] = dict(zip(seeds, values[:, 1].max(axis=0), strict=True))
  return References(control, best)
