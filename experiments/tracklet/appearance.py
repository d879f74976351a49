"""Appearance from pictures: a convolutional network on crops of detections.

A crop is what a box holds, 128 x 64 pixels, colours from 0 to 1. A network
makes a unit vector of it, a look, and is trained to tell the identities of the
training sequences apart: cross entropy of cosines to one vector an identity.
Looks then stand where those of simulated identity features do, see
`detections`. `small` has four convolutions; `resnet50` is the paper's network,
with group in place of batch normalisation and first weights that are drawn.
"""

import io
import itertools
import pathlib
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from PIL import Image

from experiments import harness
from experiments.harness import files
from experiments.tracklet import detections, mot_files, overlay

HEIGHT, WIDTH = 128, 64
_SHARP = 16.0  # By which cosines are multiplied in the cross entropy.
_PAD = 16  # Crops of a frame are so many, or twice, three times as many.


class Small(nnx.Module):
  """Four convolutions that halve each side, and the mean of what is left."""

  def __init__(self, numbers: int, rngs: nnx.Rngs):
    channels = (3, 16, 32, 64, 64)
    self.layers = nnx.List(
      [_conv(a, b, 3, 2, rngs) for a, b in itertools.pairwise(channels)]
    )
    self.last = nnx.Linear(channels[-1], numbers, rngs=rngs)

  def __call__(self, crops):
    for layer in self.layers:
      crops = jax.nn.relu(layer(crops))
    return self.last(crops.mean((1, 2)))


class Bottleneck(nnx.Module):
  """Three convolutions, the middle one narrow, beside a shortcut."""

  def __init__(self, inputs: int, narrow: int, stride: int, rngs: nnx.Rngs):
    wide = 4 * narrow
    self.convolutions = nnx.List(
      [
        _conv(inputs, narrow, 1, 1, rngs),
        _conv(narrow, narrow, 3, stride, rngs),
        _conv(narrow, wide, 1, 1, rngs),
      ]
    )
    self.norms = nnx.List([_norm(c, rngs) for c in (narrow, narrow, wide)])
    self.changes = stride != 1 or inputs != wide
    if self.changes:
      self.shortcut = _conv(inputs, wide, 1, stride, rngs)
      self.shortcut_norm = _norm(wide, rngs)

  def __call__(self, x):
    y = x
    for i, (convolve, norm) in enumerate(zip(self.convolutions, self.norms)):
      y = norm(convolve(y))
      y = jax.nn.relu(y) if i < 2 else y
    if self.changes:
      x = self.shortcut_norm(self.shortcut(x))
    return jax.nn.relu(x + y)


class ResNet50(nnx.Module):
  """ResNet-50; 3, 4, 6 and 3 blocks behind a stem.

  Args:
    numbers: of a look.
    rngs: of the first weights.
    width: channels of the stem; 64 in ResNet-50.
  """

  def __init__(self, numbers: int, rngs: nnx.Rngs, width: int = 64):
    self.stem = _conv(3, width, 7, 2, rngs)
    self.stem_norm = _norm(width, rngs)
    self.blocks = nnx.List()
    inputs = width
    for stage, count in enumerate((3, 4, 6, 3)):
      for i in range(count):
        stride = 2 if i == 0 and stage else 1
        narrow = width * 2**stage
        self.blocks.append(Bottleneck(inputs, narrow, stride, rngs))
        inputs = 4 * narrow
    self.last = nnx.Linear(inputs, numbers, rngs=rngs)

  def __call__(self, crops):
    x = jax.nn.relu(self.stem_norm(self.stem(crops)))
    x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding='SAME')
    for block in self.blocks:
      x = block(x)
    return self.last(x.mean((1, 2)))


def _conv(inputs, outputs, size, stride, rngs):
  return nnx.Conv(inputs, outputs, (size, size), strides=stride, rngs=rngs)


def _norm(channels, rngs):
  return nnx.GroupNorm(channels, num_groups=max(1, channels // 16), rngs=rngs)


KINDS = {'small': Small, 'resnet50': ResNet50}


class Encoder(NamedTuple):
  """A network of crops.

  Attributes:
    kind: of `KINDS`.
    numbers: of a look.
    weights: a tree of arrays.
    apply: (weights, crops (n, height, width, 3)) to looks (n, numbers).
  """

  kind: str
  numbers: int
  weights: Any
  apply: Callable[[Any, Any], Any]


def _functions(kind, numbers):
  """First weights of a key, and unit vectors of weights and crops."""
  make = lambda rngs: KINDS[kind](numbers, rngs)
  graph, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

  def apply(weights, crops):
    found = nnx.merge(graph, nnx.State(weights))(crops - 0.5)
    norm = jnp.sqrt(jnp.sum(found**2, -1, keepdims=True) + 1e-12)
    return found / norm

  init = lambda key: nnx.to_pure_dict(nnx.split(make(nnx.Rngs(key)))[1])
  return init, apply


def init(key: Any, *, kind: str = 'small', numbers: int = 16) -> Encoder:
  """An encoder with first weights.

  Args:
    key: of the draw.
    kind: of `KINDS`.
    numbers: of a look.

  Returns:
    An `Encoder`.

  Raises:
    SettingsError: if there is no such kind.
  """
  if kind not in KINDS:
    raise harness.SettingsError(
      f'there is no network of crops {kind!r}; there are {", ".join(KINDS)}.'
    )
  start, apply = _functions(kind, numbers)
  return Encoder(kind, numbers, start(key), jax.jit(apply))


def crop(picture: Image.Image, boxes: np.ndarray) -> np.ndarray:
  """What boxes hold; where they leave the picture, black.

  Args:
    picture: of the frame.
    boxes: left, top, width, height in pixels, (n, 4).

  Returns:
    Colours from 0 to 1, float32 (n, 128, 64, 3).
  """
  found = np.zeros((len(boxes), HEIGHT, WIDTH, 3), np.float32)
  for i, (left, top, wide, high) in enumerate(boxes):
    corners = left, top, left + max(wide, 1), top + max(high, 1)
    cut = picture.crop(tuple(round(x) for x in corners))
    found[i] = np.asarray(cut.resize((WIDTH, HEIGHT)), np.float32) / 255
  return found


def by_frame(
  boxes: mot_files.Boxes, images: files.Path
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Places of the boxes of a frame, and their crops; a frame at a time.

  Args:
    boxes: of a sequence.
    images: folder of its frames, 000001.jpg and so on.

  Yields:
    int (n,), and what `crop` gives.

  Raises:
    MissingDataError: if a frame that has boxes is missing.
  """
  for frame in np.unique(boxes.frames):
    rows = np.flatnonzero(boxes.frames == frame)
    picture = overlay.read_picture(images, int(frame))
    yield rows, crop(picture, boxes.boxes[rows])


def with_looks(
  encoder: Encoder, found: detections.Detected, images: files.Path
) -> detections.Detected:
  """Detections with the looks of their crops."""
  looks = np.zeros((len(found.ids), encoder.numbers), np.float32)
  for rows, crops in by_frame(found.boxes, images):
    # Few numbers of crops, so that few programs are compiled.
    pad = -len(rows) % _PAD
    crops = np.pad(crops, ((0, pad), (0, 0), (0, 0), (0, 0)))
    looks[rows] = encoder.apply(encoder.weights, crops)[: len(rows)]
  return found._replace(looks=looks)


def gather(
  several: list[tuple[detections.Detected, files.Path]],
  *,
  most: int,
  rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
  """Crops of people whose identities are known.

  Args:
    several: detections with identities, and folders of frames.
    most: crops of an identity, at most.
    rng: of the choice.

  Returns:
    Crops (n, 128, 64, 3), and identities from 0, (n,).
  """
  crops, ids, above = [np.zeros((0, HEIGHT, WIDTH, 3), np.float32)], [], 0
  for found, images in several:
    known = np.unique(found.ids[found.ids >= 0])
    kept = np.concatenate(
      [np.zeros(0, np.int64)]
      + [rng.permutation(np.flatnonzero(found.ids == i))[:most] for i in known]
    )
    kept = np.sort(kept)
    chosen = found.boxes.where(kept)
    crops += [some for _, some in by_frame(chosen, images)]
    ids.append(np.searchsorted(known, found.ids[kept]) + above)
    above += len(known)
  return np.concatenate(crops), np.concatenate([np.zeros(0, np.int64), *ids])


def train(
  encoder: Encoder,
  crops: np.ndarray,
  ids: np.ndarray,
  *,
  steps: int,
  batch: int = 32,
  rate: float = 1e-3,
  key: Any,
) -> tuple[Encoder, np.ndarray]:
  """Trains an encoder to tell identities apart; half of the crops mirrored.

  Args:
    encoder: with first weights.
    crops: of `gather`.
    ids: from 0, likewise.
    steps: updates.
    batch: crops of an update.
    rate: of Adam.
    key: of the batches.

  Returns:
    The encoder, and the loss of each update.

  Raises:
    DamagedDataError: if there are not two identities.
  """
  count = len(np.unique(ids))
  if count < 2:
    raise harness.DamagedDataError(
      f'looks are learnt from crops of several people, there are {count}.'
    )
  crops, ids = jnp.asarray(crops), jnp.asarray(ids)
  own = jax.random.normal(jax.random.fold_in(key, 1), (count, encoder.numbers))
  params = {'weights': encoder.weights, 'own': own}
  optimiser = optax.adam(rate)

  def loss(params, crops, ids):
    looks = encoder.apply(params['weights'], crops)
    own = params['own']
    own = own / jnp.sqrt(jnp.sum(own**2, -1, keepdims=True) + 1e-12)
    logits = _SHARP * looks @ own.T
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids).mean()

  @jax.jit
  def update(params, state, key):
    rows, mirrored = jax.random.split(key)
    rows = jax.random.randint(rows, (batch,), 0, len(ids))
    mirrored = jax.random.bernoulli(mirrored, 0.5, (batch, 1, 1, 1))
    some = jnp.where(mirrored, crops[rows][:, :, ::-1], crops[rows])
    value, gradient = jax.value_and_grad(loss)(params, some, ids[rows])
    updates, state = optimiser.update(gradient, state)
    return optax.apply_updates(params, updates), state, value

  state, values = optimiser.init(params), []
  for step in range(steps):
    params, state, value = update(params, state, jax.random.fold_in(key, step))
    values.append(value)
  return encoder._replace(weights=params['weights']), np.array(values)


def save(path: files.Path, encoder: Encoder) -> None:
  """Writes an encoder; the name ends in .npz."""
  content = io.BytesIO()
  leaves = jax.tree.leaves(encoder.weights)
  np.savez(
    content,
    about=np.array([encoder.kind, str(encoder.numbers)]),
    **{f'{i:03d}': np.asarray(leaf) for i, leaf in enumerate(leaves)},
  )
  files.write_bytes(path, content.getvalue())


def load(path: files.Path) -> Encoder:
  """Reads what `save` wrote.

  Raises:
    MissingDataError: if there is no such file.
    DamagedDataError: if it holds something else.
  """
  path = pathlib.Path(path)
  if not path.exists():
    raise harness.MissingDataError(
      f'there is no {path}: a network of crops is written by '
      '`appearance.save`, beside the tracker that was trained with its looks.'
    )
  damage = (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile)
  with harness.parsing(path, 'network of crops', damage):
    with np.load(path) as found:
      kind, numbers = (str(x) for x in found['about'])
      leaves = [found[name] for name in sorted(found.files) if name != 'about']
    if kind not in KINDS:
      raise ValueError(f'there is no kind {kind!r}')
    start, apply = _functions(kind, int(numbers))
    like = jax.eval_shape(start, jax.random.key(0))
    shapes = [leaf.shape for leaf in jax.tree.leaves(like)]
    if shapes != [leaf.shape for leaf in leaves]:
      raise ValueError(f'its arrays are not those of {kind}')
    weights = jax.tree.unflatten(jax.tree.structure(like), leaves)
  return Encoder(kind, int(numbers), weights, jax.jit(apply))
