"""What is ranked: a user's rows, or sets of known rows, with ids that stay.

A row's id is its number in its file, or in the set as it was put together: it
stays the same whatever is too long, wrong or left out later.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import harness
from experiments.lm import data as data_lib
from experiments.lm import row_files

Example = data_lib.Example
# In the folder of the data sets.
ALPACA = 'alpaca_data_safety_only.json'
DOLLY = 'dolly_safety_only.jsonl'
SEEDS = 'alpaca_seed_tasks.jsonl'
SAFETY = 'safety_only_data_Instructions.json'
HH = 'hh_harmless_base_test.jsonl.gz'
WHERE = (
  'the files of github.com/tatsu-lab/stanford_alpaca, '
  'LLM-Tuning-Safety/LLMs-Finetuning-Safety, vinid/safety-tuned-llamas and '
  'anthropics/hh-rlhf, named as experiments/seal/README.md says'
)


def read(
  path: str | pathlib.Path,
  *,
  skip: bool = False,
  comparisons: bool | None = None,
  prompts_only: bool = False,
) -> data_lib.Read:
  """Reads a user's rows: `data.read`, with the flag that skips some."""
  content = data_lib.read(
    path,
    skip=skip,
    flag='--bad_rows=skip',
    comparisons=comparisons,
    prompts_only=prompts_only,
  )
  if content.wrong:
    print(row_files.describe(path, content.wrong))
  return content


def require(
  folder: str | pathlib.Path, name: str, safe_of: str = 'chosen'
) -> None:
  """Checks that the files of known rows exist, before anything is loaded.

  Args:
    folder: of the data.
    name: of the rows, 'harmless' or 'shuffled'.
    safe_of: as in `harmless`.

  Raises:
    MissingDataError: if a file is missing.
  """
  names = [ALPACA, DOLLY, SEEDS]
  if name == 'harmless':
    names.append(HH)
  if name != 'harmless' or safe_of != 'chosen':
    names.append(SAFETY)
  for one in names:
    _file(folder, one)


class Sets(NamedTuple):
  """Rows to rank, of known kinds, and rows that are safe.

  Attributes:
    finetune: to rank; an example's row is its place here.
    kinds: of each, an array of words: 'benign', 'chosen', 'unsafe'.
    safe: the safe rows, numbered likewise; some have the other answer too.
    anchors: further unsafe rows, for what asks for some; no prompt is in both.
  """

  finetune: list[Example]
  kinds: np.ndarray
  safe: list[Example]
  anchors: list[Example]

  @property
  def unsafe(self) -> np.ndarray:
    """Which rows are unsafe, (rows,) of bool."""
    return self.kinds == 'unsafe'


def numbered(examples: Sequence[Example]) -> list[Example]:
  """The same with their places for ids."""
  return [one._replace(row=i) for i, one in enumerate(examples)]


def _file(folder: str | pathlib.Path, name: str) -> pathlib.Path:
  path = pathlib.Path(folder) / name
  if not path.exists():
    raise harness.MissingDataError(f'there is no {path}: take {WHERE}.')
  return path


def benign(folder: str | pathlib.Path) -> list[Example]:
  """Ordinary instructions of Alpaca, Dolly and the seed tasks."""
  found = []
  for name in (ALPACA, DOLLY, SEEDS):
    found += data_lib.read_examples(_file(folder, name), skip=True)[0]
  return numbered(found)


def safety(folder: str | pathlib.Path) -> list[Example]:
  """Instructions of which most are to be refused, with safe answers."""
  return data_lib.read_examples(_file(folder, SAFETY), skip=True)[0]


def pairs(folder: str | pathlib.Path) -> list[Example]:
  """Single questions with a chosen and a rejected answer."""
  found, _ = data_lib.read_examples(_file(folder, HH), skip=True)
  return [one for one in found if len(one.prompt) == 1]


def shuffled(examples: Sequence[Example], seed: int) -> list[Example]:
  """The same prompts with the answers of other ones, none with its own."""
  order = np.random.default_rng(seed).permutation(len(examples))
  after = dict(zip(order, np.roll(order, 1)))
  return [
    one._replace(answer=examples[after[i]].answer)
    for i, one in enumerate(examples)
  ]


class Sizes(NamedTuple):
  """How many rows of each kind are taken.

  Attributes:
    benign: ordinary ones.
    chosen: chosen answers among the rows to rank.
    unsafe: rejected, or shuffled, ones.
    safe: safe rows.
    anchors: further unsafe ones.
  """

  benign: int
  chosen: int
  unsafe: int
  safe: int
  anchors: int = 0


def _take(
  what: str,
  examples: Sequence[Example],
  count: int,
  fits: Callable[[Example], bool],
) -> list[Example]:
  found = [one for _, one in zip(range(count), filter(fits, examples))]
  if len(found) < count:
    raise harness.SettingsError(
      f'{count} {what} are asked for, but {len(found)} of {len(examples)} fit '
      'into the length: take fewer, or let rows be longer.'
    )
  return found


def _mixed(parts: dict[str, list[Example]], safe, anchors, rng) -> Sets:
  rows = [one for part in parts.values() for one in part]
  kinds = np.repeat(list(parts), [len(part) for part in parts.values()])
  order = rng.permutation(len(rows))
  return Sets(
    numbered([rows[i] for i in order]),
    kinds[order],
    numbered(safe),
    numbered(anchors),
  )


def _drawn(rng: Any, examples: Sequence[Example]) -> list[Example]:
  return [examples[i] for i in rng.permutation(len(examples))]


def harmless(
  folder: str | pathlib.Path,
  sizes: Sizes,
  fits: Callable[[Example], bool],
  *,
  seed: int = 0,
  safe_of: str = 'chosen',
) -> Sets:
  """Rejected answers among ordinary rows and chosen answers to other prompts.

  Args:
    folder: of the data.
    sizes: of each kind.
    fits: whether a row is short enough.
    seed: of what is taken.
    safe_of: 'chosen' for further chosen answers, 'instructions' for safety
      instructions.

  Returns:
    Sets in which no prompt of the comparisons is twice.

  Raises:
    SettingsError: if there are too few rows that fit.
    MissingDataError: if a file is not there.
  """
  rng = np.random.default_rng(seed)
  apart: dict[Any, Example] = {}
  for one in _drawn(rng, pairs(folder)):
    apart.setdefault(one.prompt[0]['content'], one)
  left = list(apart.values())
  found: dict[str, list[Example]] = {}
  wanted = {
    'unsafe': sizes.unsafe,
    'anchors': sizes.anchors,
    'chosen': sizes.chosen,
    'safe': sizes.safe if safe_of == 'chosen' else 0,
  }
  for name, count in wanted.items():
    bad = name in ('unsafe', 'anchors')
    # Of safe rows both answers are kept, for a safe loss of comparisons.
    asked = [
      one._replace(
        answer=one.rejected if bad else one.answer,
        rejected=one.rejected if name == 'safe' else None,
      )
      for one in left
    ]
    words = 'rejected answers' if bad else 'chosen answers'
    found[name] = _take(words, asked, count, fits)
    used = {one.prompt[0]['content'] for one in found[name]}
    left = [one for one in left if one.prompt[0]['content'] not in used]
  safe = found['safe']
  if safe_of != 'chosen':
    given = _drawn(rng, safety(folder))
    safe = _take('safety instructions', given, sizes.safe, fits)
  ordinary = _drawn(rng, benign(folder))
  parts = {
    'benign': _take('ordinary rows', ordinary, sizes.benign, fits),
    'chosen': found['chosen'],
    'unsafe': found['unsafe'],
  }
  return _mixed(parts, safe, found['anchors'], rng)


def control(
  folder: str | pathlib.Path,
  sizes: Sizes,
  fits: Callable[[Example], bool],
  *,
  seed: int = 0,
) -> Sets:
  """The easier set: ordinary rows of which some have the answer of another.

  The safe rows are safety instructions. Raises as `harmless` does.
  """
  rng = np.random.default_rng(seed)
  ordinary = [one for one in _drawn(rng, benign(folder)) if fits(one)]
  parts = {'benign': _take('ordinary rows', ordinary, sizes.benign, fits)}
  rest = shuffled(ordinary[sizes.benign :], seed)
  wrong = _take('shuffled rows', rest, sizes.unsafe + sizes.anchors, fits)
  parts['unsafe'] = wrong[: sizes.unsafe]
  safe = _take(
    'safety instructions', _drawn(rng, safety(folder)), sizes.safe, fits
  )
  return _mixed(parts, safe, wrong[sizes.unsafe :], rng)


def made_up(sizes: Sizes, *, seed: int = 0) -> Sets:
  """Rows of a rule, for a run without data: digits counted up, or not."""
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
  return _mixed(parts, safe, some(sizes.anchors, True), rng)


def text_of(example: Example) -> str:
  """Prompt and answer as one text."""
  prompt = example.prompt
  if not isinstance(prompt, str):
    prompt = '\n'.join(message['content'] for message in prompt)
  return f'{prompt}\n{example.answer}'
