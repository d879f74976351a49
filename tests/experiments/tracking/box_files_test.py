"""Boxes of KITTI, COCO and CSV: the same boxes in every format."""

import json

import numpy as np
import pytest

from experiments import harness
from experiments.tracking import box_files, mot_files

# Frame from 1, class, box, confidence.
ROWS = (
  (1, 'Car', (10.0, 20.0, 30.0, 40.0), 0.9),
  (1, 'Pedestrian', (100.0, 20.0, 15.5, 40.25), 0.5),
  (3, 'Car', (12.0, 21.0, 30.0, 40.0), 0.75),
)
IDS = (4, 1, 4)
ENDINGS = ('kitti.txt', 'coco.json', 'table.csv')


def named(kind, first):
  frames, classes, boxes, confidences = zip(*ROWS)
  names = ('Car', 'Pedestrian')
  made = mot_files.make(
    frames,
    boxes,
    ids=IDS,
    confidences=confidences,
    classes=[names.index(name) for name in classes],
  )
  return box_files.Named(made, names, first, kind)


def write(path):
  kind = path.name.partition('.')[0]
  first = {'kitti': 0, 'coco': 70, 'table': 1}[kind]
  kind = {'table': 'csv'}.get(kind, kind)
  box_files.write(path, named(kind, first))
  return kind, first


@pytest.mark.parametrize('ending', ENDINGS)
def test_what_is_written_is_read(tmp_path, ending):
  kind, first = write(tmp_path / ending)
  read = box_files.read(tmp_path / ending)
  expected = named(kind, first)
  assert (read.names, read.first) == (expected.names, first)
  assert read.kind == kind
  for name in ('frames', 'boxes', 'confidences', 'classes'):
    np.testing.assert_allclose(
      getattr(read.boxes, name), getattr(expected.boxes, name), atol=0.006
    )


def test_files_by_hand(tmp_path):
  kitti = tmp_path / 'a.txt'
  kitti.write_text(
    '0 -1 Car 0 0 -10 10 20 40 60 -1 -1 -1 -1000 -1000 -1000 -10 0.5\n'
    '2 -1 DontCare -1 -1 -10 1 2 4 6 -1 -1 -1 -1000 -1000 -1000 -10\n'
  )
  coco = tmp_path / 'b.json'
  coco.write_text(
    json.dumps(
      [
        {
          'image_id': 9,
          'category_id': 3,
          'bbox': [10, 20, 30, 40],
          'score': 0.5,
        }
      ]
    )
  )
  table = tmp_path / 'c.csv'
  table.write_text('frame,x,y,w,h,score\r\n0,10,20,30,40,0.5\r\n')
  for path, name in ((kitti, 'Car'), (coco, '3'), (table, '')):
    boxes, names, *_ = box_files.read(path)
    assert names == (name,)
    assert boxes.boxes.tolist() == [[10, 20, 30, 40]]
    assert boxes.frames.tolist() == [1]
    assert boxes.confidences.tolist() == [0.5]


def test_identities_and_numbers_of_frames_are_written(tmp_path):
  write(tmp_path / 'coco.json')
  entries = json.loads((tmp_path / 'coco.json').read_text())
  assert [one['track_id'] for one in entries] == list(IDS)
  assert [one['image_id'] for one in entries] == [70, 70, 72]
  write(tmp_path / 'kitti.txt')
  lines = (tmp_path / 'kitti.txt').read_text().splitlines()
  assert [line.split()[:3] for line in lines] == [
    ['0', '4', 'Car'],
    ['0', '1', 'Pedestrian'],
    ['2', '4', 'Car'],
  ]


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('a.json', '{"a": 1}', 'no list of boxes'),
    ('a.json', '[1]', 'entry 0 .*image_id and bbox'),
    ('a.json', '[{"image_id": 1, "bbox": [1, 2, 3]}]', 'entry 0'),
    ('a.json', '[{"image_id": 1.5, "bbox": [1, 2, 3, 4]}]', 'whole number'),
    ('a.json', '[' * 99_999, 'damaged|COCO'),
    ('a.csv', 'frame,left,top,width\n', 'line 1: the header has no height'),
    ('a.csv', 'frame,x,y,w,h\n1,2,3,4\n', 'line 2: it has 4 cells'),
    ('a.csv', 'frame,x,y,w,h\n1,a,3,4,5\n', "line 2: the left 'a'"),
    ('a.csv', 'frame,x,y,w,h\n1,.1,.1,.4,.5\n', 'in pixels'),
    ('a.csv', 'frame,x,y,w,h\n1,1,1,4,5\n999999999,1,1,4,5\n', 'frames'),
    (
      'a.txt',
      '0 -1 Car 0 0 -10 a 20 40 60 -1 -1 -1 -1000 -1000 -1000 -10\n',
      "line 1: the corner 'a'",
    ),
  ],
)
def test_broken_files_name_the_place(tmp_path, name, content, message):
  path = tmp_path / name
  path.write_text(content)
  with pytest.raises(harness.DamagedDataError, match=message):
    box_files.read(path)


def test_other_endings_are_refused_before_any_work():
  with pytest.raises(harness.SettingsError, match=r'ends in \.txt'):
    box_files.check_ending('tracks.xml')
