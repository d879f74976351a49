"""Measures of results: small ones by hand, published ones of files."""

import os

import numpy as np
import pytest

from experiments import harness
from experiments.tracking import evaluation, mot_files

pytest.importorskip('trackeval')


def walk(frames, identity, left, **more):
  """A box 10 x 20 in each frame."""
  count = len(frames)
  return mot_files.make(
    frames, [[left, 0, 10, 20]] * count, ids=[identity] * count, **more
  )


def both(*several):
  return mot_files.make(
    *(np.concatenate([getattr(b, f) for b in several]) for f in ('frames',)),
    np.concatenate([b.boxes for b in several]),
    **{
      name: np.concatenate([getattr(b, field) for b in several])
      for name, field in (
        ('ids', 'ids'),
        ('confidences', 'confidences'),
        ('classes', 'classes'),
      )
    },
  )


def test_counts_by_hand():
  truth = both(walk(range(1, 9), 1, 0), walk(range(1, 9), 2, 100))
  # The first switches once, the second is missed in half, two are false.
  result = both(
    walk(range(1, 5), 11, 0),
    walk(range(5, 9), 12, 0),
    walk(range(1, 5), 13, 100),
    walk((7, 8), 14, 300),
  )
  data = evaluation.prepare(truth, result, 9)
  pooled, per_sequence = evaluation.evaluate({'one': data})
  assert per_sequence['one'] == pooled
  assert (pooled.switches, pooled.misses, pooled.false_positives) == (1, 4, 2)
  assert pooled.mota == pytest.approx(100 * (1 - 7 / 16))
  # Four of eight frames of the first identity, and of the second.
  assert pooled.idf1 == pytest.approx(100 * 2 * 8 / (16 + 14))
  # At every threshold 12 of 18 boxes; associations 4/8 and 4/8.
  assert pooled.det_a == pytest.approx(100 * 12 / 18)
  assert pooled.ass_a == pytest.approx(50)
  assert pooled.hota == pytest.approx(100 * np.sqrt(12 / 18 * 0.5))
  twice, _ = evaluation.evaluate({'one': data, 'two': data})
  assert (twice.idf1, twice.switches) == (pytest.approx(pooled.idf1), 2)


def test_distractors_and_unmarked_boxes_do_not_count():
  truth = both(
    walk((1, 2), 1, 0),
    walk((1, 2), 2, 100, classes=[7, 7]),
    walk((1, 2), 3, 200, confidences=[0, 0]),
  )
  result = both(walk((1, 2), 1, 0), walk((1, 2), 2, 100))
  scores, _ = evaluation.evaluate({'one': evaluation.prepare(truth, result, 2)})
  assert (scores.mota, scores.truth) == (100, 2)
  scores, _ = evaluation.evaluate(
    {'one': evaluation.prepare(truth, result, 2, classes=False)}
  )
  assert (scores.mota, scores.truth) == (100, 4)


def test_overlaps_of_boxes():
  one = np.array([[0.0, 0, 10, 10]])
  two = np.array(
    [[0.0, 0, 10, 10], [5, 0, 10, 10], [10, 0, 5, 5], [2, 2, 1, 1]]
  )
  np.testing.assert_allclose(
    evaluation.overlaps(one, two), [[1, 1 / 3, 0, 0.01]]
  )


def test_an_empty_result_is_scored_and_no_sequence_is_an_error():
  truth, none = walk((1, 2), 1, 0), walk((), 1, 0)
  scores, _ = evaluation.evaluate({'one': evaluation.prepare(truth, none, 2)})
  assert (scores.mota, scores.idf1, scores.misses) == (0, 0, 2)
  with pytest.raises(harness.DamagedDataError, match='no sequence'):
    evaluation.evaluate({})


def test_files_are_scored_in_one_command(tmp_path, capsys):
  truth = both(walk((1, 2), 1, 0), walk((1, 2), 2, 100))
  for name in ('gt.txt', 'result.txt'):
    mot_files.write_boxes(tmp_path / name, truth)
  paths = [str(tmp_path / name) for name in ('gt.txt', 'result.txt')]
  assert evaluation.main(paths) == 0
  shown = capsys.readouterr().out.splitlines()
  assert shown[0].startswith('| sequence') and shown[-1].startswith('| pooled')
  assert shown[-1].split('|')[2].strip() == '100'
  assert evaluation.main(paths[:1]) == 1
  assert 'files come in pairs' in capsys.readouterr().err


def test_a_truth_without_a_counted_box_is_an_error(tmp_path, capsys):
  truth, result = tmp_path / 'gt.txt', tmp_path / 'result.txt'
  result.write_text('1,1,10,20,30,40,1,-1,-1,-1\n')
  for line in ('1,1,10,20,30,40,1,3,1', '1,1,10,20,30,40,0,1,1'):
    truth.write_text(f'{line}\n')
    assert evaluation.main([str(truth), str(result)]) == 1
    error = capsys.readouterr().err
    assert 'none of its 1 boxes' in error and error.count('\n') == 1
  truth.write_text('1,1,10,20,30,40,1,1,1\n')
  assert evaluation.main([str(truth), str(result)]) == 0
  twice = [str(truth), str(result)] * 2
  assert evaluation.main(twice) == 1
  assert 'result.txt is listed twice' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('name', 'mota', 'idf1'),
  [('TUD-Campus', 52.6, 55.8), ('TUD-Stadtmitte', 56.4, 64.5)],
)
def test_known_figures_of_a_reference_result(name, mota, idf1):
  folder = f'{os.environ.get("BILEVEL_JAX_DATA")}/mot/motmetrics_pkg/{name}'
  if not os.path.isdir(folder):
    pytest.skip(f'BILEVEL_JAX_DATA names no folder with {name}.')
  scores, _ = evaluation.evaluate_files(
    [f'{folder}/gt.txt', f'{folder}/test.txt']
  )
  assert round(scores.mota, 1) == mota
  assert round(scores.idf1, 1) == idf1
