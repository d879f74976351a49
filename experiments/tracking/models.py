"""Saves and loads a trained tracker as one file."""

import io
import os
import pathlib

import numpy as np

from experiments import harness
from experiments.harness.store import files
from experiments.tracking import motion, network, tracker


def save(
  path: files.Path,
  weights: network.Weights,
  noise: motion.Noise,
  rules: tracker.Rules,
) -> None:
  """Writes weights, noise and rules to a file that ends in .npz."""
  content = io.BytesIO()
  np.savez(
    content,
    noise=np.array(noise),
    rules=np.array(rules, np.float64),
    **{f'weights/{k}': np.asarray(v) for k, v in weights.items()},
  )
  files.write_bytes(path, content.getvalue())


def load(
  path: files.Path, *, embedding_size: int = 0
) -> tuple[tracker.Model, tracker.Rules]:
  """Loads a tracker that `save` wrote.

  Args:
    path: the file, or a workdir with search.npz.
    embedding_size: numbers in the embedding of a detection.

  Returns:
    The model, and the rules that were tuned with it.

  Raises:
    MissingDataError: if the file is missing; says how to make one.
    DamagedDataError: if it is no tracker, or its network needs embeddings of
      another size.
  """
  path = pathlib.Path(path)
  if os.path.isdir(path):
    path = path / 'search.npz'
  if not os.path.exists(path):
    raise harness.MissingDataError(
      f'there is no {path}: train a tracker by `python -m '
      'experiments.tracklet.train`, which writes search.npz and '
      'teacher_forcing.npz to its workdir.'
    )
  with harness.parsing(path, 'tracker'):
    content = harness.read_npz(path, 'tracker')
    weights = {
      name.removeprefix('weights/'): array
      for name, array in content.items()
      if name.startswith('weights/')
    }
    if 'weights/embed' not in content:
      raise ValueError('the array weights/embed is missing')
    for name, count in (
      ('noise', len(motion.Noise._fields)),
      ('rules', len(tracker.Rules._fields)),
    ):
      array = content.get(name, np.zeros(0))
      if array.shape != (count,) or array.dtype.kind != 'f':
        raise ValueError(f'the array {name} has no {count} numbers')
    noise = motion.Noise(*map(float, content['noise']))
    values = content['rules'].tolist()
    defaults = tracker.Rules._field_defaults.values()
    rules = tracker.Rules(
      *(type(x)(value) for x, value in zip(defaults, values, strict=True))
    )
    if weights['embed'].shape[-2] != network.feature_count(embedding_size):
      raise ValueError(
        'its network needs embeddings, which detection files lack'
        if not embedding_size
        else f'its embeddings do not have {embedding_size} numbers'
      )
    # Several networks have a leading axis.
    members, hidden = weights['embed'].shape[:-2], weights['embed'].shape[-1]
    for name, shape in network.shapes(hidden, embedding_size).items():
      array = weights.get(name, np.zeros(0))
      if array.shape != (*members, *shape) or array.dtype.kind != 'f':
        raise ValueError(
          f'the array weights/{name} has no numbers of the shape '
          f'{(*members, *shape)}'
        )
  return tracker.make_model(weights, noise), rules
