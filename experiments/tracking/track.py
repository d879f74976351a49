"""Tracks a file of detections with a trained tracker.

    python -m experiments.tracking.track --checkpoint=WORKDIR
        --detections=det.txt --output=result.txt --overlay=tracks.gif

The checkpoint is the workdir of `train`, or a file search.npz or
teacher_forcing.npz in it. Detections and result are files of MOTChallenge; a
seqinfo.ini in the folder of the detections, or in the one above it, says how
long the sequence is and how large its pictures are, else that is taken from the
boxes. `--images` is a folder of frames, 000001.jpg and so on, to draw on.
`--hypotheses` above 1 reports each frame `--delay` frames later.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from experiments import harness
from experiments.harness.store import files
from experiments.tracking import (
  detections,
  models,
  mot_files,
  near_online,
  overlay,
  tracker,
)


def track(
  checkpoint: files.Path,
  given: files.Path,
  output: files.Path,
  *,
  picture: files.Path | None = None,
  images: files.Path | None = None,
  least: float = 0.0,
  hypotheses: int = 1,
  delay: int = 10,
) -> mot_files.Boxes:
  """Tracks a file of detections; see the module.

  Args:
    checkpoint: a workdir of `train`, or a file of it.
    given: detections.
    output: the result, which is written.
    picture: .png or .gif to write, or None.
    images: folder of frames to draw on, or None.
    least: confidence of a detection, at least.
    hypotheses: states that go on side by side.
    delay: frames until a frame is told, if there are several.

  Returns:
    The result.

  Raises:
    UserError: in one line, of files that are missing, damaged or cannot be
      written.
  """
  if not (hypotheses >= 1 and delay >= 0 and 0 <= least <= 1):
    raise harness.SettingsError(
      f'hypotheses={hypotheses}, delay={delay}, least_confidence={least:g}: '
      'there is at least one hypothesis, a delay is not below 0, and a '
      'confidence is within 0 and 1.'
    )
  if picture is not None:
    overlay.kind_of(picture)  # Before any work.
  model, rules = models.load(checkpoint)
  boxes = mot_files.read_boxes(given, identities=False)
  if boxes.left_out:
    print(
      f'{given}: {boxes.left_out} boxes that are not finite or have no area '
      'are left out.',
      file=sys.stderr,
    )
  boxes = boxes._replace(confidences=_sure(given, boxes.confidences))
  folder = pathlib.Path(given).absolute().parent
  told = (folder, folder.parent)
  folder = next((f for f in told if (f / 'seqinfo.ini').exists()), folder)
  info = mot_files.read_info(folder, boxes)
  boxes = boxes.where(boxes.confidences >= least)
  found = detections.Detected(
    boxes, boxes.ids, np.zeros((len(boxes.ids), 0), np.float32), info
  )
  if hypotheses > 1:
    wait = near_online.Delay(hypotheses=hypotheses, frames=delay)
    shown = near_online.track(model, found, rules, wait)
  else:
    shown = tracker.online(model, found, rules)
  mot_files.write_boxes(output, shown)
  if picture is not None:
    overlay.write(picture, shown, info, images=images)
  return shown


def _sure(path, confidences):
  """Confidences as the tracker knows them; 1 where the file has none."""
  if not len(confidences):
    return confidences
  low, high = confidences.min(), confidences.max()
  if low == high < 0:
    print(f'{path}: all confidences are {low:g}: 1 is taken.', file=sys.stderr)
    return np.ones_like(confidences)
  if low < 0 or high > 1:
    raise harness.DamagedDataError(
      f'{path}: confidences are from {low:g} to {high:g}, and the tracker was '
      'trained with those within 0 and 1: scale the seventh column.'
    )
  return confidences


def main(arguments: Sequence[str]) -> int:
  """Tracks what the command line says; returns the exit status."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.tracking.track',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    '--checkpoint',
    required=True,
    help='workdir of train, of which search.npz is taken, or a file',
  )
  parser.add_argument(
    '--detections', required=True, help='file of MOTChallenge to read'
  )
  parser.add_argument(
    '--output', required=True, help='file of MOTChallenge to write'
  )
  parser.add_argument('--overlay', help='.png or .gif')
  parser.add_argument('--images', help='folder of frames')
  parser.add_argument(
    '--least_confidence',
    type=float,
    default=0.0,
    help='lowest confidence of a detection, within 0 and 1; default '
    '%(default)s',
  )
  parser.add_argument(
    '--hypotheses',
    type=int,
    default=1,
    help='number that are followed at once; default %(default)s',
  )
  parser.add_argument(
    '--delay',
    type=int,
    default=10,
    help='frames until a frame is reported, with several hypotheses; '
    'default %(default)s',
  )
  flags = parser.parse_args(arguments)
  try:
    shown = track(
      flags.checkpoint,
      flags.detections,
      flags.output,
      picture=flags.overlay,
      images=flags.images,
      least=flags.least_confidence,
      hypotheses=flags.hypotheses,
      delay=flags.delay,
    )
  except harness.UserError as error:
    print(f'track: {" ".join(str(error).split())}', file=sys.stderr)
    return 1
  count = len(np.unique(shown.ids))
  print(f'{flags.output}: {len(shown.ids)} boxes of {count} tracklets.')
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
