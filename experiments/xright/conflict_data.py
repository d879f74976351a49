"""Demonstrations and comparisons that pull a model apart, from real answers.

`length`: the same prompts have long demonstrations, and comparisons that prefer
the first sentence of the answer to the long one. `style`: demonstrations are
answers of instruction data; comparisons have prompts of HH-RLHF and prefer its
answer in a conversation to an instruction's answer of about the same length.

The answers are those of people and models, cut only at the end of a sentence.
No prompt and no such answer is in two rows, except that a demonstration of
`length` is the rejected answer to its own prompt. First sentences may repeat.
"""

import bisect
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from experiments import harness
from experiments.lm import data as data_lib

INSTRUCTIONS = (
  'alpaca_data_safety_only.json',
  'safety_only_data_Instructions.json',
)
DIALOGUES = 'hh_harmless_base_test.jsonl.gz'
TEXTS = 'dolly_safety_only.jsonl'
ADVICE = (
  'give a folder with the test part of harmless-base of HH-RLHF (Anthropic) '
  f'under this name, and with {", ".join(INSTRUCTIONS)} and {TEXTS} (rows with '
  'an instruction and an output or response)'
)
KINDS = {
  'length': 'long demonstrations, comparisons that prefer a short answer.',
  'style': 'demonstrations of instructions, comparisons that prefer dialogue.',
}
_SENTENCE_END = re.compile(r'(?<!\d)[.!?](?=\s|$)')
# Characters of the shortest first sentence, and of a prompt of `style`.
_SHORTEST, _LONGEST_PROMPT = 20, 160


class Conflict(NamedTuple):
  """Examples of a conflict.

  Attributes:
    examples: by objective, demonstrations first.
    texts: other dialogues, on which a model is trained first.
  """

  examples: dict[str, list[data_lib.Example]]
  texts: list[data_lib.Example]


def ends(text: str) -> list[int]:
  """Returns the lengths of the parts of a text that end with a sentence.

  A number with a period, as in a list, ends no sentence. A first part of less
  than 20 characters is left out.
  """
  positions = [match.end() for match in _SENTENCE_END.finditer(text)]
  return [end for end in positions if end >= _SHORTEST]


def by_length(
  examples: Iterable[data_lib.Example], *, longest: int
) -> dict[str, list[data_lib.Example]]:
  """Makes the conflict `length`.

  Args:
    examples: prompts with their answers; those with one sentence, or with a
      prompt that occurred before, are left out.
    longest: characters of the longest answer.

  Returns:
    As many demonstrations as comparisons, in the same order of prompts.
  """
  rows: dict[str, list[data_lib.Example]] = {'sft': [], 'dpo': []}
  for example in _cut(examples, longest):
    if len(lengths := ends(example.answer)) < 2:
      continue
    place, short = len(rows['sft']), example.answer[: lengths[0]]
    long = example._replace(row=place, rejected=None)
    rows['sft'].append(long)
    rows['dpo'].append(long._replace(answer=short, rejected=long.answer))
  return rows


def by_style(
  instructions: Iterable[data_lib.Example],
  comparisons: Iterable[data_lib.Example],
  *,
  longest: int,
) -> tuple[dict[str, list[data_lib.Example]], list[data_lib.Example]]:
  """Makes the conflict `style`.

  Args:
    instructions: instructions with their answers.
    comparisons: dialogues with a chosen answer.
    longest: characters of the longest answer.

  Returns:
    Demonstrations and comparisons, and the dialogues whose prompts are too long
    for a comparison. Every second instruction is a demonstration, and the
    answers of the others are rejected ones.
  """
  cut = list(_cut(instructions, longest))
  rejected = sorted(cut[1::2], key=lambda example: len(example.answer))
  sizes = [len(example.answer) for example in rejected]
  is_short = lambda example: _size(example.prompt) <= _LONGEST_PROMPT
  dialogues = list(comparisons)
  others = [example for example in dialogues if not is_short(example)]
  pairs: list[data_lib.Example] = []
  for example in _cut(filter(is_short, dialogues), longest):
    if sizes:
      at = bisect.bisect_left(sizes, len(example.answer))
      at = min(at, len(sizes) - 1)
      sizes.pop(at)
      other = rejected.pop(at).answer
      pairs.append(example._replace(row=len(pairs), rejected=other))
  demonstrations = [e._replace(row=i) for i, e in enumerate(cut[::2])]
  return {'sft': demonstrations, 'dpo': pairs}, others


def load(data_dir: str | None, kind: str, *, longest: int) -> Conflict:
  """Reads the files of a conflict.

  Args:
    data_dir: folder of the files.
    kind: 'length' or 'style'.
    longest: characters of the longest answer.

  Returns:
    A `Conflict`; its texts are no rows of the examples.

  Raises:
    UserError: if a file is missing or invalid.
  """
  folder = harness.find(
    data_dir, [DIALOGUES], folders=('', 'llm'), advice=ADVICE
  ).parent
  instructions = []
  for name in INSTRUCTIONS:
    instructions += data_lib.read_examples(folder / name)[0]
  # Dialogues that differ before their last turn are skipped.
  dialogues, _ = data_lib.read_examples(folder / DIALOGUES, skip=True)
  texts = data_lib.read_examples(folder / TEXTS)[0]
  if kind == 'length':
    return Conflict(by_length(instructions, longest=longest), texts + dialogues)
  examples, others = by_style(instructions, dialogues, longest=longest)
  return Conflict(examples, texts + others)


def made_up(kind: str, *, longest: int, rows: int = 96) -> Conflict:
  """Makes a conflict of made-up sentences, for a quick check."""
  letters = 'abcdefghijklmnop'
  sentence = lambda word, i: f'{word * 4} {letters[i % 16] * 8} {i} {word}'
  make = lambda i, word, name: data_lib.Example(
    i,
    ({'role': 'user', 'content': f'{name} {i}'},),
    f'{sentence(word, i)}. {sentence(word, i + 1)}. {sentence(word, i + 2)}.',
  )
  instructions = [make(i, 'so', 'tell') for i in range(rows)]
  dialogues = [make(i, 'hm', 'say') for i in range(rows // 2)]
  texts = [make(i, 'we', 'read') for i in range(rows)]
  if kind == 'length':
    return Conflict(by_length(instructions, longest=longest), texts + dialogues)
  examples, others = by_style(instructions, dialogues, longest=longest)
  return Conflict(examples, texts + others)


def _cut(
  examples: Iterable[data_lib.Example], longest: int
) -> Iterator[data_lib.Example]:
  """Cuts answers after their last sentence of a length; leaves out repetitions.

  Args:
    examples: prompts with their answers.
    longest: characters of the longest answer.

  Yields:
    Examples whose prompt and cut answer are new.
  """
  known: set[str] = set()
  for example in examples:
    lengths = [end for end in ends(example.answer) if end <= longest]
    if not lengths:
      continue
    answer = example.answer[: lengths[-1]]
    keys = {
      ' '.join(t.lower().split()) for t in (_text(example.prompt), answer)
    }
    if not keys & known:
      known |= keys
      yield example._replace(answer=answer)


def _text(prompt: data_lib.Prompt) -> str:
  if isinstance(prompt, str):
    return prompt
  return '\n'.join(message['content'] for message in prompt)


def _size(prompt: data_lib.Prompt) -> int:
  return len(_text(prompt))
