"""Files of boxes are read and written; errors name file and line."""

import gzip
import os

import numpy as np
import pytest

from experiments import harness
from experiments.tracking import mot_files

TRUTH = """\
2,7,10,20,30,60,1,1,0.5
1,7,9,20,30,60,1,1,1
1,8,50,20,30,60,0,7,1
4,8,52.5,20,30,60,1,1,0.25
"""


def data_folder():
  """The folder of data sets, or the test is skipped."""
  folder = os.environ.get('BILEVEL_JAX_DATA')
  if not folder or not os.path.isdir(f'{folder}/mot'):
    pytest.skip('BILEVEL_JAX_DATA names no folder with mot/MOT17_gt.')
  return folder


def write(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  return path


def test_a_truth_is_sorted_by_frame_and_keeps_empty_frames(tmp_path):
  folder = tmp_path / 'train' / 'MOT17-99-FRCNN'
  write(folder / 'gt/gt.txt', TRUTH)
  write(
    folder / 'seqinfo.ini',
    '[Sequence]\nname=MOT17-99-FRCNN\nseqLength=6\nimWidth=640\nimHeight=480\n'
    'frameRate=25\n',
  )
  assert mot_files.find_sequence(tmp_path, 'MOT17-99') == folder
  found = mot_files.read_truth(folder)
  assert found.frames.tolist() == [1, 1, 2, 4]
  assert found.ids.tolist() == [7, 8, 7, 8]
  assert found.classes.tolist() == [1, 7, 1, 1]
  assert found.visibilities.tolist() == [1, 1, 0.5, 0.25]
  assert found.boxes[3].tolist() == [52.5, 20, 30, 60]
  info = mot_files.read_info(folder, found)
  assert info == mot_files.Info('MOT17-99-FRCNN', 6, 640, 480, 25.0)
  rows = found.by_frame(info.length)
  assert [row.tolist() for row in rows] == [[0, 1], [2], [], [3], [], []]
  # A gzipped file is the same.
  packed = folder / 'gt/gt.txt.gz'
  packed.write_bytes(gzip.compress(TRUTH.encode()))
  (folder / 'gt/gt.txt').unlink()
  np.testing.assert_array_equal(mot_files.read_truth(folder).boxes, found.boxes)


def test_invalid_boxes_are_left_out_and_counted(tmp_path):
  path = write(
    tmp_path / 'det.txt',
    '1,-1,1,2,3,4,0.9\n1,-1,nan,2,3,4,0.9\n2,-1,1,2,0,4,0.9,-1,-1,-1\n'
    '3 -1 1 2 3 inf 0.9\n\n3,-1,1,2,3,-4,1\n2,-1,5,6,7,8,0.1\n',
  )
  found = mot_files.read_boxes(path, identities=False)
  assert found.frames.tolist() == [1, 2]
  assert found.left_out == 4
  assert found.ids.tolist() == [-1, -1]
  assert mot_files.read_boxes(
    write(tmp_path / 'empty.txt', ''), identities=True
  ).boxes.shape == (0, 4)


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('1,2,3', 'line 2: it has 3 numbers; a box has at least 7'),
    ('1,2,3,4,x,6,7', "line 2: the box coordinate 'x' is not a number"),
    ('0,2,3,4,5,6,7', 'line 2: the frame must be a whole number of at least 1'),
    ('1.5,2,3,4,5,6,7', 'line 2: the frame must be a whole number'),
    ('nan,2,3,4,5,6,7', 'line 2: the frame must be a whole number'),
    ('1,2.5,3,4,5,6,7', 'line 2: the identity must be a whole number'),
    (
      '1,7,3,4,5,6,7',
      'line 2: identity 7 is twice in frame 1, first in line 1',
    ),
  ],
)
def test_an_invalid_line_is_reported_by_number(tmp_path, line, message):
  path = write(tmp_path / 'gt.txt', f'1,7,1,2,3,4,1\n{line}\n')
  with pytest.raises(harness.DamagedDataError, match=message):
    mot_files.read_boxes(path, identities=True)


def test_shares_of_the_picture_are_refused(tmp_path):
  """Two decimals would destroy shares; single boxes below 1 are allowed."""
  text = '1,-1,0.1,0.2,0.05,0.1,0.9\n2,-1,0.5,0.98,0.031,0.034,0.8\n'
  path = write(tmp_path / 'det.txt', text)
  with pytest.raises(harness.DamagedDataError, match='shares of the picture'):
    mot_files.read_boxes(path, identities=False)
  write(path, text + '3,-1,5,6,7,8,0.9\n')
  assert len(mot_files.read_boxes(path, identities=False).frames) == 3


def test_time_stamps_are_refused(tmp_path):
  """Seconds of a clock are refused; a long sparse recording is not."""
  row = ',-1,10,20,30,40,0.9\n'
  path = write(
    tmp_path / 'det.txt', f'1700000000{row}1700000001{row}1700000002{row}'
  )
  with pytest.raises(
    harness.DamagedDataError, match='must count frames from 1'
  ) as e:
    mot_files.read_boxes(path, identities=False)
  assert '1,699,999,999 of the 1,700,000,002 frames' in str(e.value)
  write(path, f'5{row}900000{row}')
  found = mot_files.read_boxes(path, identities=False)
  assert found.frames.tolist() == [5, 900_000]


def test_values_missing_in_seqinfo_are_inferred_from_boxes(tmp_path):
  boxes = mot_files.make([1, 5], [[0, 0, 10, 10], [90.5, 40, 10, 10]])
  info = mot_files.read_info(tmp_path, boxes)
  assert info[1:5] == (5, 101, 50, 30.0)
  assert len(info.assumed) == 4 and info.name == tmp_path.name
  for text, message in (
    (
      '[Sequence]\nseqLength=4\n',
      'seqLength: it is 4, but there is a box in fra',
    ),
    ('[Sequence]\nimWidth=wide\n', "imWidth: the value 'wide' is not a number"),
    (
      '[Sequence]\nimHeight=0\n',
      'imHeight: the value must be a number of at least 1',
    ),
    ('seqLength=4\n', 'no seqinfo.ini'),
  ):
    write(tmp_path / 'seqinfo.ini', text)
    with pytest.raises(harness.DamagedDataError, match=message):
      mot_files.read_info(tmp_path, boxes)


def test_results_are_written_and_read(tmp_path):
  rng = np.random.default_rng(0)
  boxes = mot_files.make(
    [3, 1, 1],
    rng.uniform(1, 99, (3, 4)).round(2),
    ids=[5, 6, 7],
    confidences=[0.25, 1, 0.5],
  )
  mot_files.write_boxes(tmp_path / 'out.txt', boxes)
  again = mot_files.read_boxes(tmp_path / 'out.txt', identities=True)
  for one, two in zip(boxes, again):
    np.testing.assert_array_equal(one, two)


def test_missing_data_says_where_to_get_it(tmp_path):
  with pytest.raises(harness.MissingDataError, match='trackers download mot17'):
    mot_files.find_sequence(tmp_path, 'MOT17-09')
  with pytest.raises(harness.MissingDataError, match='there is no file'):
    mot_files.read_boxes(tmp_path / 'none.txt', identities=True)


def test_the_real_sequences_are_read():
  folder = mot_files.find_sequence(data_folder(), 'MOT17-09')
  truth = mot_files.read_truth(folder)
  info = mot_files.read_info(folder, truth)
  assert info == mot_files.Info('MOT17-09-FRCNN', 525, 1920, 1080, 30.0)
  assert truth.left_out == 0 and len(truth.frames) == 10_411
