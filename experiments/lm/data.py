"""Rows of a user's files as prompts and answers, whatever their keys.

Files are `.jsonl`, or `.json` with a list, also with `.gz` behind. A row is one
of these; other keys are left alone:

| keys | is |
|---|---|
| `messages` | a dialogue, of which the last turn is the answer |
| `prompt`, `response` (or `completion`) | texts; a prompt may be messages |
| `instruction`, `input` or `context`, `output` or `response` | one turn |
| `instruction`, `instances` of `input` and `output` | one turn, several times |
| `prompt`, `chosen`, `rejected` | two answers; texts or messages |
| `chosen`, `rejected` | two dialogues that differ in their last turn |

Dialogues may be texts with turns after `Human:` and `Assistant:`.
"""

import gzip
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments import harness

# Messages of a dialogue, or a text that is continued as it stands.
Prompt = tuple[Mapping[str, str], ...] | str
_TURN = re.compile(r'(?:^|\n\n)(Human|Assistant):')
_ROLES = {'Human': 'user', 'Assistant': 'assistant'}


class Example(NamedTuple):
  """A prompt with an answer, and for comparisons with another.

  Attributes:
    row: its number in the file, from 0, blank lines not counted: it stays the
      same whatever is left out later. Instances of one row share it.
    prompt: messages or a text.
    answer: the one to be learnt, or that was chosen.
    rejected: the other one; None for a demonstration.
  """

  row: int
  prompt: Prompt
  answer: str
  rejected: str | None = None


class Row(NamedTuple):
  """A row of a file, as it was found.

  Attributes:
    number: from 0, blank lines not counted.
    where: the same in words, with its line where a line is a row.
    value: the object; None where there is none.
    wrong: what is wrong with it; '' if it is an object.
  """

  number: int
  where: str
  value: dict[str, Any] | None
  wrong: str = ''


def find_rows(path: str | pathlib.Path) -> list[Row]:
  """The rows of a file, with what is wrong with those that are none.

  Raises:
    UserError: if there is no such file, or no row in it.
  """
  path = pathlib.Path(path)
  name = path.name.removesuffix('.gz')
  if path.is_dir():
    raise harness.UserError(
      f'{path} is a folder, expected a file of rows, .jsonl or .json: name one '
      'of the files in it.'
    )
  if not name.endswith(('.json', '.jsonl')):
    there = '' if path.exists() else '; there is none of this name either'
    raise harness.UserError(
      f'{path}: files of rows are called .jsonl or .json, or these with '
      f'.gz{there}.'
    )
  text = _text_of(path)
  found: list[Row] = []
  if name.endswith('.json'):
    try:
      values = json.loads(text)
    except ValueError as error:
      raise harness.UserError(f'{path}: {error}.') from error
    if not isinstance(values, list):
      raise harness.UserError(
        f'{path} holds a {type(values).__name__}, expected a list of rows; a '
        'file with one row a line is called .jsonl.'
      )
    for number, value in enumerate(values):
      found.append(_row(number, f'row {number} (from 0)', value))
  else:
    for line, words in enumerate(text.split('\n'), 1):
      if not words.strip():
        continue
      number = len(found)
      where = f'line {line} (row {number} from 0)'
      try:
        found.append(_row(number, where, json.loads(words)))
      except json.JSONDecodeError as error:
        wrong = f'no JSON: {error.msg} at column {error.colno}'
        found.append(Row(number, where, None, wrong))
  if not found:
    raise harness.UserError(f'{path} holds no rows.')
  return found


def _text_of(path: pathlib.Path) -> str:
  try:
    raw = path.read_bytes()
    unpacked = gzip.decompress(raw) if path.suffix == '.gz' else raw
    return unpacked.decode('utf-8-sig')
  except FileNotFoundError as error:
    raise harness.UserError(f'there is no file {path}.') from error
  except UnicodeDecodeError as error:
    line = error.object.count(b'\n', 0, error.start) + 1
    raise harness.UserError(
      f'{path} cannot be read: line {line} is not UTF-8 ({error.reason}); save '
      'the file as UTF-8.'
    ) from error
  except (OSError, EOFError) as error:
    raise harness.UserError(f'{path} cannot be read: {error}.') from error


def _row(number: int, where: str, value: Any) -> Row:
  if isinstance(value, dict):
    return Row(number, where, value)
  return Row(number, where, None, f'a {type(value).__name__}, no object')


def read_rows(path: str | pathlib.Path) -> list[dict[str, Any]]:
  """The rows of a file.

  Raises:
    UserError: if there is no such file, or a row is no JSON object; with its
      line, and its number from 0.
  """
  rows = []
  for row in find_rows(path):
    if row.value is None:
      raise harness.UserError(f'{path}, {row.where}: {row.wrong}.')
    rows.append(row.value)
  return rows


class Read(NamedTuple):
  """What `read` found in a file.

  Attributes:
    raw: the objects of the file by number; of a row that is none, None.
    examples: those that are, with their numbers.
    wrong: what is wrong with the others, with line and number.
  """

  raw: list[dict[str, Any] | None]
  examples: list[Example]
  wrong: list[str]


def read(
  path: str | pathlib.Path, *, skip: bool = False, flag: str = ''
) -> Read:
  """Reads a user's rows; each that is none is named by its line and number.

  Args:
    path: of the file.
    skip: whether to leave rows out that are none, dialogues that differ before
      their last turn or half a line for instance. A row is left out as a whole.
    flag: by which a user skips them, for the message.

  Returns:
    A `Read`.

  Raises:
    UserError: if there is no such file, or no row in it; without `skip`, with
      the place of the first row that is none, and why.
  """
  found = Read([], [], [])
  for row in find_rows(path):
    value, wrong = row.value, row.wrong
    if value is not None:
      try:
        found.examples.extend(as_examples(value, row.number))
      except harness.UserError as error:
        value, wrong = None, str(error)
    found.raw.append(value)
    if not wrong:
      continue
    said = f'{path}, {row.where}: {wrong}.'
    if not skip:
      mend = f' {flag} leaves such rows out.' if flag else ''
      raise harness.UserError(f'{said}{mend}')
    found.wrong.append(said)
  if not found.examples:
    raise harness.UserError(f'{path} has no example: {found.wrong[0]}')
  return found


def read_examples(
  path: str | pathlib.Path, *, skip: bool = False
) -> tuple[list[Example], list[str]]:
  """The examples of a file, and what was wrong with those left out: `read`."""
  found = read(path, skip=skip)
  return found.examples, found.wrong


def as_examples(row: Mapping[str, Any], number: int = 0) -> list[Example]:
  """The examples of a row: one for each of its instances, or one.

  Raises:
    UserError: as `as_example`; with the number of the instance, if there are
      some.
  """
  if 'instances' not in row or 'instruction' not in row:
    return [as_example(row, number)]
  instances = row['instances']
  if not isinstance(instances, list) or not instances:
    raise harness.UserError('instances is no list of input and output')
  found = []
  for i, instance in enumerate(instances):
    if not isinstance(instance, Mapping) or 'output' not in instance:
      raise harness.UserError(f'instance {i} has no output')
    given = {n: instance[n] for n in ('input', 'output') if n in instance}
    try:
      one = as_example({'instruction': row['instruction'], **given}, number)
    except harness.UserError as error:
      raise harness.UserError(f'instance {i}: {error}') from error
    found.append(one)
  return found


def as_example(row: Mapping[str, Any], number: int = 0) -> Example:
  """The example of a row.

  Raises:
    UserError: if its keys are none of those above, a text is missing or empty,
      or two dialogues differ before their last turn.
  """
  if 'chosen' in row and 'rejected' in row:
    return _comparison(row, number)
  if 'messages' in row:
    prompt, answer = _split(_messages(row['messages'], 'messages'), 'messages')
    return Example(number, prompt, answer)
  answers = [k for k in ('response', 'completion', 'output') if k in row]
  for key in ('prompt', 'instruction'):
    if key in row and answers:
      prompt = _prompt(row, key)
      answer = row[answers[0]]
      if isinstance(answer, list):
        _, answer = _split(_messages(answer, answers[0]), answers[0])
      return Example(number, prompt, _text(answer, answers[0]))
  raise harness.UserError(
    f'the keys are {sorted(row)}; expected messages, or prompt and response, '
    'or instruction and output, or prompt, chosen and rejected'
  )


def _text(value: Any, key: str) -> str:
  if not isinstance(value, str) or not value.strip():
    shown = repr(value) if isinstance(value, str) else type(value).__name__
    raise harness.UserError(f'{key} is {shown}, expected a text')
  return value


def _messages(value: Any, key: str) -> tuple[Mapping[str, str], ...]:
  if not isinstance(value, Sequence) or isinstance(value, str) or not value:
    raise harness.UserError(f'{key} is no list of messages')
  for i, message in enumerate(value):
    fine = isinstance(message, Mapping) and all(
      isinstance(message.get(name), str) for name in ('role', 'content')
    )
    if not fine:
      raise harness.UserError(
        f'message {i} of {key} has no role and content that are texts'
      )
  return tuple({n: m[n] for n in ('role', 'content')} for m in value)


def _split(messages: Any, key: str) -> tuple[Any, str]:
  """What comes before the last turn, and that turn, which is an answer."""
  *before, last = messages
  if last['role'] != 'assistant':
    raise harness.UserError(
      f'the last message of {key} is of {last["role"]!r}, expected an answer '
      "of 'assistant'"
    )
  return tuple(before), _text(last['content'], f'the last message of {key}')


def _prompt(row: Mapping[str, Any], key: str) -> Prompt:
  value = row[key]
  if not isinstance(value, str):
    return _messages(value, key)
  text = _text(value, key)
  if key == 'prompt':
    return text
  more = row.get('input', row.get('context')) or ''
  if not isinstance(more, str):
    raise harness.UserError(
      f'input or context is {type(more).__name__}, expected a text'
    )
  if more.strip():
    text = f'{text}\n\n{more}'
  return ({'role': 'user', 'content': text},)


def _dialogue(value: Any, key: str) -> tuple[Any, str]:
  """The prompt and the last turn of a dialogue, messages or a text."""
  if not isinstance(value, str):
    return _split(_messages(value, key), key)
  parts = _TURN.split(value)
  roles, texts = parts[1::2], parts[2::2]
  if parts[0].strip() or not roles:
    raise harness.UserError(
      f'{key} is no dialogue with turns of Human: and Assistant:, and there is '
      'no prompt'
    )
  return _split(
    [
      {'role': _ROLES[role], 'content': text.strip()}
      for role, text in zip(roles, texts)
    ],
    key,
  )


def _comparison(row: Mapping[str, Any], number: int) -> Example:
  pair = [row['chosen'], row['rejected']]
  if 'prompt' in row:
    prompt = _prompt(row, 'prompt')
    answers = []
    for key, value in zip(('chosen', 'rejected'), pair):
      if isinstance(value, list):
        _, value = _split(_messages(value, key), key)
      answers.append(_text(value, key))
  else:
    (prompt, one), (other, two) = (
      _dialogue(value, key) for key, value in zip(('chosen', 'rejected'), pair)
    )
    if prompt != other:
      raise harness.UserError(
        'the dialogues differ before their last turn, so that they are no '
        'answers to one prompt'
      )
    answers = [one, two]
  if not prompt:
    raise harness.UserError('there is no prompt')
  return Example(number, prompt, *answers)
