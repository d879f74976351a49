"""Computes HOTA, CLEAR and identity measures of results with trackeval.

    python -m experiments.tracking.evaluation gt/gt.txt result.txt

Scores each pair of files and all pairs pooled, by MOTChallenge's protocol:
results that match a distractor (people on vehicles, statues, reflections) with
an overlap of 0.5 are removed first, and so are true boxes whose confidence is 0
or whose class is not pedestrian. 2D MOT 2015 has no classes.
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
  """Measures of trackeval; shares are in per cent.

  Attributes:
    mota: accuracy of CLEAR: 1 - (misses + false positives + switches) / truth.
    idf1: F1 of boxes under the best one-to-one map of identities.
    hota: geometric mean of detection and association, averaged over thresholds.
    det_a: detection accuracy of HOTA.
    ass_a: association accuracy of HOTA.
    switches: identity switches of CLEAR.
    fragments: interruptions of CLEAR.
    false_positives: result boxes that match no true box.
    misses: true boxes that no result matches.
    truth: true boxes.
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
  """Intersection over union of boxes (n, 4) and (m, 4), (n, m)."""
  first, second = one[:, None], two[None]
  low = np.maximum(first[..., :2], second[..., :2])
  high = np.minimum(
    first[..., :2] + first[..., 2:], second[..., :2] + second[..., 2:]
  )
  common = np.prod(np.maximum(high - low, 0), axis=-1)
  areas = np.prod(first[..., 2:], axis=-1) + np.prod(second[..., 2:], axis=-1)
  return common / np.maximum(areas - common, _EPS)


def import_trackeval() -> Any:
  """Imports trackeval; raises SettingsError if it is not installed."""
  return harness.load_extra('trackeval', 'mot', 'judging results')


def _measures(names=('hota', 'clear', 'identity')):
  metrics = import_trackeval().metrics
  half = {'THRESHOLD': 0.5, 'PRINT_CONFIG': False}
  makers = {
    'hota': metrics.HOTA,
    'clear': lambda: metrics.CLEAR(half),
    'identity': lambda: metrics.Identity(half),
  }
  return {name: makers[name]() for name in names}


def prepare(
  truth: mot_files.Boxes,
  result: mot_files.Boxes,
  length: int,
  *,
  classes: bool = True,
) -> dict[str, Any]:
  """Makes trackeval's input from one sequence.

  Args:
    truth: boxes with identities.
    result: boxes with identities.
    length: frames.
    classes: whether the truth has classes; not in 2D MOT 2015.

  Returns:
    Identities from 0, overlaps and counts, by trackeval's names.
  """
  true_ids, result_ids, similarities = [], [], []
  counted = truth.confidences != 0
  if classes:
    counted &= truth.classes == mot_files.PEDESTRIAN
  distractor = np.isin(truth.classes, _DISTRACTORS) & classes
  for true_rows, rows in zip(truth.by_frame(length), result.by_frame(length)):
    similar = overlaps(truth.boxes[true_rows], result.boxes[rows])
    if classes:
      near = np.where(similar < 0.5 - _EPS, 0, similar)
      one, two = scipy.optimize.linear_sum_assignment(-near)
      removed = two[(near[one, two] > 0) & distractor[true_rows[one]]]
      rows = np.delete(rows, removed)
      similar = np.delete(similar, removed, axis=1)
    mask = counted[true_rows]
    true_ids.append(truth.ids[true_rows[mask]])
    result_ids.append(result.ids[rows])
    similarities.append(similar[mask])
  data = {'similarity_scores': similarities, 'num_timesteps': length}
  for name, ids in (('gt', true_ids), ('tracker', result_ids)):
    unique = np.unique(np.concatenate([np.zeros(0, np.int64), *ids]))
    data[f'{name}_ids'] = [np.searchsorted(unique, frame) for frame in ids]
    data[f'num_{name}_ids'] = len(unique)
    data[f'num_{name}_dets'] = sum(map(len, ids))
  return data


def evaluate(
  sequences: Mapping[str, dict[str, Any]],
) -> tuple[Scores, dict[str, Scores]]:
  """Scores results on several sequences.

  Args:
    sequences: outputs of `prepare`, by name.

  Returns:
    Pooled scores, and the scores of each sequence by name.

  Raises:
    SettingsError: if trackeval is not installed; says how to install it.
    DamagedDataError: if there is no sequence.
  """
  if not sequences:
    raise harness.DamagedDataError('there is no sequence to score.')
  measures = _measures()
  each: dict[str, dict[str, Any]] = {kind: {} for kind in measures}
  for name, data in sequences.items():
    for kind, measure in measures.items():
      each[kind][name] = measure.eval_sequence(data)
  pooled = {
    kind: measure.combine_sequences(each[kind])
    for kind, measure in measures.items()
  }
  per_sequence = {
    name: _scores({kind: values[name] for kind, values in each.items()})
    for name in sequences
  }
  return _scores(pooled), per_sequence


def idf1(data: dict[str, Any]) -> float:
  """IDF1 of one sequence in per cent; `data` is an output of `prepare`."""
  measure = _measures(('identity',))['identity']
  return 100 * float(measure.eval_sequence(data)['IDF1'])


def _scores(values: Mapping[str, Mapping[str, Any]]) -> Scores:
  clear, identity, hota = (values[k] for k in ('clear', 'identity', 'hota'))
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


def evaluate_files(
  paths: Sequence[str], *, classes: bool | None = None
) -> tuple[Scores, dict[str, Scores]]:
  """Scores result files against ground-truth files.

  Args:
    paths: truth, result, truth, result, and so on.
    classes: whether truths have classes; None if any class is above 1.

  Returns:
    The output of `evaluate`; a sequence has the name of its result file.

  Raises:
    UserError: in one line, if a file is missing, damaged or repeated, a truth
      has no box, the number of files is odd, or trackeval is not installed.
  """
  if len(paths) % 2 or not paths:
    raise harness.SettingsError(
      f'files come in pairs, a truth and its result, got {len(paths)}.'
    )
  sequences: dict[str, Any] = {}
  for truth_path, path in zip(paths[::2], map(str, paths[1::2])):
    truth, result = (
      mot_files.read_boxes(file, identities=True) for file in (truth_path, path)
    )
    info = mot_files.read_info(
      pathlib.Path(truth_path).absolute().parent.parent, truth, result
    )
    has = bool(np.any(truth.classes > 1)) if classes is None else classes
    if path in sequences:
      raise harness.SettingsError(f'{path} is listed twice; list it once.')
    sequences[path] = prepare(truth, result, info.length, classes=has)
    if not sequences[path]['num_gt_dets']:
      raise harness.DamagedDataError(
        f'{truth_path}: none of its {len(truth.ids)} boxes counts: a box needs '
        'a confidence other than 0 and, in files with classes, class '
        f'{mot_files.PEDESTRIAN}.'
      )
  return evaluate(sequences)


def main(arguments: Sequence[str]) -> int:
  """Scores the files of a command line; returns the exit status."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.tracking.evaluation',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('files', nargs='+', help='truth, result, ...')
  flags = parser.parse_args(arguments)
  try:
    pooled, per_sequence = evaluate_files(flags.files)
  except harness.UserError as error:
    print(f'evaluation: {" ".join(str(error).split())}', file=sys.stderr)
    return 1
  rows = [
    {'sequence': name, **scores._asdict()}
    for name, scores in (*per_sequence.items(), ('pooled', pooled))
  ]
  print(harness.format_table(rows), end='')
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
