"""Demonstrations and comparisons that pull a model apart, from real answers.

`length`: the same prompts have long demonstrations, and comparisons that prefer
the first sentence of the answer to the long one. `style`: demonstrations are
answers of instruction data; comparisons have prompts of HH-RLHF and prefer its
answer in a conversation to an instruction's answer of about the same length.

The answers are those of people and models, cut only at the end of a sentence.
No answer is in two rows, except that a demonstration of `length` is the
rejected answer to its own prompt.
"""

import bisect
import re
from collections.abc import Iterable
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
_SENTENCE_END = re.compile(r'[.!?](?=\s|$)')
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

  A first part of less than 20 characters, such as "1.", is left out.
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
  for example in _distinct(examples):
    lengths = [end for end in ends(example.answer) if end <= longest]
    if len(lengths) < 2:
      continue
    place = len(rows['sft'])
    short, long = (example.answer[: lengths[i]] for i in (0, -1))
    rows['sft'].append(data_lib.Example(place, example.prompt, long))
    rows['dpo'].append(data_lib.Example(place, example.prompt, short, long))
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
  cut = []
  for example in _distinct(instructions):
    lengths = [end for end in ends(example.answer) if end <= longest]
    if lengths:
      cut.append(example._replace(answer=example.answer[: lengths[-1]]))
  rejected = sorted(cut[1::2], key=lambda example: len(example.answer))
  sizes = [len(example.answer) for example in rejected]
  pairs, others = [], []
  for example in _distinct(comparisons):
    lengths = [end for end in ends(example.answer) if end <= longest]
    if _size(example.prompt) > _LONGEST_PROMPT:
      others.append(example)
    elif lengths and sizes:
      answer = example.answer[: lengths[-1]]
      at = min(bisect.bisect_left(sizes, len(answer)), len(sizes) - 1)
      sizes.pop(at)
      pairs.append(
        data_lib.Example(
          len(pairs), example.prompt, answer, rejected.pop(at).answer
        )
      )
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
  sentence = lambda word, i: ' '.join([word * 4, letters[i % 16] * 8, word])
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


def _distinct(
  examples: Iterable[data_lib.Example],
) -> Iterable[data_lib.Example]:
  """Yields the first example of each prompt."""
  known: set[str] = set()
  for example in examples:
    key = ' '.join(_text(example.prompt).lower().split())
    if key not in known:
      known.add(key)
      yield example


def _text(prompt: data_lib.Prompt) -> str:
  if isinstance(prompt, str):
    return prompt
  return '\n'.join(message['content'] for message in prompt)


def _size(prompt: data_lib.Prompt) -> int:
  return len(_text(prompt))
