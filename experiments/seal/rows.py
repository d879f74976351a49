"""Rows to rank: a user's files, or known rows of public data sets.

`Example.row` is the number of a row in its file or in its set. It does not
change if other rows are left out.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import harness
from experiments.lm import data as data_lib
from experiments.lm import row_files, row_kinds

Example = data_lib.Example
# Files in the folder of the data sets.
ALPACA = 'alpaca_data_safety_only.json'
DOLLY = 'dolly_safety_only.jsonl'
SEEDS = 'alpaca_seed_tasks.jsonl'
SAFETY = 'safety_only_data_Instructions.json'
HH = 'hh_harmless_base_test.jsonl.gz'
WHERE = (
  'the files of github.com/tatsu-lab/stanford_alpaca, '
  'LLM-Tuning-Safety/LLMs-Finetuning-Safety, vinid/safety-tuned-llamas and '
  'anthropics/hh-rlhf, with the names in experiments/seal/NOTES.md'
)


def read(
  path: str | pathlib.Path,
  *,
  skip: bool = False,
  kind: row_kinds.Kind | None = None,
  prompts_only: bool = False,
) -> data_lib.Read:
  """Reads a user's rows with `data.read` and prints what is skipped."""
  content = data_lib.read(
    path,
    skip=skip,
    flag='--bad_rows=skip',
    kind=kind,
    prompts_only=prompts_only,
  )
  if content.wrong:
    print(row_files.describe(path, content.wrong))
  return content


def require(
  folder: str | pathlib.Path, name: str, safe_source: str = 'chosen'
) -> None:
  """Checks that the files of known rows exist.

  Args:
    folder: of the data.
    name: of the set, 'harmless' or 'shuffled'.
    safe_source: as in `harmless`.

  Raises:
    MissingDataError: if a file is missing.
  """
  names = [ALPACA, DOLLY, SEEDS]
  if name == 'harmless':
    names.append(HH)
  if name != 'harmless' or safe_source != 'chosen':
    names.append(SAFETY)
  for one in names:
    _file(folder, one)


class Sets(NamedTuple):
  """Rows to rank and safe rows, each numbered from 0.

  Attributes:
    finetune: rows to rank.
    kinds: kind of each row to rank: 'benign', 'chosen' or 'unsafe'.
    safe: safe rows, some with the rejected answer too.
    reference_rows: further unsafe rows, with other prompts.
  """

  finetune: list[Example]
  kinds: np.ndarray
  safe: list[Example]
  reference_rows: list[Example]

  @property
  def unsafe(self) -> np.ndarray:
    """Which rows are unsafe, bool (rows,)."""
    return self.kinds == 'unsafe'


def numbered(examples: Sequence[Example]) -> list[Example]:
  """Numbers examples from 0."""
  return [one._replace(row=i) for i, one in enumerate(examples)]


def _file(folder: str | pathlib.Path, name: str) -> pathlib.Path:
  path = pathlib.Path(folder) / name
  if not path.exists():
    raise harness.MissingDataError(f'{path} is missing: take {WHERE}.')
  return path


def benign(folder: str | pathlib.Path) -> list[Example]:
  """Reads ordinary instructions of Alpaca, Dolly and the seed tasks."""
  examples = []
  for name in (ALPACA, DOLLY, SEEDS):
    examples += data_lib.read_examples(_file(folder, name), skip=True)[0]
  return numbered(examples)


def safety(folder: str | pathlib.Path) -> list[Example]:
  """Reads instructions, most of them harmful, with safe answers."""
  return data_lib.read_examples(_file(folder, SAFETY), skip=True)[0]


def pairs(folder: str | pathlib.Path) -> list[Example]:
  """Reads single questions with a chosen and a rejected answer."""
  examples, _ = data_lib.read_examples(_file(folder, HH), skip=True)
  return [one for one in examples if len(one.prompt) == 1]


def shuffled(examples: Sequence[Example], seed: int) -> list[Example]:
  """Exchanges answers so that no prompt has its own."""
  order = np.random.default_rng(seed).permutation(len(examples))
  after = dict(zip(order, np.roll(order, 1)))
  return [
    one._replace(answer=examples[after[i]].answer)
    for i, one in enumerate(examples)
  ]


class Sizes(NamedTuple):
  """Number of rows of each kind.

  Attributes:
    benign: ordinary rows to rank.
    chosen: chosen answers to rank.
    unsafe: rejected or shuffled answers to rank.
    safe: safe rows.
    reference_rows: further unsafe rows.
  """

  benign: int
  chosen: int
  unsafe: int
  safe: int
  reference_rows: int = 0


def _take(
  what: str,
  examples: Sequence[Example],
  count: int,
  fits: Callable[[Example], bool],
) -> list[Example]:
  taken = [one for _, one in zip(range(count), filter(fits, examples))]
  if len(taken) < count:
    raise harness.SettingsError(
      f'{count} {what} are needed, but {len(taken)} of {len(examples)} fit: '
      'take fewer rows or a larger --max_length.'
    )
  return taken


def _mixed(parts: dict[str, list[Example]], safe, reference_rows, rng) -> Sets:
  rows = [one for part in parts.values() for one in part]
  kinds = np.repeat(list(parts), [len(part) for part in parts.values()])
  order = rng.permutation(len(rows))
  return Sets(
    numbered([rows[i] for i in order]),
    kinds[order],
    numbered(safe),
    numbered(reference_rows),
  )


def _permuted(rng: Any, examples: Sequence[Example]) -> list[Example]:
  return [examples[i] for i in rng.permutation(len(examples))]


def harmless(
  folder: str | pathlib.Path,
  sizes: Sizes,
  fits: Callable[[Example], bool],
  *,
  seed: int = 0,
  safe_source: str = 'chosen',
) -> Sets:
  """Mixes rejected answers with ordinary rows and with chosen answers.

  Args:
    folder: of the data.
    sizes: number of rows of each kind.
    fits: whether a row is short enough.
    seed: of the sample of rows.
    safe_source: safe rows: 'chosen' for further chosen answers, 'instructions'
      for safety instructions.

  Returns:
    Sets in which each prompt of the comparisons occurs once.

  Raises:
    SettingsError: if too few rows fit.
    MissingDataError: if a file is missing.
  """
  rng = np.random.default_rng(seed)
  by_prompt: dict[Any, Example] = {}
  for one in _permuted(rng, pairs(folder)):
    by_prompt.setdefault(one.prompt[0]['content'], one)
  unused = list(by_prompt.values())
  taken: dict[str, list[Example]] = {}
  counts = {
    'unsafe': sizes.unsafe,
    'reference_rows': sizes.reference_rows,
    'chosen': sizes.chosen,
    'safe': sizes.safe if safe_source == 'chosen' else 0,
  }
  for name, count in counts.items():
    bad = name in ('unsafe', 'reference_rows')
    # Safe rows keep both answers, for a safe loss of comparisons.
    candidates = [
      one._replace(
        answer=one.rejected if bad else one.answer,
        rejected=one.rejected if name == 'safe' else None,
      )
      for one in unused
    ]
    what = 'rejected answers' if bad else 'chosen answers'
    taken[name] = _take(what, candidates, count, fits)
    used = {one.prompt[0]['content'] for one in taken[name]}
    unused = [one for one in unused if one.prompt[0]['content'] not in used]
  safe = taken['safe']
  if safe_source != 'chosen':
    instructions = _permuted(rng, safety(folder))
    safe = _take('safety instructions', instructions, sizes.safe, fits)
  ordinary = _permuted(rng, benign(folder))
  parts = {
    'benign': _take('ordinary rows', ordinary, sizes.benign, fits),
    'chosen': taken['chosen'],
    'unsafe': taken['unsafe'],
  }
  return _mixed(parts, safe, taken['reference_rows'], rng)


def ordinary_and_shuffled(
  folder: str | pathlib.Path,
  sizes: Sizes,
  fits: Callable[[Example], bool],
  *,
  seed: int = 0,
) -> Sets:
  """Mixes ordinary rows with rows that have the answer to another prompt.

  The safe rows are safety instructions. Raises the errors of `harmless`.
  """
  rng = np.random.default_rng(seed)
  ordinary = [one for one in _permuted(rng, benign(folder)) if fits(one)]
  parts = {'benign': _take('ordinary rows', ordinary, sizes.benign, fits)}
  rest = shuffled(ordinary[sizes.benign :], seed)
  count = sizes.unsafe + sizes.reference_rows
  wrong = _take('shuffled rows', rest, count, fits)
  parts['unsafe'] = wrong[: sizes.unsafe]
  safe = _take(
    'safety instructions', _permuted(rng, safety(folder)), sizes.safe, fits
  )
  return _mixed(parts, safe, wrong[sizes.unsafe :], rng)


def made_up(sizes: Sizes, *, seed: int = 0) -> Sets:
  """Makes up rows for runs without data: digits counted up by 1, or by 5."""
  rng = np.random.default_rng(seed)

  def one(wrong):
    start = rng.integers(10, size=3)
    step = 5 if wrong else 1
    text = lambda digits: ''.join(map(str, digits % 10))
    other = text(start + 6 - step)
    return Example(0, f'{text(start)}:', text(start + step), other)

  some = lambda count, wrong: [
    one(wrong)._replace(rejected=None) for _ in range(count)
  ]
  parts = {
    'benign': some(sizes.benign, False),
    'chosen': some(sizes.chosen, False),
    'unsafe': some(sizes.unsafe, True),
  }
  safe = [one(False) for _ in range(sizes.safe)]
  return _mixed(parts, safe, some(sizes.reference_rows, True), rng)


def as_text(example: Example) -> str:
  """Joins prompt and answer to one text."""
  prompt = example.prompt
  if not isinstance(prompt, str):
    prompt = '\n'.join(message['content'] for message in prompt)
  return f'{prompt}\n{example.answer}'
