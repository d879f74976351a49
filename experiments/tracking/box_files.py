"""Files of boxes with classes: MOTChallenge, KITTI, COCO and CSV.

| ending | format | a box |
|---|---|---|
| .txt, commas | MOTChallenge, see `mot_files` | no classes |
| .txt, spaces | labels of KITTI | type, left, top, right, bottom, score |
| .json | results of COCO | `image_id`, `category_id`, `bbox`, `score` |
| .csv | a header | `frame`, `left`, `top`, `width`, `height` |

In COCO, images are frames in the order of their numbers. A CSV file may also
have `confidence` and `class`; `x`, `y`, `w`, `h` and `score` are known, too.
"""

import csv
import functools
import io
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments import harness
from experiments.harness.data import reading
from experiments.harness.store import files
from experiments.tracking import mot_files

_MOST_JSON = 2**28
_LARGEST = 2**31 - 1
_OTHER_NAMES = {
  'x': 'left',
  'y': 'top',
  'w': 'width',
  'h': 'height',
  'score': 'confidence',
}
_CORNERS = ('left', 'top', 'width', 'height')
_CORRECT_ENTRY = 'correct the entry'


class Named(NamedTuple):
  """Boxes, and the names of their classes.

  Attributes:
    boxes: the boxes; `classes` are indices of `names`, frames count from 1.
    names: of the classes.
    first: number of the first frame in the file.
    kind: 'mot', 'kitti', 'coco' or 'csv'.
  """

  boxes: mot_files.Boxes
  names: tuple[str, ...]
  first: int
  kind: str


def read(path: files.Path) -> Named:
  """Reads detections; the ending and the first line tell the format.

  Raises:
    MissingDataError: if the file is missing.
    DamagedDataError: if a line or an entry is not in the format; names it.
  """
  path = pathlib.Path(path)
  ending = pathlib.Path(path.name.removesuffix('.gz')).suffix.lower()
  if ending == '.json':
    return _collect(path, 'coco', _coco_rows(path))
  if ending == '.csv':
    return _collect(path, 'csv', _csv_rows(path))
  lines = reading.read_lines(path, 'file of boxes')
  first = next((line for line in lines if line.strip()), '')
  if ',' not in first and len(first.split()) >= 17:
    return _collect(path, 'kitti', _kitti_rows(path))
  boxes = mot_files.read_boxes(path, identities=False)
  one = boxes._replace(classes=np.zeros_like(boxes.classes))
  return Named(one, ('',), 1, 'mot')


# Frame, class, left, top, width, height, confidence.
_Row = tuple[int, str, float, float, float, float, float]


def _parsers(where: str) -> tuple[Callable[..., int], Callable[..., float]]:
  """Parsers of frame numbers, and of coordinates and scores."""
  number = functools.partial(reading.parse_number, where=where)
  integer = functools.partial(number, low=0, high=_LARGEST, integer=True)
  return integer, functools.partial(number, infinite=True)


def _kitti_rows(path: pathlib.Path) -> Iterable[_Row]:
  for number, line in enumerate(reading.read_lines(path, 'KITTI file'), 1):
    cells = line.split()
    if not cells:
      continue
    where = f'{path}, line {number}'
    if len(cells) < 17:
      raise reading.damaged(
        where,
        f'it has {len(cells)} cells; a box of KITTI has 17, and a score',
        reading.CORRECT,
      )
    integer, real = _parsers(where)
    left, top, right, bottom = (real(x, what='corner') for x in cells[6:10])
    score = real(cells[17], what='score') if len(cells) > 17 else 1.0
    if cells[2] != 'DontCare':
      frame = integer(cells[0], what='frame')
      yield frame, cells[2], left, top, right - left, bottom - top, score


def _coco_rows(path: pathlib.Path) -> Iterable[_Row]:
  content = reading.read_small(path, 'COCO file', _MOST_JSON)
  with reading.parsing(path, 'COCO file', (ValueError, RecursionError)):
    entries = json.loads(content)
  images = None
  if isinstance(entries, Mapping):
    images = _coco_images(path, entries)
    entries = entries.get('annotations')
  if not isinstance(entries, list):
    raise reading.damaged(
      path, 'it is no list of boxes', 'give results of COCO, a list of objects'
    )
  for number, entry in enumerate(entries):
    where = f'{path}, entry {number} (from 0)'
    entry = entry if isinstance(entry, Mapping) else {}
    box = entry.get('bbox')
    if not isinstance(box, list) or len(box) != 4 or 'image_id' not in entry:
      raise reading.damaged(
        where,
        'a box has image_id and bbox, a list of left, top, width and height',
        _CORRECT_ENTRY,
      )
    integer, real = _parsers(where)
    image, category = entry['image_id'], entry.get('category_id', '')
    if images is not None and str(image) not in images:
      raise reading.damaged(
        where, f'no image has the id {reading.shorten(image)}', _CORRECT_ENTRY
      )
    if not isinstance(category, str | int) or isinstance(category, bool):
      raise reading.damaged(
        where,
        f'the category_id {reading.shorten(category)} is no number or name',
        _CORRECT_ENTRY,
      )
    yield (
      integer(str(image), what='image_id'),
      reading.shorten(category),
      *(real(str(x), what='bbox') for x in box),
      real(str(entry.get('score', 1.0)), what='score'),
    )


def _coco_images(
  path: pathlib.Path, content: Mapping[str, Any]
) -> set[str] | None:
  """The ids of a data set's images; None without a list of images."""
  images = content.get('images')
  if images is None:
    return None
  if not isinstance(images, list):
    raise reading.damaged(
      path, 'its images are no list', 'give a list of objects with an id'
    )
  ids: set[str] = set()
  for number, image in enumerate(images):
    name = str(image.get('id')) if isinstance(image, Mapping) else None
    if name is None or name in ids:
      raise reading.damaged(
        f'{path}, image {number} (from 0)',
        'it has no id, or the id of another image',
        'correct the image',
      )
    ids.add(name)
  return ids


def _csv_rows(path: pathlib.Path) -> Iterable[_Row]:
  lines = reading.read_lines(path, 'CSV file')
  with reading.parsing(path, 'CSV file', (csv.Error,)):
    rows = csv.reader(lines, strict=True)
    header = [cell.strip().lower() for cell in next(rows, [])]
    names = [_OTHER_NAMES.get(name, name) for name in header]
    if missing := [n for n in ('frame', *_CORNERS) if n not in names]:
      raise reading.damaged(
        f'{path}, line 1',
        f'the header has no {missing[0]}',
        f'give a header with frame,{",".join(_CORNERS)}',
      )
    if twice := [n for k, n in enumerate(names) if n and n in names[:k]]:
      raise reading.damaged(
        f'{path}, line 1',
        f'two columns are {reading.shorten(twice[0])}',
        'remove one of them',
      )
    for cells in rows:
      if not cells:
        continue
      where = f'{path}, line {rows.line_num}'
      if len(cells) != len(names):
        raise reading.damaged(
          where,
          f'it has {len(cells)} cells, the header {len(names)}',
          reading.CORRECT,
        )
      row = dict(zip(names, cells))
      integer, real = _parsers(where)
      yield (
        integer(row['frame'], what='frame'),
        reading.shorten(row.get('class', '').strip()),
        *(real(row[name], what=name) for name in _CORNERS),
        real(row.get('confidence') or '1', what='confidence'),
      )


def _collect(path: pathlib.Path, kind: str, rows: Iterable[_Row]) -> Named:
  """Makes boxes from rows; frames count from the first one, or from 0."""
  listed = list(rows)
  names = tuple(dict.fromkeys(row[1] for row in listed)) or ('',)
  frames = np.array([row[0] for row in listed], np.int64)
  first = {'kitti': 0, 'csv': int(min(frames, default=1) > 0)}.get(
    kind, int(min(frames, default=1))
  )
  boxes = mot_files.make(
    frames - first + 1,
    [row[2:6] for row in listed],
    confidences=[row[6] for row in listed],
    classes=[names.index(row[1]) for row in listed],
  )
  mot_files.check(path, boxes)
  return Named(boxes, names, first, kind)


def write(path: files.Path, named: Named) -> None:
  """Writes tracked boxes; the ending gives the format.

  Args:
    path: the file; .txt has the format of KITTI for boxes read from it,
      otherwise that of MOTChallenge, which has no classes.
    named: boxes with identities.

  Raises:
    SettingsError: for another ending.
  """
  boxes, names, first, kind = named
  ending = check_ending(path)
  if ending == '.txt' and kind != 'kitti':
    mot_files.write_boxes(path, boxes)
    return
  rows = zip(
    (boxes.frames + first - 1).tolist(),
    boxes.ids.tolist(),
    [names[i] for i in boxes.classes],
    boxes.boxes.round(2).tolist(),
    [float(f'{x:.4g}') for x in boxes.confidences],
  )
  if ending == '.json':
    text = json.dumps(
      [
        {
          'image_id': frame,
          'category_id': int(name) if name.isdecimal() else name,
          'bbox': box,
          'score': score,
          'track_id': identity,
        }
        for frame, identity, name, box, score in rows
      ]
    )
  elif ending == '.csv':
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator='\n')
    writer.writerow(['frame', 'id', 'class', *_CORNERS, 'confidence'])
    for frame, identity, name, box, score in rows:
      writer.writerow([frame, identity, name, *box, score])
    text = buffer.getvalue()
  else:
    text = ''.join(
      f'{frame} {identity} {name} -1 -1 -10 {left:.2f} {top:.2f} '
      f'{left + width:.2f} {top + height:.2f} -1 -1 -1 -1000 -1000 -1000 -10 '
      f'{score:.4g}\n'
      for frame, identity, name, (left, top, width, height), score in rows
    )
  files.write_text(path, text)


def check_ending(path: files.Path) -> str:
  """Returns the ending of a result; raises SettingsError for another one."""
  ending = pathlib.Path(path).suffix.lower()
  if ending not in ('.txt', '.json', '.csv'):
    raise harness.SettingsError(
      f'{path}: the result ends in .txt (MOTChallenge or KITTI), .json (COCO) '
      'or .csv.'
    )
  return ending
