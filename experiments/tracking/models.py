"""A trained tracker in one file."""

import io
import pathlib
import zipfile

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
  """Writes weights, noise and rules; the name ends in .npz."""
  content = io.BytesIO()
  np.savez(
    content,
    noise=np.array(noise),
    rules=np.array(rules, np.float64),
    **{f'weights/{k}': np.asarray(v) for k, v in weights.items()},
  )
  files.write_bytes(path, content.getvalue())


def load(
  path: files.Path, *, looks: int = 0
) -> tuple[tracker.Model, tracker.Rules]:
  """Reads what `save` wrote.

  Args:
    path: of the file.
    looks: numbers of the looks that detections have.

  Returns:
    The model and the rules that it was tuned with.

  Raises:
    MissingDataError: if there is no such file; says how to make one.
    DamagedDataError: if it holds something else, or a network that needs looks
      of other numbers.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    path = path / 'search.npz'
  if not path.exists():
    raise harness.MissingDataError(
      f'there is no {path}: train a tracker by `python -m '
      'experiments.tracklet.train`, which writes search.npz and '
      'teacher_forcing.npz to its workdir.'
    )
  damage = (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile)
  with harness.parsing(path, 'tracker', damage):
    if not zipfile.is_zipfile(path):
      raise ValueError('it is no file .npz')
    with np.load(path) as found:
      weights = {
        name.removeprefix('weights/'): found[name]
        for name in found.files
        if name.startswith('weights/')
      }
      noise = motion.Noise(*map(float, found['noise']))
      given = found['rules'].tolist()
    kinds = tracker.Rules._field_defaults.values()
    rules = tracker.Rules(
      *(type(kind)(value) for kind, value in zip(kinds, given, strict=True))
    )
    if weights['embed'].shape[-2] != network.features(looks):
      raise ValueError(
        'it needs features of identity, which files of detections have not'
        if not looks
        else f'its features of identity have not {looks} numbers'
      )
  return tracker.learned(weights, noise), rules
