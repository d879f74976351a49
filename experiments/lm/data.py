r"""Prompts and answers from rows in public formats.

`row_files` describes the files. A row has one of these forms; `Q` is `prompt`,
`instruction` or `question`:

| keys | meaning |
|---|---|
| `messages` or `conversations` | a dialogue (OpenAI, TRL; ShareGPT); its last turn is the answer |
| `Q` and `response`, `completion` or `output` | a prompt and its answer (TRL, Alpaca, Dolly, OpenOrca) |
| `question`, `answer` | the same |
| `instruction`, `instances` of `input` and `output` | a prompt with several inputs (Self-Instruct) |
| `Q`, `chosen`, `rejected` | a prompt and two answers (TRL) |
| `chosen`, `rejected` | two dialogues that differ in their last turn (HH-RLHF) |
| `text` | a text without a prompt, to continue training on (TRL) |

A demonstration with `label` (or `kto_tag`) is an answer that is wanted or
unwanted (TRL's format for KTO).

A prompt or an answer is a text or a list of messages with `role` and `content`
(or `from` and `value`), by `system`, `user` and `assistant`. A text with turns
after `Human:` and `Assistant:` is a dialogue under any key. Other text under
`prompt` is continued directly; under `instruction` and `question` it is a
user's turn, followed by `input` or `context`. `system` or `system_prompt` is
prepended to a dialogue.

Unsupported fields that change the meaning of a row make it invalid: tools and
tool calls, images, other roles, further fields of a message. Null or empty
fields count as missing; other keys are ignored.
"""  # noqa: E501

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments import harness
from experiments.lm import dialogues, row_files, row_kinds

Prompt = dialogues.Prompt

_QUESTIONS = ('prompt', 'instruction', 'question')
_ANSWERS = ('response', 'completion', 'output', 'answer')
_DIALOGUES = ('messages', 'conversations')
_INPUTS = ('input', 'context')
_SYSTEMS = ('system', 'system_prompt')
_UNSUPPORTED = (
  'tools',
  'functions',
  'tool_calls',
  'function_call',
  'history',
  'image',
  'images',
  'video',
  'videos',
  'audio',
  'audios',
)


class Example(NamedTuple):
  """A demonstration (prompt and answer), or a comparison of two answers.

  Attributes:
    row: row number in the file, from 0, without blank lines; instances of a row
      share it.
    prompt: messages or a text.
    answer: the answer, or the chosen answer.
    rejected: the rejected answer; None for a demonstration.
    wanted: label of a single answer; None without one.
  """

  row: int
  prompt: Prompt
  answer: str
  rejected: str | None = None
  wanted: bool | None = None


class Read(NamedTuple):
  """The content of a file.

  Attributes:
    raw: objects of the file by row number; None for invalid rows. Empty for
      examples that stay in the file.
    examples: examples of the valid rows, a list or
      `stored_examples.StoredExamples`.
    wrong: one message per invalid row, with file and line.
  """

  raw: list[dict[str, Any] | None]
  examples: Any
  wrong: list[str]


def read(
  path: str | pathlib.Path,
  *,
  skip: bool = False,
  flag: str = '',
  kind: row_kinds.Kind | None = None,
  prompts_only: bool = False,
  store: Any = None,
) -> Read:
  """Reads the rows of a file; reports each invalid row by line number.

  Args:
    path: the file.
    skip: whether to skip invalid rows.
    flag: flag that skips invalid rows, for the message.
    kind: kind of the rows; None allows demonstrations and comparisons.
    prompts_only: whether to read prompts alone; answers may be missing.
    store: `stored_examples.StoredExamples` for examples that stay in the
      file; None for a list.

  Returns:
    A `Read`.

  Raises:
    UserError: as `row_files.scan`; for the first invalid row without `skip`;
      with it, if no row is valid.
  """
  result = Read([], [] if store is None else store, [])
  rows = (row_files.scan if store is None else row_files.iterate)(path)
  for row in rows:
    value, reason = row.value, row.reason
    if value is not None:
      try:
        if prompts_only:
          examples = [Example(row.number, as_prompt(value), '')]
        else:
          examples = as_examples(value, row.number)
        row_kinds.require(examples, kind, value)
        if store is None:
          result.examples.extend(examples)
        else:
          store.add(row, len(examples))
      except harness.UserError as error:
        value, reason = None, str(error)
    if store is None:
      result.raw.append(value)
    if not reason:
      continue
    line = f'{path}, {row.place}: {reason}.'
    if not skip:
      remedy = f' {flag} skips such rows.' if flag else ''
      raise harness.UserError(f'{line}{remedy}')
    result.wrong.append(line)
  if not len(result.examples):
    raise harness.UserError(f'{path} has no valid row: {result.wrong[0]}')
  return result


def read_examples(
  path: str | pathlib.Path, *, skip: bool = False
) -> tuple[list[Example], list[str]]:
  """Reads the examples and the messages of skipped rows, see `read`."""
  result = read(path, skip=skip)
  return result.examples, result.wrong


def as_examples(row: Mapping[str, Any], number: int = 0) -> list[Example]:
  """Converts a row to one example, or to one per instance.

  Raises:
    UserError: as `as_example`, with the number of the instance.
  """
  if 'instances' not in row or 'instruction' not in row:
    return [as_example(row, number)]
  instances = row['instances']
  if not isinstance(instances, list) or not instances:
    raise harness.UserError('instances is not a list of input and output')
  shared = {k: v for k, v in row.items() if k not in ('instances', *_INPUTS)}
  examples = []
  for i, instance in enumerate(instances):
    if not isinstance(instance, Mapping) or 'output' not in instance:
      raise harness.UserError(f'instance {i} has no output')
    fields = {n: instance[n] for n in ('input', 'output') if n in instance}
    try:
      examples.append(as_example({**shared, **fields}, number))
    except harness.UserError as error:
      raise harness.UserError(f'instance {i}: {error}') from error
  return examples


def as_example(row: Mapping[str, Any], number: int = 0) -> Example:
  """Converts a row to an example.

  Raises:
    UserError: if the keys match none of the forms, a text is missing or empty,
      a field is not supported, or two dialogues differ before their last turn.
  """
  nulls = [key for key, value in row.items() if value is None]
  row = {key: value for key, value in row.items() if value is not None}
  _refuse_fields(row)
  pair = [key for key in ('chosen', 'rejected') if key in row]
  if len(pair) == 2:
    prompt, *answers = _comparison(row)
  elif pair:
    _refuse_nulls(nulls, ('chosen', 'rejected'))
    raise harness.UserError(
      f'the row has only {pair[0]}, expected chosen and rejected'
    )
  elif (key := _only(row, _DIALOGUES, 'dialogues')) is not None:
    turns = dialogues.as_messages(row[key], key)
    prompt, answer = dialogues.split(turns, key)
    _require_turns(row, key, turns)
    answers = [answer]
  elif 'text' in row and not any(k in row for k in (*_QUESTIONS, *_ANSWERS)):
    prompt, answer = _split_text(dialogues.require_text(row['text'], 'text'))
    answers = [answer]
  else:
    prompt, answer = _demonstration(row, nulls)
    answers = [answer]
  labels = (row.get(key) for key in row_kinds.LABELS)
  wanted = next((label for label in labels if isinstance(label, bool)), None)
  prompt = _with_system(prompt, row)
  return Example(number, prompt, *answers, wanted=wanted)


def as_prompt(row: Mapping[str, Any]) -> Prompt:
  """Converts a row to a prompt; the answer may be missing.

  Raises:
    UserError: as `as_example`, for the prompt.
  """
  row = {key: value for key, value in row.items() if value is not None}
  _refuse_fields({k: v for k, v in row.items() if k not in row_kinds.LABELS})
  if (key := _only(row, _DIALOGUES, 'dialogues')) is not None:
    prompt: Prompt = dialogues.as_messages(row[key], key)
    if prompt and prompt[-1]['role'] == 'assistant':
      prompt = prompt[:-1]
  elif (key := _only(row, _QUESTIONS, 'prompts')) is not None:
    prompt = _prompt(row, key)
  else:
    return as_example(row).prompt
  return _with_system(prompt, row)


def _refuse_fields(row: Mapping[str, Any]) -> None:
  """Raises UserError for unsupported fields that change a row's meaning."""
  for key in _UNSUPPORTED:
    if not dialogues.is_empty(row.get(key)):
      raise harness.UserError(
        f'{key} is not supported: give texts, or messages of system, user and '
        'assistant'
      )
  row_kinds.refuse_unclear(row)


def _refuse_nulls(nulls: Sequence[str], keys: Sequence[str]) -> None:
  """Raises UserError if a value that a row needs is null."""
  for key in keys:
    if key in nulls:
      raise harness.UserError(f'{key} is null, expected a text or messages')


def _split_text(text: str) -> tuple[Prompt, str]:
  """Splits a dialogue; other texts are an answer without a prompt."""
  if dialogues.is_marked(text):
    return dialogues.split(dialogues.parse_turns(text), 'text')
  return '', text


def _require_turns(
  row: Mapping[str, Any], key: str, turns: dialogues.Messages
) -> None:
  """Raises UserError if a row has a text that its dialogue does not contain.

  A prompt may also contain a turn: some data sets prepend the system message or
  the whole dialogue to it.
  """
  texts = [turn['content'].strip() for turn in turns]
  for name in (*_QUESTIONS, *_ANSWERS[:-1]):
    value = row.get(name)
    text = value.strip() if isinstance(value, str) else ''
    if text and not any(text in t or (t and t in text) for t in texts):
      raise harness.UserError(
        f'{name} is not a turn of {key}, so the row is ambiguous: remove one '
        'of them'
      )


def _only(row: Mapping[str, Any], keys: Sequence[str], kind: str) -> str | None:
  """Returns the key of a row among alternatives, or None."""
  present = [key for key in keys if key in row]
  if len(present) > 1 and any(row[k] != row[present[0]] for k in present):
    raise harness.UserError(
      f'the row has several {kind}, {" and ".join(present)}: keep one of them'
    )
  return present[0] if present else None


def _prompt(row: Mapping[str, Any], key: str) -> Prompt:
  """Returns the prompt under a key: messages, or a text to continue."""
  value = row[key]
  filled = {k: v for k, v in row.items() if v != ''}
  input_key = _only(filled, _INPUTS, 'inputs')
  extra = row[input_key] if input_key else ''
  if not isinstance(extra, str):
    raise harness.UserError(
      f'{input_key} is {type(extra).__name__}, expected a text'
    )
  if isinstance(value, (list, dict)):
    prompt: Prompt = dialogues.as_messages(value, key)
  else:
    text = dialogues.require_text(value, key)
    prompt = dialogues.open_dialogue(text, key) or text
  if key != 'prompt' and isinstance(prompt, str):
    extra = dialogues.require_encodable(extra, str(input_key))
    text = f'{prompt}\n\n{extra}' if extra.strip() else prompt
    return ({'role': 'user', 'content': text},)
  if extra.strip():
    raise harness.UserError(
      f'{input_key} is not supported with {key}: put it into the last turn of '
      f'{key}'
    )
  return prompt


def _demonstration(
  row: Mapping[str, Any], nulls: Sequence[str]
) -> tuple[Prompt, str]:
  question = _only(row, _QUESTIONS, 'prompts')
  # With other keys, `answer` is often just the result of a problem.
  answers = _ANSWERS if question == 'question' else _ANSWERS[:-1]
  answer = _only(row, answers, 'answers')
  if question is None or answer is None:
    missing = () if answer else answers
    missing += () if question else _QUESTIONS
    others = (*_DIALOGUES, 'text', 'chosen', 'rejected')
    _refuse_nulls(nulls, (*missing, *others))
    raise harness.UserError(
      f'the keys are {sorted(row)}; expected messages, or prompt and response, '
      'or instruction and output, or prompt, chosen and rejected'
    )
  prompt = _prompt(row, question)
  marked = dialogues.is_marked(row[question])
  before, text = dialogues.split_answer(row[answer], answer, marked=marked)
  prompt = _as_messages(prompt, row[answer])
  return dialogues.full_prompt(prompt, before, answer), text


def _as_messages(prompt: Prompt, answer: Any) -> Prompt:
  """Converts a text to a user's turn if its answer is a message."""
  if isinstance(prompt, str) and not isinstance(answer, str):
    return ({'role': 'user', 'content': prompt},)
  return prompt


def _comparison(row: Mapping[str, Any]) -> tuple[Prompt, str, str]:
  key = _only(row, (*_QUESTIONS, 'conversations'), 'prompts')
  prompt: Prompt = _prompt(row, key) if key else ()
  marked = key is not None and dialogues.is_marked(row[key])
  prompts, answers = [], []
  for name in ('chosen', 'rejected'):
    before, answer = dialogues.split_answer(row[name], name, marked=marked)
    if key is None and not before:
      raise harness.UserError(
        f'{name} is not a dialogue with turns of Human: and Assistant:, and '
        'the row has no prompt'
      )
    own_prompt = _as_messages(prompt, row[name]) if key else before
    prompts.append(dialogues.full_prompt(own_prompt, before, name))
    answers.append(answer)
  if prompts[0] != prompts[1]:
    raise harness.UserError(
      'the dialogues differ before their last turn, expected two answers to '
      'one prompt'
    )
  return prompts[0], answers[0], answers[1]


def _with_system(prompt: Prompt, row: Mapping[str, Any]) -> Prompt:
  """Prepends the system message of a row to a prompt.

  Raises:
    UserError: if the last message before the answer is not the user's.
  """
  key = _only(row, _SYSTEMS, 'system messages')
  system = row[key] if key else ''
  if not isinstance(prompt, str):
    if not any(m['role'] == 'user' and m['content'].strip() for m in prompt):
      raise harness.UserError('the row has no user turn before the answer')
    if prompt[-1]['role'] != 'user':
      raise harness.UserError(
        f'the turn before the answer is by {prompt[-1]["role"]!r}, expected '
        "'user'"
      )
  if isinstance(system, str) and not system.strip():
    return prompt
  dialogues.require_text(system, str(key))
  if isinstance(prompt, str) or prompt[0]['role'] == 'system':
    raise harness.UserError(
      f'{key} needs a prompt of messages without a system message: give both '
      'as messages'
    )
  return ({'role': 'system', 'content': system}, *prompt)
