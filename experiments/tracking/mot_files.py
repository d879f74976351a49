"""Reads and writes files of boxes in the MOTChallenge format.

Each line is one box: `frame, identity, left, top, width, height, confidence,
...`. Detections (`det/det.txt`) have the identity -1. In the truth
(`gt/gt.txt`) a confidence of 0 marks boxes that do not count; from MOT16 on,
`class, visibility` follow. 2D MOT 2015 and results have three world coordinates
there, which are ignored. `seqinfo.ini` in the folder of the sequence has its
length, picture size and frame rate.

Irregular files:

| in a file | result |
|---|---|
| frames out of order | sorted; boxes of a frame keep their order |
| a frame without boxes | kept, up to the length in seqinfo.ini |
| a box that is not finite, or without width or height | left out, counted |
| an identity twice in a frame of a truth or a result | error, with the line |
| too few numbers in a line, no number, a frame below 1 | error, with the line |
| all boxes within 0 and 1: shares of the picture | error |
| a million frames without a box, such as time stamps | error |
| a coordinate or a picture size beyond 10 million pixels | error |
| a visibility outside of -1 to 1 | error |
| no seqinfo.ini | length and size cover all boxes, rate is 30 |
"""

import configparser
import functools
import itertools
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments import harness
from experiments.harness.data import reading
from experiments.harness.store import files

PEDESTRIAN = 1
_RATE = 30.0
# Frames without a box: nine hours at 30 frames/s.
_MAX_EMPTY = 1_000_000
# Largest coordinate and picture size, in pixels, and largest frame rate.
_MAX_PIXELS, _MAX_RATE = 10_000_000, 100_000.0
# Bytes of a seqinfo.ini, and what to do about a wrong one.
_MAX_INFO = 2**20
_MEND = 'correct it, or remove the file to infer its values from the boxes'
# Folders below the data folder that may have the folder of a sequence.
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
    frames: int (boxes,), from 1, sorted.
    ids: int (boxes,); -1 without identities.
    boxes: left, top, width, height in pixels, float (boxes, 4).
    confidences: float (boxes,); in a truth, 0 for boxes that do not count.
    classes: int (boxes,); 1, pedestrians, in files without classes.
    visibilities: visible share, float (boxes,); 1 in files without it.
    left_out: number of boxes that were not finite or had no area.
  """

  frames: np.ndarray
  ids: np.ndarray
  boxes: np.ndarray
  confidences: np.ndarray
  classes: np.ndarray
  visibilities: np.ndarray
  left_out: int = 0

  def where(self, index: np.ndarray) -> 'Boxes':
    """Selects boxes by a mask or by sorted indices."""
    return Boxes(*(column[index] for column in self[:6]), self.left_out)

  def by_frame(self, length: int) -> list[np.ndarray]:
    """Indices of the boxes of each frame, from 1 to `length`."""
    edges = np.searchsorted(self.frames, np.arange(1, length + 2))
    return [np.arange(a, b) for a, b in itertools.pairwise(edges)]


class Info(NamedTuple):
  """Properties of a sequence from seqinfo.ini.

  Attributes:
    name: of the sequence.
    length: frames.
    width: of a picture, in pixels.
    height: of a picture, in pixels.
    rate: frames/s.
    assumed: names of the values that the file lacks.
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
  """Makes boxes from columns: sorts by frame and drops invalid boxes.

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
  full = lambda column, value, kind: (
    np.full(count, value, kind) if column is None else np.asarray(column, kind)
  )
  table = Boxes(
    frames,
    full(ids, -1, np.int64),
    boxes,
    full(confidences, 1.0, np.float64),
    full(classes, PEDESTRIAN, np.int64),
    full(visibilities, 1.0, np.float64),
  )
  valid = np.isfinite(boxes).all(axis=1) & (boxes[:, 2:] > 0).all(axis=1)
  valid &= np.isfinite(table.confidences)
  order = np.argsort(frames, kind='stable')
  table = table.where(order[valid[order]])
  return table._replace(left_out=int(np.sum(~valid)))


def join(parts: Sequence[Boxes]) -> Boxes:
  """Joins boxes of the same sequence, sorted by frame."""
  columns = [np.concatenate(column) for column in zip(*(p[:6] for p in parts))]
  joined = Boxes(*columns, left_out=sum(p.left_out for p in parts))
  return joined.where(np.argsort(joined.frames, kind='stable'))


def read_boxes(path: files.Path, *, identities: bool) -> Boxes:
  """Reads detections, a truth or a result in the MOTChallenge format.

  Args:
    path: the file, gzipped or not.
    identities: whether to read identities, of a truth or a result; otherwise
      all are -1.

  Returns:
    `Boxes`, empty for an empty file.

  Raises:
    MissingDataError: if the file is missing.
    DamagedDataError: if a line is not in the format (gives its number), boxes
      are shares of the picture, or frames are time stamps.
  """
  path = pathlib.Path(path)
  rows: list[tuple] = []
  lines: list[int] = []
  for count, line in enumerate(reading.read_lines(path, 'file of boxes'), 1):
    if not line.strip():
      continue
    where = f'{path}, line {count}'
    cells = line.split(',') if ',' in line else line.split()
    if len(cells) < 7:
      raise reading.damaged(
        where,
        f'it has {len(cells)} numbers; a box has at least 7: frame, identity, '
        'left, top, width, height, confidence',
        reading.CORRECT,
      )
    has_class = len(cells) in (8, 9)  # 2D MOT 2015 has ten cells.
    number = functools.partial(reading.parse_number, where=where)
    integer = functools.partial(number, high=2**31 - 1, integer=True)
    # Boxes that are not finite are left out.
    size = functools.partial(
      number, low=-_MAX_PIXELS, high=_MAX_PIXELS, infinite=True
    )
    rows.append(
      (
        integer(cells[0], what='frame', low=1),
        integer(cells[1], what='identity', low=-1) if identities else -1,
        *(size(x, what='box coordinate') for x in cells[2:6]),
        size(cells[6], what='confidence'),
        integer(cells[7], what='class', low=-1) if has_class else PEDESTRIAN,
        number(cells[8], what='visibility', low=-1, high=1)
        if len(cells) == 9
        else 1.0,
      )
    )
    lines.append(count)
  table = np.array(rows, np.float64).reshape(-1, 9)
  if identities:
    _check_unique(path, table, lines)
  # A class of -1 is unknown.
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
  if len(boxes.frames):
    last = int(np.flatnonzero(table[:, 0] == boxes.frames[-1])[0])
    _check_frames(f'{path}, line {lines[last]}', boxes)
  return boxes


def check(path: files.Path, boxes: Boxes) -> None:
  """Checks that boxes are in pixels, and that frames are numbered.

  Raises:
    DamagedDataError: if not; says how to convert them.
  """
  _check_pixels(pathlib.Path(path), boxes)
  if len(boxes.frames):
    _check_frames(str(path), boxes)


def _check_pixels(path: pathlib.Path, boxes: Boxes) -> None:
  """Raises DamagedDataError if boxes are shares of the picture."""
  if len(boxes.frames) and boxes.boxes[:, 2:].max() <= 1:
    raise harness.DamagedDataError(
      f'{path}: no box is wider or higher than 1: boxes must be in pixels, not '
      'in shares of the picture. Multiply left and width by the picture width, '
      'top and height by its height.'
    )


def _check_frames(where: str, boxes: Boxes) -> None:
  """Raises DamagedDataError if frame numbers look like time stamps."""
  frames = np.unique(boxes.frames)
  empty = int(frames[-1]) - len(frames)
  if empty > _MAX_EMPTY:
    raise harness.DamagedDataError(
      f'{where}: {empty:,} of the {frames[-1]:,} frames have no box, more than '
      f'{_MAX_EMPTY:,}: the first column must count frames from 1. Replace '
      'time stamps by frame numbers, or split a longer recording.'
    )


def _check_unique(path, table, lines):
  pairs = table[:, :2].astype(np.int64)
  _, first, inverse = np.unique(
    pairs, axis=0, return_index=True, return_inverse=True
  )
  first = first[inverse.reshape(-1)]
  repeated = np.flatnonzero(first != np.arange(len(pairs)))
  if repeated.size:
    row = repeated[0]
    frame, identity = pairs[row]
    raise harness.DamagedDataError(
      f'{path}, line {lines[row]}: identity {identity} is twice in frame '
      f'{frame}, first in line {lines[first[row]]}; each identity has one box '
      'per frame: remove one of them.'
    )


def write_boxes(path: files.Path, boxes: Boxes) -> None:
  """Writes a result, or detections, in the MOTChallenge format.

  Args:
    path: the file.
    boxes: without their classes and visibilities.
  """
  rows = zip(boxes.frames, boxes.ids, boxes.boxes, boxes.confidences)
  files.write_text(
    path,
    ''.join(
      f'{frame},{identity},{",".join(f"{x:.2f}" for x in box)},'
      f'{confidence:.4g},-1,-1,-1\n'
      for frame, identity, box, confidence in rows
    ),
  )


def read_info(folder: files.Path, *boxes: Boxes) -> Info:
  """Reads seqinfo.ini; infers missing values from boxes.

  Args:
    folder: of the sequence.
    *boxes: of the sequence.

  Returns:
    `Info`; `assumed` names the inferred values.

  Raises:
    DamagedDataError: if a value is not a number above 0, or a box is after the
      last frame.
  """
  folder = pathlib.Path(folder)
  path = folder / 'seqinfo.ini'
  content: dict[str, str] = {}
  if os.path.lexists(path):
    text = reading.read_small(path, 'seqinfo.ini', _MAX_INFO)
    # Without references of values to others, which could be endless.
    parser = configparser.ConfigParser(interpolation=None)
    with harness.parsing(path, 'seqinfo.ini'):
      parser.read_string(reading.decode(text, path, first=True))
      if 'Sequence' not in parser:
        raise ValueError('the section [Sequence] is missing')
      content = dict(parser['Sequence'])
  last = max((int(b.frames[-1]) for b in boxes if len(b.frames)), default=1)
  ends = [(b.boxes[:, :2] + b.boxes[:, 2:]).max(0) for b in boxes if len(b[0])]
  right, low = np.max([*ends, (1, 1)], axis=0)
  inferred = {
    'seqLength': last,
    'imWidth': int(np.ceil(right)),
    'imHeight': int(np.ceil(low)),
    'frameRate': _RATE,
  }
  values = []
  for name, default in inferred.items():
    text = content.get(name.lower())
    if text is None:
      values.append(default)
      continue
    is_rate = name == 'frameRate'
    number = reading.parse_number(
      text,
      f'{path}, {name}',
      'value',
      1 / _MAX_RATE if is_rate else 1,
      _MAX_RATE if is_rate else _MAX_PIXELS,
      remedy=_MEND,
    )
    values.append(number if is_rate else int(number))
  length, width, height, rate = values
  where = f'{path}, seqLength'
  if length < last:
    raise reading.damaged(
      where, f'it is {length}, but there is a box in frame {last}', _MEND
    )
  if length - last > _MAX_EMPTY:
    raise reading.damaged(
      where,
      f'{length:,} frames, but the last box is in frame {last:,}: more than '
      f'{_MAX_EMPTY:,} have none',
      _MEND,
    )
  assumed = tuple(name for name in inferred if name.lower() not in content)
  name = reading.shorten(content.get('name') or folder.name, 200)
  return Info(name, length, width, height, float(rate), assumed)


def find_sequence(data_dir: files.Path | None, name: str) -> pathlib.Path:
  """Finds the folder of a sequence by its name, with or without a detector.

  Raises:
    MissingDataError: if it is missing; says where to get it.
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
  """Finds a file of a sequence in the data folder.

  Args:
    data_dir: the data folder.
    name: of the sequence.
    *paths: candidates within the sequence's folder.

  Returns:
    The first that exists.

  Raises:
    MissingDataError: if none exists; says where to get it.
  """
  names = [f'{name}/{path}' for path in paths]
  return harness.find(data_dir, names, folders=_FOLDERS, advice=_ADVICE)


def read_truth(folder: files.Path) -> Boxes:
  """Reads the truth of a sequence from its folder; see `read_boxes`."""
  names = ('gt/gt.txt', 'gt/gt.txt.gz', 'gt.txt')
  path = harness.find(folder, names, advice=_ADVICE)
  return read_boxes(path, identities=True)
