"""Tracks the detections of a file with a trained tracker.

    python -m experiments.tracking.track --checkpoint=WORKDIR
        --detections=det.txt --output=result.txt --overlay=tracks.gif

The checkpoint is the workdir of `python -m experiments.tracklet.train`, or one
of its networks: search.npz, trained by search (default), teacher_forcing.npz,
on true histories. Detections and result are files of MOTChallenge, KITTI,
COCO (.json) or CSV, see `box_files`; the ending of the result gives its format.
Classes are tracked separately and kept, except in MOTChallenge files, which
have none. A seqinfo.ini in the folder of the detections, or in the one above
it, gives the length and picture size; otherwise they are inferred from the
boxes. `--overlay` draws the tracks into a .png, a .gif or a video: .mp4, .mkv,
.mov or .avi. `--images` is a folder of frames to draw on, 000001.jpg and so on;
`--video` is a video instead, whose first frame is that of the detections.
Videos need the extra `video`: pip install -e '.[experiments,video]'.
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
  box_files,
  detections,
  models,
  mot_files,
  near_online,
  overlay,
  tracker,
)


def track(
  checkpoint: files.Path,
  detections_path: files.Path,
  output: files.Path,
  *,
  overlay_path: files.Path | None = None,
  images: files.Path | None = None,
  min_confidence: float = 0.0,
  hypotheses: int = 1,
  delay: int = 10,
) -> mot_files.Boxes:
  """Tracks the detections of a file; see the module.

  Args:
    checkpoint: a workdir of `experiments.tracklet.train`, or a file in it.
    detections_path: file of detections to read.
    output: file of results to write.
    overlay_path: .png, .gif or video to write, or None.
    images: folder of frames, or a video, to draw on; None for white.
    min_confidence: smallest confidence of a detection.
    hypotheses: that are tracked at once.
    delay: frames until a frame is reported, with several hypotheses.

  Returns:
    The result.

  Raises:
    UserError: in one line, if a file is missing, damaged or not writable.
  """
  if not (hypotheses >= 1 and delay >= 0 and 0 <= min_confidence <= 1):
    raise harness.SettingsError(
      f'hypotheses={hypotheses}, delay={delay}, '
      f'min_confidence={min_confidence:g}: need at least one hypothesis, a '
      'delay of at least 0, and a confidence within 0 and 1.'
    )
  # Before any work.
  pictures = None if images is None else overlay.open_images(images)
  if overlay_path is not None:
    overlay.check_suffix(overlay_path)
  elif pictures is not None:
    raise harness.SettingsError(
      f'{images} is to draw on, but there is no --overlay to write: add for '
      'instance --overlay=tracks.gif.'
    )
  box_files.check_ending(output)
  model, rules = models.load(checkpoint)
  named = box_files.read(detections_path)
  boxes = named.boxes
  if boxes.left_out:
    print(
      f'{detections_path}: left out {boxes.left_out} boxes that are not finite '
      'or have no area.',
      file=sys.stderr,
    )
  confidences = _check_confidences(detections_path, boxes.confidences)
  boxes = boxes._replace(confidences=confidences)
  folder = pathlib.Path(detections_path).absolute().parent
  folders = (folder, folder.parent)
  folder = next((f for f in folders if (f / 'seqinfo.ini').exists()), folder)
  info = mot_files.read_info(folder, boxes)
  boxes = boxes.where(boxes.confidences >= min_confidence)
  limits = near_online.Delay(hypotheses=hypotheses, frames=delay)
  parts, used = [], 0
  # Classes are tracked separately; without boxes there is one part.
  for name in np.unique(boxes.classes).tolist() or [0]:
    own = boxes.where(boxes.classes == name)
    embedding = np.zeros((len(own.ids), 0), np.float32)
    detected = detections.Detected(own, own.ids, embedding, info)
    if hypotheses > 1:
      part = near_online.track(model, detected, rules, limits)
    else:
      part = tracker.online(model, detected, rules)
    parts.append(part._replace(ids=part.ids + used))
    used = int(parts[-1].ids.max(initial=used))
  result = mot_files.join(parts)
  box_files.write(output, named._replace(boxes=result))
  if overlay_path is not None:
    overlay.write(overlay_path, result, info, images=pictures)
  return result


def _check_confidences(path, confidences):
  """Checks that confidences are within 0 and 1; replaces a constant -1 by 1."""
  if not len(confidences):
    return confidences
  low, high = confidences.min(), confidences.max()
  if low == high < 0:
    print(f'{path}: all confidences are {low:g}; using 1.', file=sys.stderr)
    return np.ones_like(confidences)
  if low < 0 or high > 1:
    raise harness.DamagedDataError(
      f'{path}: confidences are from {low:g} to {high:g}, but the tracker was '
      'trained on those within 0 and 1: rescale the seventh column.'
    )
  return confidences


def main(arguments: Sequence[str]) -> int:
  """Runs the command line; returns the exit status."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.tracking.track',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    '--checkpoint',
    required=True,
    help='workdir of experiments.tracklet.train, whose search.npz is loaded, '
    'or a file',
  )
  parser.add_argument(
    '--detections',
    required=True,
    help='file of MOTChallenge, KITTI, COCO or CSV to read',
  )
  parser.add_argument(
    '--output', required=True, help='file to write: .txt, .json or .csv'
  )
  parser.add_argument(
    '--overlay', help='.png, .gif or video to draw the tracks into'
  )
  parser.add_argument(
    '--images', help='folder of frames to draw on: 000001.jpg and so on'
  )
  parser.add_argument('--video', help='video to draw on, instead of --images')
  parser.add_argument(
    '--min_confidence',
    type=float,
    default=0.0,
    help='smallest confidence of a detection, within 0 and 1; default '
    '%(default)s',
  )
  parser.add_argument(
    '--least_confidence',  # Former name.
    type=float,
    help=argparse.SUPPRESS,
  )
  parser.add_argument(
    '--hypotheses',
    type=int,
    default=1,
    help='hypotheses that are tracked at once; default %(default)s',
  )
  parser.add_argument(
    '--delay',
    type=int,
    default=10,
    help='frames until a frame is reported, with several hypotheses; '
    'default %(default)s',
  )
  flags = parser.parse_args(arguments)
  if flags.least_confidence is not None:
    print(
      'track: --least_confidence is now --min_confidence; the former name will '
      'be removed.',
      file=sys.stderr,
    )
    flags.min_confidence = flags.least_confidence
  if flags.video and flags.images:
    parser.error('give --images or --video, not both.')
  try:
    result = track(
      flags.checkpoint,
      flags.detections,
      flags.output,
      overlay_path=flags.overlay,
      images=flags.video or flags.images,
      min_confidence=flags.min_confidence,
      hypotheses=flags.hypotheses,
      delay=flags.delay,
    )
  except harness.UserError as error:
    print(f'track: {" ".join(str(error).split())}', file=sys.stderr)
    return 1
  count = len(np.unique(result.ids))
  print(f'{flags.output}: {len(result.ids)} boxes of {count} tracklets.')
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
