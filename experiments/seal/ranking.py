"""A ranking of rows: its files and its measures on known rows."""

import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

from experiments import harness
from experiments.seal import measures, rows


class Ranking(NamedTuple):
  """Scores of rows.

  Attributes:
    scores: by name, (rows,) in the order of the file; NaN for left out rows.
    seconds: to compute each score.
  """

  scores: dict[str, np.ndarray]
  seconds: dict[str, float]


def write(
  folder: pathlib.Path,
  ranked: Ranking,
  mask: np.ndarray,
  raw: Any,
  kinds: Any = None,
) -> None:
  """Writes `scores.jsonl` with all rows, and `kept.jsonl` with the kept ones.

  Args:
    folder: of the files; it is made if it is missing.
    ranked: the scores.
    mask: which rows are kept, bool (rows,).
    raw: the rows of the file, None for invalid ones.
    kinds: kind of each row, or None if it is unknown.
  """
  folder.mkdir(parents=True, exist_ok=True)
  plain = lambda x: None if np.isnan(x) else float(f'{x:.6g}')
  with (folder / 'scores.jsonl').open('w', encoding='utf-8') as file:
    for i, keep in enumerate(mask):
      row: dict[str, Any] = {'row': i, 'kept': bool(keep)}
      if kinds is not None:
        row['kind'] = str(kinds[i])
      row |= {n: plain(scores[i]) for n, scores in ranked.scores.items()}
      file.write(json.dumps(row) + '\n')
  with (folder / 'kept.jsonl').open('w', encoding='utf-8') as file:
    for i in np.flatnonzero(mask):
      file.write(json.dumps(raw[i], ensure_ascii=False) + '\n')


def as_raw(example: rows.Example) -> dict[str, Any]:
  """Converts an example to a row that `rows.read` reads."""
  prompt = example.prompt
  if not isinstance(prompt, str):
    prompt = [dict(message) for message in prompt]
  if example.rejected is not None:
    pair = {'chosen': example.answer, 'rejected': example.rejected}
    return {'prompt': prompt, **pair}
  return {'prompt': prompt, 'response': example.answer}


def judge(
  results: harness.Results,
  name: str,
  sets: rows.Sets,
  ranked: Ranking,
  keep: float,
) -> None:
  """Adds the measures of all scores of a set of known rows.

  `auroc` and `auprc` of rejected answers are `_style_matched` against chosen
  answers, and `_ordinary` against ordinary rows, which differ in style.
  """
  against = {'': np.ones(len(sets.kinds), bool)}
  if name != 'shuffled' and np.any(sets.kinds == 'chosen'):
    against = {
      '_style_matched': sets.kinds != 'benign',
      '_ordinary': sets.kinds != 'chosen',
    }
  for key, scores in ranked.scores.items():
    at = {'score': key, 'rows': name}
    for suffix, which in against.items():
      used = which & ~np.isnan(scores)
      for area, measure in measures.AREAS.items():
        value = measures.resampled(measure, scores[used], sets.unsafe[used])
        results.put(at, {f'{area}{suffix}': value})
    results.put(at, measures.drop_rates(scores, sets.unsafe, keep))
    results.add(at, seconds=ranked.seconds[key])
