"""A speech recogniser: front end, encoder, two heads, losses and outputs.

Weights are `bj.sequences(encoder=..., recogniser=..., predictor=...)`.
"""

import functools
import io
import json
import math
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

import bilevel_jax as bj
from experiments import harness
from experiments.harness.store import files, leaves
from experiments.speech import encoders, feed, front_end, objectives

# Name of the file in the workdir of `train`.
NAME = 'recogniser.npz'


class Shape(NamedTuple):
  """Sizes of a network, stored with its weights.

  Attributes:
    kind: kind of the encoder, see `encoders.KINDS`.
    width: width of the layers.
    depth: number of layers after the strided convolutions.
    strides: strides of the first convolutions.
    size: kernel size of a convolution, in frames.
    heads: number of attention heads.
    causal: whether the encoder ignores future frames.
    units: number of text units, with the blank.
    front: settings of the features.
  """

  kind: str
  width: int
  depth: int
  strides: tuple[int, ...]
  size: int
  heads: int
  causal: bool
  units: int
  front: front_end.FrontEnd

  @property
  def shrink(self) -> int:
    """Input frames per encoded frame."""
    return math.prod(self.strides)

  @property
  def frame(self) -> float:
    """Seconds of an encoded frame."""
    return self.front.hop * self.shrink

  def frames_out(self, length: int) -> int:
    """Number of encoded frames of `length` samples or feature frames."""
    return int(
      encoders.shrunk(front_end.count_frames(self.front, length), self.strides)
    )

  def to_json(self) -> str:
    """Converts to JSON."""
    return json.dumps(self._replace(front=self.front._asdict())._asdict())

  @classmethod
  def from_json(cls, text: str) -> 'Shape':
    """Converts from JSON."""
    values = json.loads(text)
    values['front'] = front_end.FrontEnd(**values['front'])
    return cls(**values | {'strides': tuple(values['strides'])})


class Training(NamedTuple):
  """Settings of the losses, used in training alone.

  Attributes:
    ssl: settings of the self-supervised loss.
    masks: SpecAugment before the loss of transcripts.
    dropout: dropout rate of the encoder.
  """

  ssl: objectives.Ssl
  masks: front_end.Masks
  dropout: float


class Recogniser:
  """Losses and outputs as pure functions of the weights.

  Args:
    shape: sizes of the network.
  """

  def __init__(self, shape: Shape):
    self.shape = shape
    self.encoder = encoders.make(
      shape.kind,
      numbers=shape.front.numbers,
      width=shape.width,
      depth=shape.depth,
      strides=shape.strides,
      size=shape.size,
      heads=shape.heads,
      causal=shape.causal,
    )
    self.head = encoders.linear(shape.width, shape.units)

  @property
  def stack(self) -> int:
    """Width of the stacked input frames of an encoded frame."""
    return self.shape.front.numbers * self.shape.shrink

  def predictor(self, ssl: objectives.Ssl) -> harness.Network:
    """Makes the head of a self-supervised loss."""
    return objectives.predictor(ssl, width=self.shape.width, stack=self.stack)

  def init(self, key: chex.PRNGKey, ssl: objectives.Ssl) -> Any:
    """Initialises the weights."""
    one, two, three = jax.random.split(key, 3)
    return bj.sequences(
      encoder=self.encoder.init(one),
      recogniser=self.head.init(two),
      predictor=self.predictor(ssl).init(three),
    )

  def ctc(self, training: Training, weights: Any, batch: Any) -> chex.Array:
    """Computes the loss of transcripts; `batch` has a `key`."""
    hide, drop = jax.random.split(batch['key'])
    features, lengths = front_end.compute_features(
      self.shape.front, batch['audio'], batch['length']
    )
    features = front_end.spec_augment(hide, features, lengths, training.masks)
    encoded, out = self.encoder.apply(
      weights.encoder, features, lengths, drop, training.dropout
    )
    logits = self.head.apply(weights.recogniser, encoded)
    return objectives.ctc(logits, out, batch['labels'], batch['label_length'])

  def ssl(self, training: Training, weights: Any, batch: Any) -> chex.Array:
    """Computes the self-supervised loss; `batch` has `key` and `fixed`."""
    features, lengths = front_end.compute_features(
      self.shape.front, batch['audio'], batch['length']
    )

    def encode(features, lengths, key):
      return self.encoder.apply(
        weights.encoder, features, lengths, key, training.dropout
      )

    return objectives.loss(
      training.ssl,
      functools.partial(self.predictor(training.ssl).apply, weights.predictor),
      encode,
      features,
      lengths,
      batch['key'],
      fixed=batch['fixed'],
      shrink=self.shape.shrink,
    )

  @functools.cached_property
  def outputs(self) -> Any:
    """(weights, audio, length) -> features, log-probabilities, out lengths."""

    @jax.jit
    def run(weights, audio, length):
      features, lengths = front_end.compute_features(
        self.shape.front, audio, length
      )
      encoded, out = self.encoder.apply(weights.encoder, features, lengths)
      logits = self.head.apply(weights.recogniser, encoded)
      return features, jax.nn.log_softmax(logits), out

    return run


def log_probabilities(
  recogniser: Recogniser,
  weights: Any,
  examples: feed.Examples,
  rows: Sequence[int],
  *,
  edges: Sequence[int],
  batch_size: int = 32,
) -> Iterator[tuple[int, np.ndarray]]:
  """Computes the network's outputs for utterances, bucket by bucket.

  Args:
    recogniser: the network.
    weights: weights of one member.
    examples: the utterances.
    rows: rows of the examples.
    edges: ascending lengths to which batches are padded.
    batch_size: utterances per batch.

  Yields:
    The row, and log-probabilities (out frames, units).
  """
  rows = np.asarray(rows, np.int64)
  buckets = np.searchsorted(edges, examples.lengths[rows])
  if np.any(buckets == len(edges)):
    # A bucket for utterances longer than those of training.
    edges = (*edges, int(examples.lengths[rows].max()))
  for bucket, edge in enumerate(edges):
    bucket_rows = rows[buckets == bucket]
    for start in range(0, len(bucket_rows), batch_size):
      batch_rows = bucket_rows[start : start + batch_size]
      # Fills the last batch up, so that each bucket has one program.
      arrays = [
        examples.load(int(row)) for row in np.resize(batch_rows, batch_size)
      ]
      _, log_probs, out = recogniser.outputs(
        weights, *feed.pad_and_stack(arrays, edge)
      )
      log_probs, out = np.asarray(log_probs), np.asarray(out)
      for i, row in enumerate(batch_rows):
        yield int(row), log_probs[i, : out[i]]


def quantiser(
  training: Training, recogniser: Recogniser, key: chex.PRNGKey
) -> Any:
  """Draws the fixed arrays of the self-supervised loss from a seed's key."""
  if training.ssl.ssl_loss != 'best_rq':
    return ()
  return objectives.quantiser(
    training.ssl, jax.random.fold_in(key, 1), recogniser.stack
  )


class Checkpoint(NamedTuple):
  """A trained recogniser from a file.

  Attributes:
    network: the recogniser.
    weights: weights of one member, without a predictor.
    units: the text units in their file format, see `units.parse`.
    utterance_seconds: 95th percentile of the lengths of transcribed training
      utterances; None in files of earlier versions.
  """

  network: Recogniser
  weights: Any
  units: str
  utterance_seconds: float | None


def save(
  path: files.Path,
  recogniser: Recogniser,
  weights: Any,
  units: str,
  utterance_seconds: float,
) -> None:
  """Writes a trained recogniser into one file.

  Args:
    path: the file; its name ends in .npz.
    recogniser: the network.
    weights: weights of one member.
    units: the text units in their file format, see `units.parse`.
    utterance_seconds: 95th percentile of the lengths of transcribed training
      utterances.
  """
  tree = {'encoder': weights.encoder, 'recogniser': weights.recogniser}
  arrays = {name: np.asarray(x) for name, x in leaves.named(tree)}
  about = json.dumps(
    {
      'shape': recogniser.shape.to_json(),
      'units': units,
      'utterance_seconds': utterance_seconds,
    }
  )
  content = io.BytesIO()
  np.savez(content, about=np.array(about), **arrays)
  files.write_bytes(path, content.getvalue())


def load(path: files.Path) -> Checkpoint:
  """Reads a trained recogniser.

  Args:
    path: a file from `save`, or a folder that contains `NAME`.

  Returns:
    The recogniser.

  Raises:
    MissingDataError: if the file is missing; says how to make it.
    DamagedDataError: if the file is invalid.
  """
  path = pathlib.Path(path)
  if os.path.isdir(path):
    path = path / NAME
  if not os.path.exists(path):
    raise harness.MissingDataError(
      f'{path} does not exist: train a recogniser by `python -m '
      f'experiments.bl_just.train`, which writes {NAME} to its workdir '
      'when all methods are done.'
    )
  with harness.parsing(path, 'recogniser'):
    arrays = harness.read_npz(path, 'recogniser')
    if 'about' not in arrays:
      raise ValueError('the array about is missing')
    about = json.loads(str(arrays.pop('about')))
    recogniser = Recogniser(Shape.from_json(about['shape']))
    key = jax.random.key(0)
    like = {
      'encoder': jax.eval_shape(recogniser.encoder.init, key),
      'recogniser': jax.eval_shape(recogniser.head.init, key),
    }
    wanted = {name: x.shape for name, x in leaves.named(like)}
    if wanted != {name: x.shape for name, x in arrays.items()}:
      raise ValueError('its weights do not have the shapes of its network')
    tree = jax.tree.unflatten(
      jax.tree.structure(like), [jnp.asarray(arrays[name]) for name in wanted]
    )
    seconds = about.get('utterance_seconds')
    if seconds is not None and not 0 < seconds < math.inf:
      raise ValueError(f'its utterances last {seconds} seconds')
  return Checkpoint(
    recogniser, bj.sequences(**tree, predictor=()), about['units'], seconds
  )
