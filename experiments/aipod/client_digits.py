"""Digits of clients, not alike among them, and batches of them."""

import dataclasses
from typing import Annotated, Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness, vision

CLASSES = 10
# Of the pixels of MNIST, in [0, 1].
MEAN, DEVIATION = 0.1307, 0.3081


class Digits(NamedTuple):
  """All data of a federated run; images are float32 (n, pixels), standardised.

  Attributes:
    train: of the lower losses, with a leading axis of clients.
    validation: of the upper losses, likewise.
    selection: chooses step sizes; no client has it.
    test: of the reported accuracy.
  """

  train: vision.DigitPart
  validation: vision.DigitPart
  selection: vision.DigitPart
  test: vision.DigitPart


def pool(images: np.ndarray, by: int) -> np.ndarray:
  """Standardised images, flat: means over squares, scaled to keep the norm."""
  side = images.shape[1] // by
  tiles = images.reshape(-1, side, by, side, by).astype(np.float32)
  flat = tiles.mean(axis=(2, 4)).reshape(len(images), -1) / 255
  return by * (flat - MEAN) / DEVIATION


def imbalance(labels: np.ndarray, ratio: float) -> np.ndarray:
  """Rows to keep so that class c has ratio^(-c / 9) of its digits."""
  kept = []
  for c in range(CLASSES):
    rows = np.flatnonzero(labels == c)
    kept.append(rows[: round(len(rows) * ratio ** (-c / (CLASSES - 1)))])
  return np.sort(np.concatenate(kept))


def split_by_label(
  labels: np.ndarray, clients: int, shards: int, rng: np.random.Generator
) -> np.ndarray:
  """Gives each client some shards of the digits sorted by label.

  Args:
    labels: (n,).
    clients: how many.
    shards: for each client: 2 leaves it about two classes.
    rng: draws which.

  Returns:
    Rows, (clients, n / clients), what does not divide left out.
  """
  order = np.argsort(labels, kind='stable')
  size = len(labels) // (clients * shards)
  pieces = order[: clients * shards * size].reshape(-1, size)
  return rng.permutation(pieces).reshape(clients, -1)


@dataclasses.dataclass(frozen=True)
class Split:
  """How digits are dealt to clients.

  Attributes:
    clients: the paper's 50.
    shards: of the digits sorted by label for each client, the paper's 2.
    pooling: side of the squares of pixels that are averaged; the paper's 1.
    ratio: of the largest to the smallest class, for loss_tuning the paper's 10.
    selection: digits that choose step sizes.
    test: digits of the accuracy; with a data folder, all of its test file.
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
  """Reads digits and deals them out.

  Args:
    data_dir: a folder with MNIST or a data set in its format; None for the
      packaged digits.
    split: among whom, and how.

  Returns:
    The digits, and where they come from.

  Raises:
    SettingsError: if there are too few digits.
    MissingDataError: if `data_dir` has no such files.
  """
  rng = np.random.default_rng(0)
  sizes = {'test': split.test, 'selection': split.selection, 'clients': None}
  parts, source = vision.load_digits(data_dir, sizes, seed=rng, own_test=True)
  images, labels = parts['clients']
  used = imbalance(labels, split.ratio)
  rows = used[split_by_label(labels[used], split.clients, split.shards, rng)]
  if rows.shape[1] < 5:
    raise harness.SettingsError(
      f'{len(used):,} digits are too few for {split.clients} clients: take '
      'fewer clients, or more digits with --data_dir.'
    )
  # Shuffled, so that 80 and 20 % have the same classes.
  rows = rng.permuted(rows, axis=1)
  cut = round(0.8 * rows.shape[1])
  part = lambda images, labels: vision.DigitPart(
    jnp.asarray(pool(images, split.pooling)), jnp.asarray(labels)
  )

  def dealt(rows):
    flat = part(images[rows.ravel()], labels[rows.ravel()])
    return jax.tree.map(lambda z: z.reshape(*rows.shape, *z.shape[1:]), flat)

  digits = Digits(
    dealt(rows[:, :cut]),
    dealt(rows[:, cut:]),
    part(*parts['selection']),
    part(*parts['test']),
  )
  return digits, source


class Batch(NamedTuple):
  """What one client sees in one update.

  Attributes:
    train: its training digits.
    validation: its validation digits.
    rows: of the training digits, for each evaluation in turn, (times, size);
      None for all of them.
    now: the rows of this evaluation, or None.
  """

  train: vision.DigitPart
  validation: vision.DigitPart
  rows: Any = None
  now: Any = None


def draw_batch(key: chex.PRNGKey, digits: Digits, size: int, times: int):
  """Batches of all clients, (clients, ...); all of the digits if few."""
  clients, count = digits.train.labels.shape
  if size >= count:
    return Batch(digits.train, digits.validation)
  rows = jax.random.randint(key, (clients, times + 1, size), 0, count)
  return Batch(digits.train, digits.validation, rows, rows[:, 0])


def batch_at(batch: Batch, t: Any) -> Batch:
  """The batch of evaluation t."""
  if batch.rows is None:
    return batch
  return batch._replace(now=batch.rows[1 + t])


def train_part(batch: Batch) -> vision.DigitPart:
  """The training digits of this evaluation."""
  if batch.now is None:
    return batch.train
  return jax.tree.map(lambda z: z[batch.now], batch.train)
