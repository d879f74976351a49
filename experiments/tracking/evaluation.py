"""HOTA, CLEAR and identity measures of results, by the package trackeval.

    python -m experiments.tracking.evaluation gt/gt.txt result.txt

Several pairs of files are judged alone and together. As MOTChallenge judges: a
result that covers a box of a distractor (people on vehicles, statues,
reflections) by half or more is taken out before, and so are boxes of the truth
that are marked by 0 or of another class than pedestrians. 2D MOT 2015 has no
classes.
"""

import argparse
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize

from experiments import harness
from experiments.tracking import mot_files

_DISTRACTORS = (2, 7, 8, 12)
_EPS = np.finfo(np.float64).eps


class Scores(NamedTuple):
  """What trackeval says; shares are in per cent.

  Attributes:
    mota: accuracy of CLEAR: 1 - (missed + false + switches) / truth.
    idf1: F1 of boxes under the best one-to-one map of identities.
    hota: the geometric mean of detection and association, over thresholds.
    det_a: its detection half.
    ass_a: its association half.
    switches: identity switches of CLEAR.
    fragments: interruptions of CLEAR.
    false_positives: boxes that cover no truth.
    misses: boxes of the truth that none covers.
    truth: boxes of the truth.
  """

  mota: float
  idf1: float
  hota: float
  det_a: float
  ass_a: float
  switches: float
  fragments: float
  false_positives: float
  misses: float
  truth: float


def overlaps(one: np.ndarray, two: np.ndarray) -> np.ndarray:
  """Intersection over union of boxes (n, 4) and (m, 4), as (n, m)."""
  first, second = one[:, None], two[None]
  low = np.maximum(first[..., :2], second[..., :2])
  high = np.minimum(
    first[..., :2] + first[..., 2:], second[..., :2] + second[..., 2:]
  )
  common = np.prod(np.maximum(high - low, 0), axis=-1)
  areas = np.prod(first[..., 2:], axis=-1) + np.prod(second[..., 2:], axis=-1)
  return common / np.maximum(areas - common, _EPS)


def import_trackeval() -> Any:
  """Imports the package that judges results; SettingsError without it."""
  return harness.load_extra('trackeval', 'mot', 'judging results')


def _measures(names=('hota', 'clear', 'identity')):
  metrics = import_trackeval().metrics
  half = {'THRESHOLD': 0.5, 'PRINT_CONFIG': False}
  made = {
    'hota': metrics.HOTA,
    'clear': lambda: metrics.CLEAR(half),
    'identity': lambda: metrics.Identity(half),
  }
  return {name: made[name]() for name in names}


def prepared(
  truth: mot_files.Boxes,
  result: mot_files.Boxes,
  length: int,
  *,
  classes: bool = True,
) -> dict[str, Any]:
  """What trackeval's measures take of one sequence.

  Args:
    truth: boxes with identities.
    result: likewise.
    length: frames.
    classes: whether the truth has classes; not in 2D MOT 2015.

  Returns:
    Identities from 0, overlaps and counts by trackeval's names.
  """
  found: dict[str, list] = {
    name: [] for name in ('gt_ids', 'tracker_ids', 'similarity_scores')
  }
  kept = truth.confidences != 0
  if classes:
    kept &= truth.classes == mot_files.PEDESTRIAN
  distracting = np.isin(truth.classes, _DISTRACTORS) & classes
  for rows, theirs in zip(truth.by_frame(length), result.by_frame(length)):
    similar = overlaps(truth.boxes[rows], result.boxes[theirs])
    if classes:
      near = np.where(similar < 0.5 - _EPS, 0, similar)
      of_truth, of_result = scipy.optimize.linear_sum_assignment(-near)
      gone = of_result[
        (near[of_truth, of_result] > 0) & distracting[rows[of_truth]]
      ]
      theirs = np.delete(theirs, gone)
      similar = np.delete(similar, gone, axis=1)
    judged = kept[rows]
    found['gt_ids'].append(truth.ids[rows[judged]])
    found['tracker_ids'].append(result.ids[theirs])
    found['similarity_scores'].append(similar[judged])
  counts = {}
  for name, short in (('gt', 'gt'), ('tracker', 'tracker')):
    ids = found[f'{name}_ids']
    known = np.unique(np.concatenate([np.zeros(0, np.int64), *ids]))
    found[f'{name}_ids'] = [np.searchsorted(known, frame) for frame in ids]
    counts[f'num_{short}_ids'] = len(known)
    counts[f'num_{short}_dets'] = sum(map(len, ids))
  return {**found, **counts, 'num_timesteps': length}


def evaluate(
  sequences: Mapping[str, dict[str, Any]],
) -> tuple[Scores, dict[str, Scores]]:
  """Judges results on several sequences.

  Args:
    sequences: what `prepared` made, by name.

  Returns:
    The scores of all boxes together, and those of each sequence.

  Raises:
    SettingsError: if trackeval is not installed; says how to.
    DamagedDataError: if there is no sequence.
  """
  if not sequences:
    raise harness.DamagedDataError('there is no sequence to judge.')
  measures = _measures()
  each: dict[str, dict[str, Any]] = {kind: {} for kind in measures}
  for name, data in sequences.items():
    for kind, measure in measures.items():
      each[kind][name] = measure.eval_sequence(data)
  pooled = {
    kind: measure.combine_sequences(each[kind])
    for kind, measure in measures.items()
  }
  alone = {
    name: _scores({kind: found[name] for kind, found in each.items()})
    for name in sequences
  }
  return _scores(pooled), alone


def idf1(data: dict[str, Any]) -> float:
  """The IDF1 of one sequence alone, of what `prepared` made, in per cent."""
  measure = _measures(('identity',))['identity']
  return 100 * float(measure.eval_sequence(data)['IDF1'])


def _scores(found: Mapping[str, Mapping[str, Any]]) -> Scores:
  clear, identity, hota = (found[k] for k in ('clear', 'identity', 'hota'))
  mean = lambda name: 100 * float(np.mean(hota[name]))
  return Scores(
    mota=100 * float(clear['MOTA']),
    idf1=100 * float(identity['IDF1']),
    hota=mean('HOTA'),
    det_a=mean('DetA'),
    ass_a=mean('AssA'),
    switches=float(clear['IDSW']),
    fragments=float(clear['Frag']),
    false_positives=float(clear['CLR_FP']),
    misses=float(clear['CLR_FN']),
    truth=float(clear['CLR_TP'] + clear['CLR_FN']),
  )


def judge_files(
  paths: Sequence[str], *, classes: bool | None = None
) -> tuple[Scores, dict[str, Scores]]:
  """Judges files of results by files of the truth.

  Args:
    paths: truth, result, and so on.
    classes: whether truths have classes; None if there is one above 1.

  Returns:
    What `evaluate` does; a sequence has the name of its result.

  Raises:
    UserError: in one line, of files that are missing or damaged, of a truth
      without a box, of an odd number of files or one that is there twice, or
      of a missing package.
  """
  if len(paths) % 2 or not paths:
    raise harness.SettingsError(
      f'files come in pairs, a truth and its result, got {len(paths)}.'
    )
  found: dict[str, Any] = {}
  for true, given in zip(paths[::2], paths[1::2]):
    truth, result = (
      mot_files.read_boxes(path, identities=True) for path in (true, given)
    )
    info = mot_files.read_info(
      pathlib.Path(true).absolute().parent.parent, truth, result
    )
    of = bool(np.any(truth.classes > 1)) if classes is None else classes
    if str(given) in found:
      raise harness.SettingsError(f'{given} is there twice; give it once.')
    found[str(given)] = prepared(truth, result, info.length, classes=of)
    if not found[str(given)]['num_gt_dets']:
      raise harness.DamagedDataError(
        f'{true}: none of its {len(truth.ids)} boxes is one to judge by: those '
        'whose confidence is not 0 are and, where there are classes, whose '
        f'class is {mot_files.PEDESTRIAN}.'
      )
  return evaluate(found)


def main(arguments: Sequence[str]) -> int:
  """Judges the files of a command line; returns the exit status."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.tracking.evaluation',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('files', nargs='+', help='truth, result, ...')
  flags = parser.parse_args(arguments)
  try:
    pooled, alone = judge_files(flags.files)
  except harness.UserError as error:
    print(f'evaluation: {" ".join(str(error).split())}', file=sys.stderr)
    return 1
  rows = [
    {'sequence': name, **scores._asdict()}
    for name, scores in (*alone.items(), ('together', pooled))
  ]
  print(harness.format_table(rows), end='')
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
