"""Heterogeneous digits of clients, and batches of them."""

import dataclasses
from typing import Annotated, Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness, vision

CLASSES = 10
# Fewest digits of a client.
_FEWEST = 5
# Of MNIST's pixels in [0, 1].
MEAN, DEVIATION = 0.1307, 0.3081


class Digits(NamedTuple):
  """All data of a federated run; images are float32 (n, pixels), standardised.

  Attributes:
    train: digits of the lower losses, with a leading axis of clients.
    validation: digits of the upper losses, with a leading axis of clients.
    selection: digits for the choice of step sizes, of no client.
    test: digits of the reported accuracy.
  """

  train: vision.DigitPart
  validation: vision.DigitPart
  selection: vision.DigitPart
  test: vision.DigitPart


def pool(images: np.ndarray, by: int) -> np.ndarray:
  """Average-pools and flattens standardised images, preserving the norm."""
  side = images.shape[1] // by
  tiles = images.reshape(-1, side, by, side, by).astype(np.float32)
  flat = tiles.mean(axis=(2, 4)).reshape(len(images), -1) / 255
  return by * (flat - MEAN) / DEVIATION


def imbalance(labels: np.ndarray, ratio: float) -> np.ndarray:
  """Selects rows so that class c keeps ratio^(-c / 9) of its digits."""
  selected = []
  for c in range(CLASSES):
    rows = np.flatnonzero(labels == c)
    selected.append(rows[: round(len(rows) * ratio ** (-c / (CLASSES - 1)))])
  return np.sort(np.concatenate(selected))


def split_by_label(
  labels: np.ndarray, clients: int, shards: int, rng: np.random.Generator
) -> np.ndarray:
  """Assigns shards of the digits, sorted by label, to clients.

  Args:
    labels: (n,).
    clients: number of clients.
    shards: shards per client; with 2, a client has about two classes.
    rng: random generator of the assignment.

  Returns:
    Rows, (clients, n // clients); a remainder is dropped.
  """
  order = np.argsort(labels, kind='stable')
  size = len(labels) // (clients * shards)
  pieces = order[: clients * shards * size].reshape(-1, size)
  return rng.permutation(pieces).reshape(clients, -1)


@dataclasses.dataclass(frozen=True)
class Split:
  """Split of the digits among clients.

  Attributes:
    clients: number of clients; 50 in the paper.
    shards: label-sorted shards per client; 2 in the paper.
    pooling: side of the average-pooling window; 1 in the paper.
    ratio: imbalance ratio, largest to smallest class; 10 in the paper's loss
      tuning.
    selection: digits for the choice of step sizes.
    test: test digits; with a data folder, its whole test file is used.
  """

  clients: int = 50
  shards: int = 2
  pooling: int = 2
  ratio: Annotated[float, harness.Allowed(1)] = 1.0
  selection: int = 1_000
  test: int = 1_500


def load_digits(
  data_dir: str | None, split: Split
) -> tuple[Digits, harness.Source]:
  """Loads digits and splits them among clients.

  Args:
    data_dir: a folder with MNIST or a data set in its format; None for the
      packaged digits.
    split: sizes and heterogeneity of the split.

  Returns:
    The digits, and their source.

  Raises:
    SettingsError: if there are too few digits.
    MissingDataError: if `data_dir` has no such files.
  """
  rng = np.random.default_rng(0)
  sizes = {'test': split.test, 'selection': split.selection, 'clients': None}
  parts, source = vision.load_digits(data_dir, sizes, seed=rng, own_test=True)
  images, labels = parts['clients']
  used = imbalance(labels, split.ratio)
  size = len(used) // (split.clients * split.shards) * split.shards
  if size < _FEWEST:
    raise harness.SettingsError(
      f'{len(used):,} digits are too few for {split.clients:,} clients of '
      f'{split.shards:,} shards: take fewer clients or shards, or more digits '
      'with --data_dir.'
    )
  rows = used[split_by_label(labels[used], split.clients, split.shards, rng)]
  # Shuffles, so that training and validation digits share their classes.
  rows = rng.permuted(rows, axis=1)
  cut = round(0.8 * rows.shape[1])
  part = lambda images, labels: vision.DigitPart(
    jnp.asarray(pool(images, split.pooling)), jnp.asarray(labels)
  )

  def per_client(rows):
    flat = part(images[rows.ravel()], labels[rows.ravel()])
    return jax.tree.map(lambda z: z.reshape(*rows.shape, *z.shape[1:]), flat)

  digits = Digits(
    per_client(rows[:, :cut]),
    per_client(rows[:, cut:]),
    part(*parts['selection']),
    part(*parts['test']),
  )
  return digits, source


class Batch(NamedTuple):
  """Batch of one client in one update.

  Attributes:
    train: training digits of the client.
    validation: validation digits of the client.
    rows: rows of the training digits per evaluation, (times, size); None for
      full batches.
    now: rows of the current evaluation; None for full batches.
  """

  train: vision.DigitPart
  validation: vision.DigitPart
  rows: Any = None
  now: Any = None


def draw_batch(key: chex.PRNGKey, digits: Digits, size: int, times: int):
  """Draws batches of all clients, or full ones if `size` is not smaller."""
  clients, count = digits.train.labels.shape
  if size >= count:
    return Batch(digits.train, digits.validation)
  rows = jax.random.randint(key, (clients, times + 1, size), 0, count)
  return Batch(digits.train, digits.validation, rows, rows[:, 0])


def batch_at(batch: Batch, t: Any) -> Batch:
  """Selects the rows of evaluation t."""
  if batch.rows is None:
    return batch
  return batch._replace(now=batch.rows[1 + t])


def train_part(batch: Batch) -> vision.DigitPart:
  """The training digits of the current evaluation."""
  if batch.now is None:
    return batch.train
  return jax.tree.map(lambda z: z[batch.now], batch.train)
