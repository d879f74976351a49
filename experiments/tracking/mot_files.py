"""Files of multi-object tracking: MOTChallenge, read and written.

MOTChallenge is one box a line, with commas: `frame, identity, left, top, width,
height, confidence, ...`. Detections (`det/det.txt`) have the identity -1. The
truth (`gt/gt.txt`) has 0 in place of the confidence where a box is not judged,
and from MOT16 on goes on with `class, visibility`; 2D MOT 2015 and results go
on with three numbers of the world that are not read. `seqinfo.ini` beside them
has the length, the size of the pictures and their rate.

What is wrong, and what happens:

| in a file | then |
|---|---|
| frames out of order | they are sorted, boxes of a frame stay in order |
| a frame without boxes | it is one, up to the length in seqinfo.ini |
| a box that is not finite, or without width or height | left out, counted |
| an identity twice in a frame of a truth or a result | error, with the line |
| a line with too few numbers, or no number; a frame below 1 | error, likewise |
| no box above a pixel: shares of the picture, from 0 to 1 | error |
| a million frames without a box: time stamps, for instance | error |
| no seqinfo.ini | length and size are those that hold all boxes, rate is 30 |
"""

import configparser
import itertools
import pathlib
from typing import NamedTuple

import numpy as np

from experiments import harness
from experiments.harness.data import sources
from experiments.harness.store import files

PEDESTRIAN = 1
_RATE = 30.0
# Frames without a box that a file may have: nine hours of 30 pictures a second.
_MAX_EMPTY = 1_000_000
# Where the folder of a sequence may be, below a folder of data sets.
_FOLDERS = (
  *('', 'train', 'test', 'MOT17/train', 'mot17/train', 'MOT15/train'),
  *('MOT17_gt', 'MOT15_sort_det', 'motmetrics_pkg'),
)
_FOLDERS += tuple(f'mot/{folder}' for folder in _FOLDERS)
_ENDS = ('', '-FRCNN', '-DPM', '-SDP')
_ADVICE = (
  'the sequences of MOTChallenge (https://motchallenge.net) are folders with '
  'gt/gt.txt, det/det.txt and seqinfo.ini, in MOT17/train for instance; '
  '`trackers download mot17 --asset annotations,detections` fetches them'
)


class Boxes(NamedTuple):
  """Boxes of a file, by frame.

  Attributes:
    frames: int (boxes,), from 1, rising.
    ids: int (boxes,); -1 for none.
    boxes: left, top, width, height in pixels, float (boxes, 4).
    confidences: float (boxes,); of a truth, 0 for boxes that are not judged.
    classes: int (boxes,); 1, pedestrians, in files that have none.
    visibilities: share that nothing hides, float (boxes,); 1 likewise.
    left_out: how many lines had a box that is not finite or has no area.
  """

  frames: np.ndarray
  ids: np.ndarray
  boxes: np.ndarray
  confidences: np.ndarray
  classes: np.ndarray
  visibilities: np.ndarray
  left_out: int = 0

  def where(self, chosen: np.ndarray) -> 'Boxes':
    """Those of a mask, or of places in order."""
    return Boxes(*(column[chosen] for column in self[:6]), self.left_out)

  def by_frame(self, length: int) -> list[np.ndarray]:
    """Places of the boxes of frames 1 to `length`."""
    edges = np.searchsorted(self.frames, np.arange(1, length + 2))
    return [np.arange(a, b) for a, b in itertools.pairwise(edges)]


class Info(NamedTuple):
  """What seqinfo.ini says of a sequence.

  Attributes:
    name: of the sequence.
    length: frames.
    width: of a picture, in pixels.
    height: likewise.
    rate: frames a second.
    assumed: what is not from a file.
  """

  name: str
  length: int
  width: int
  height: int
  rate: float
  assumed: tuple[str, ...] = ()


def make(
  frames, boxes, *, ids=None, confidences=None, classes=None, visibilities=None
) -> Boxes:
  """Boxes from columns; sorts them by frame, and leaves out what is no box.

  Args:
    frames: int (boxes,), from 1.
    boxes: left, top, width, height in pixels, (boxes, 4).
    ids: int (boxes,); -1 if None.
    confidences: (boxes,); 1 if None.
    classes: int (boxes,); 1 if None.
    visibilities: (boxes,); 1 if None.

  Returns:
    `Boxes`.
  """
  frames = np.asarray(frames, np.int64).reshape(-1)
  count = len(frames)
  boxes = np.asarray(boxes, np.float64).reshape(count, 4)
  full = lambda given, value, kind: (
    np.full(count, value, kind) if given is None else np.asarray(given, kind)
  )
  found = Boxes(
    frames,
    full(ids, -1, np.int64),
    boxes,
    full(confidences, 1.0, np.float64),
    full(classes, PEDESTRIAN, np.int64),
    full(visibilities, 1.0, np.float64),
  )
  fine = np.isfinite(boxes).all(axis=1) & (boxes[:, 2:] > 0).all(axis=1)
  fine &= np.isfinite(found.confidences)
  order = np.argsort(frames, kind='stable')
  kept = found.where(order[fine[order]])
  return kept._replace(left_out=int(np.sum(~fine)))


def _number(text, where, what):
  try:
    return float(text)
  except ValueError:
    raise harness.DamagedDataError(
      f'{where}: {text.strip()!r} is no number, where the {what} should be.'
    ) from None


def _whole(text, where, what, least):
  number = _number(text, where, what)
  if not (number == np.floor(number) and least <= number < 2**31):
    raise harness.DamagedDataError(
      f'{where}: the {what} is a whole number of at least {least}, got '
      f'{text.strip()}.'
    )
  return int(number)


def read_boxes(path: files.Path, *, identities: bool) -> Boxes:
  """Reads detections, a truth or a result of MOTChallenge.

  Args:
    path: of the file, which may be gzipped.
    identities: whether it has identities: a truth or a result. Else all are -1.

  Returns:
    `Boxes`. An empty file has none.

  Raises:
    MissingDataError: if there is no such file.
    DamagedDataError: if a line is not in the format, which is named; if boxes
      are shares of the picture, or frames are time stamps.
  """
  path = pathlib.Path(path)
  rows: list[tuple] = []
  lines: list[int] = []
  for number, line in enumerate(sources.read_lines(path, 'file of boxes'), 1):
    if not line.strip():
      continue
    where = f'{path}, line {number}'
    words = line.split(',') if ',' in line else line.split()
    if len(words) < 7:
      raise harness.DamagedDataError(
        f'{where} has {len(words)} numbers; a box has at least 7: frame, '
        'identity, left, top, width, height, confidence.'
      )
    known = len(words) in (8, 9)  # Ten are of 2D MOT 2015, with the world's.
    rows.append(
      (
        _whole(words[0], where, 'frame', 1),
        _whole(words[1], where, 'identity', -1) if identities else -1,
        *(_number(w, where, 'box') for w in words[2:6]),
        _number(words[6], where, 'confidence'),
        _whole(words[7], where, 'class', -1) if known else PEDESTRIAN,
        _number(words[8], where, 'visibility') if len(words) == 9 else 1.0,
      )
    )
    lines.append(number)
  table = np.array(rows, np.float64).reshape(-1, 9)
  if identities:
    _check_unique(path, table, lines)
  # A class of -1 is one that the file does not tell.
  classes = np.where(table[:, 7] < 0, PEDESTRIAN, table[:, 7])
  boxes = make(
    table[:, 0],
    table[:, 2:6],
    ids=table[:, 1],
    confidences=table[:, 6],
    classes=classes,
    visibilities=table[:, 8],
  )
  _check_pixels(path, boxes)
  _check_frames(path, boxes)
  return boxes


def _check_pixels(path: pathlib.Path, boxes: Boxes) -> None:
  """Raises DamagedDataError for boxes in shares of the picture."""
  if len(boxes.frames) and boxes.boxes[:, 2:].max() <= 1:
    raise harness.DamagedDataError(
      f'{path}: no box is wider or higher than 1, so they are shares of the '
      'picture, and pixels are needed: multiply left and width by the width of '
      'the picture, top and height by its height.'
    )


def _check_frames(path: pathlib.Path, boxes: Boxes) -> None:
  """Raises DamagedDataError for numbers of frames that do not count them."""
  frames = np.unique(boxes.frames)
  if not len(frames):
    return
  empty = int(frames[-1]) - len(frames)
  if empty > _MAX_EMPTY:
    raise harness.DamagedDataError(
      f'{path}: {empty:,} of the {frames[-1]:,} frames have no box, more than '
      f'{_MAX_EMPTY:,}: the first column numbers the pictures from 1. Replace '
      'time stamps by these numbers, or split a longer recording.'
    )


def _check_unique(path, table, lines):
  pairs = table[:, :2].astype(np.int64)
  _, first, inverse = np.unique(
    pairs, axis=0, return_index=True, return_inverse=True
  )
  again = np.flatnonzero(first[inverse.reshape(-1)] != np.arange(len(pairs)))
  if again.size:
    frame, identity = pairs[again[0]]
    raise harness.DamagedDataError(
      f'{path}, line {lines[again[0]]}: identity {identity} stands twice in '
      f'frame {frame}; the first is in line '
      f'{lines[first[inverse.reshape(-1)[again[0]]]]}.'
    )


def write_boxes(path: files.Path, found: Boxes) -> None:
  """Writes a result, or detections, in the format of MOTChallenge.

  Args:
    path: of the file.
    found: boxes; what a truth has beside is not written.
  """
  rows = zip(found.frames, found.ids, found.boxes, found.confidences)
  files.write_text(
    path,
    ''.join(
      f'{frame},{identity},{",".join(f"{x:.2f}" for x in box)},{sure:.4g},'
      '-1,-1,-1\n'
      for frame, identity, box, sure in rows
    ),
  )


def read_info(folder: files.Path, *found: Boxes) -> Info:
  """What seqinfo.ini says, or what boxes say where there is none.

  Args:
    folder: of the sequence.
    *found: its boxes, for what is not told.

  Returns:
    `Info`; `assumed` names what the file did not say.

  Raises:
    DamagedDataError: if the file says something that is no number above zero,
      or boxes lie behind the last frame.
  """
  folder = pathlib.Path(folder)
  path = folder / 'seqinfo.ini'
  given: dict[str, str] = {}
  if path.exists():
    parser = configparser.ConfigParser()
    with harness.parsing(path, 'seqinfo.ini'):
      parser.read_string(path.read_text(encoding='utf-8-sig'))
      given = dict(parser['Sequence'])
  last = max((int(b.frames[-1]) for b in found if len(b.frames)), default=1)
  ends = [(b.boxes[:, :2] + b.boxes[:, 2:]).max(0) for b in found if len(b[0])]
  right, low = np.max([*ends, (1, 1)], axis=0)
  wanted = {
    'seqLength': last,
    'imWidth': int(np.ceil(right)),
    'imHeight': int(np.ceil(low)),
    'frameRate': _RATE,
  }
  values = []
  for name, otherwise in wanted.items():
    text = given.get(name.lower())
    if text is None:
      values.append(otherwise)
      continue
    number = _number(text, f'{path}, {name}', 'number')
    if not (np.isfinite(number) and number > 0):
      raise harness.DamagedDataError(f'{path}: {name} is above 0, got {text}.')
    values.append(number if name == 'frameRate' else int(number))
  length, width, height, rate = values
  if length < last:
    raise harness.DamagedDataError(
      f'{path}: seqLength is {length}, but there is a box in frame {last}.'
    )
  assumed = tuple(name for name in wanted if name.lower() not in given)
  name = given.get('name') or folder.name
  return Info(name, length, width, height, float(rate), assumed)


def find_sequence(data_dir: files.Path | None, name: str) -> pathlib.Path:
  """The folder of a sequence, by its name, with or without a detector's.

  Raises:
    MissingDataError: if there is none; says where to get it.
  """
  return harness.find(
    data_dir,
    [name + end for end in _ENDS],
    folders=_FOLDERS,
    advice=_ADVICE,
    is_folder=True,
  )


def find_file(
  data_dir: files.Path | None, name: str, *paths: str
) -> pathlib.Path:
  """A file of a sequence, wherever in a folder of data sets it is.

  Args:
    data_dir: folder of data sets.
    name: of the sequence.
    *paths: under which the file goes in the sequence's folder.

  Returns:
    The first that is there.

  Raises:
    MissingDataError: if there is none; says where to get it.
  """
  names = [f'{name}/{path}' for path in paths]
  return harness.find(data_dir, names, folders=_FOLDERS, advice=_ADVICE)


def read_truth(folder: files.Path) -> Boxes:
  """Reads the truth of a sequence from its folder; see `read_boxes`."""
  places = ('gt/gt.txt', 'gt/gt.txt.gz', 'gt.txt')
  path = harness.find(folder, places, advice=_ADVICE)
  return read_boxes(path, identities=True)
