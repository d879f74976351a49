"""A recogniser: front end, encoder, two heads, and its losses and outputs.

Weights are `bj.sequences(encoder=..., recogniser=..., predictor=...)`.
"""

import functools
import io
import json
import math
import pathlib
import zipfile
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

# The file that `train` writes.
NAME = 'recogniser.npz'


class Shape(NamedTuple):
  """Sizes of a network; plain values, kept beside its weights.

  Attributes:
    kind: of the encoder.
    width: of its layers.
    depth: layers after the strided ones.
    strides: of those.
    size: frames that a convolution sees.
    heads: of attention.
    causal: whether it sees no frame that comes.
    units: of transcripts, with the blank.
    front: the front end.
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
    """Frames of features of an encoded one."""
    return math.prod(self.strides)

  @property
  def frame(self) -> float:
    """Seconds of an encoded frame."""
    return self.front.hop * self.shrink

  def frames_out(self, length: int) -> int:
    """Encoded frames of so many samples, or given frames."""
    return int(
      encoders.shrunk(front_end.frames_of(self.front, length), self.strides)
    )

  def to_json(self) -> str:
    """As a text."""
    return json.dumps(self._replace(front=self.front._asdict())._asdict())

  @classmethod
  def from_json(cls, text: str) -> 'Shape':
    """From a text."""
    found = json.loads(text)
    found['front'] = front_end.FrontEnd(**found['front'])
    return cls(**found | {'strides': tuple(found['strides'])})


class Training(NamedTuple):
  """What a network sees in training only.

  Attributes:
    task: the loss of audio alone.
    augmentation: stripes that are hidden from the loss of transcripts.
    dropout: of the encoder.
  """

  task: objectives.Task
  augmentation: front_end.Augmentation
  dropout: float


class Recogniser:
  """Pure functions of the weights.

  Args:
    shape: sizes.
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
    """Numbers of the input frames of an encoded one."""
    return self.shape.front.numbers * self.shape.shrink

  def predictor(self, task: objectives.Task) -> harness.Network:
    """The head of a loss of audio alone."""
    return objectives.predictor(task, width=self.shape.width, stack=self.stack)

  def init(self, key: chex.PRNGKey, task: objectives.Task) -> Any:
    """Weights."""
    one, two, three = jax.random.split(key, 3)
    return bj.sequences(
      encoder=self.encoder.init(one),
      recogniser=self.head.init(two),
      predictor=self.predictor(task).init(three),
    )

  def ctc(self, training: Training, weights: Any, batch: Any) -> chex.Array:
    """The loss of transcripts; `batch` has a `key`."""
    hide, drop = jax.random.split(batch['key'])
    features, lengths = front_end.features_of(
      self.shape.front, batch['audio'], batch['length']
    )
    features = front_end.spec_augment(
      hide, features, lengths, training.augmentation
    )
    encoded, out = self.encoder.apply(
      weights.encoder, features, lengths, drop, training.dropout
    )
    logits = self.head.apply(weights.recogniser, encoded)
    return objectives.ctc(logits, out, batch['labels'], batch['label_length'])

  def ssl(self, training: Training, weights: Any, batch: Any) -> chex.Array:
    """The loss of audio alone; `batch` has `key` and `fixed`."""
    features, lengths = front_end.features_of(
      self.shape.front, batch['audio'], batch['length']
    )

    def encode(features, lengths, key):
      return self.encoder.apply(
        weights.encoder, features, lengths, key, training.dropout
      )

    return objectives.loss(
      training.task,
      functools.partial(self.predictor(training.task).apply, weights.predictor),
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
      features, lengths = front_end.features_of(self.shape.front, audio, length)
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
  """What a network says of utterances, a bucket after the other.

  Args:
    recogniser: the network.
    weights: of one member.
    examples: utterances.
    rows: which of them.
    edges: rising lengths that batches are padded to.
    batch_size: utterances at once.

  Yields:
    The row, and log-probabilities (out frames, units).
  """
  rows = np.asarray(rows, np.int64)
  which = np.searchsorted(edges, examples.lengths[rows])
  if np.any(which == len(edges)):
    # Longer than all that was trained on: a bucket of its own.
    edges = (*edges, int(examples.lengths[rows].max()))
  for bucket, edge in enumerate(edges):
    mine = rows[which == bucket]
    for start in range(0, len(mine), batch_size):
      some = mine[start : start + batch_size]
      # The last batch is as large as the others: one program a bucket.
      whole = np.resize(some, batch_size)
      arrays = [examples.load(int(row)) for row in whole]
      _, found, out = recogniser.outputs(
        weights, *feed.side_by_side(arrays, edge)
      )
      found, out = np.asarray(found), np.asarray(out)
      for i, row in enumerate(some):
        yield int(row), found[i, : out[i]]


def quantiser(
  training: Training, recogniser: Recogniser, key: chex.PRNGKey
) -> Any:
  """Fixed arrays of the loss of audio, from a seed's key."""
  if training.task.kind != 'best_rq':
    return ()
  return objectives.quantiser(
    training.task, jax.random.fold_in(key, 1), recogniser.stack
  )


def count(weights: Any) -> int:
  """Numbers among weights."""
  return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(weights))


class Saved(NamedTuple):
  """What transcribes, as read from a file.

  Attributes:
    network: the recogniser.
    weights: of one member, without a predictor.
    units: as a text, see `units`.
    utterance_seconds: at most which most transcribed training utterances last;
      None in files of earlier versions.
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
  """Writes what transcribes into one file; the name ends in .npz.

  Args:
    path: of the file.
    recogniser: the network.
    weights: of one member.
    units: as a text, see `units`.
    utterance_seconds: at most which most transcribed training utterances last.
  """
  kept = {'encoder': weights.encoder, 'recogniser': weights.recogniser}
  arrays = {name: np.asarray(x) for name, x in leaves.named(kept)}
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


def load(path: files.Path) -> Saved:
  """Reads what `save` wrote.

  Args:
    path: of the file, or a folder with one of this kind.

  Returns:
    What was saved.

  Raises:
    MissingDataError: if there is no such file; says how to make one.
    DamagedDataError: if it holds something else.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    path = path / NAME
  if not path.exists():
    raise harness.MissingDataError(
      f'there is no {path}: train a recogniser by `python -m '
      f'experiments.bl_just.train`, which writes {NAME} to its workdir '
      'when all methods are done.'
    )
  damage = (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile)
  with harness.parsing(path, 'recogniser', damage):
    content = io.BytesIO(path.read_bytes())
    if not zipfile.is_zipfile(content):
      raise ValueError('it is no file .npz')
    content.seek(0)
    # A damaged file that np.load opens by itself stays open.
    with np.load(content) as found:
      about = json.loads(str(found['about']))
      arrays = {name: found[name] for name in found.files if name != 'about'}
    recogniser = Recogniser(Shape.from_json(about['shape']))
    key = jax.random.key(0)
    like = {
      'encoder': jax.eval_shape(recogniser.encoder.init, key),
      'recogniser': jax.eval_shape(recogniser.head.init, key),
    }
    wanted = {name: x.shape for name, x in leaves.named(like)}
    if wanted != {name: x.shape for name, x in arrays.items()}:
      raise ValueError('its weights are not those of its shape')
    tree = jax.tree.unflatten(
      jax.tree.structure(like), [jnp.asarray(arrays[name]) for name in wanted]
    )
    seconds = about.get('utterance_seconds')
    if seconds is not None and not 0 < seconds < math.inf:
      raise ValueError(f'its utterances last {seconds} seconds')
  return Saved(
    recogniser, bj.sequences(**tree, predictor=()), about['units'], seconds
  )
