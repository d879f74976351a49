"""Dialogues as messages: roles, turns in a text, and the last answer."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import harness

Messages = tuple[Mapping[str, str], ...]
# Messages of a dialogue, or a text to continue.
Prompt = Messages | str

_ROLES = {
  'system': 'system',
  'user': 'user',
  'human': 'user',
  'assistant': 'assistant',
  'gpt': 'assistant',
}
_MARKS = {'Human': 'user', 'Assistant': 'assistant'}
# Turns follow a blank line, in some files a line break. An empty last
# `Assistant:` may always follow a line break.
_TURNS = tuple(
  re.compile(rf'(?:^\s*|{gap})(Human|Assistant):')
  for gap in (r'\n\n|\n(?=Assistant:\s*\Z)', r'\n')
)


def is_empty(value: Any) -> bool:
  """Whether a field counts as missing."""
  return value is None or value in ('', [], {})


def require_text(value: Any, key: str) -> str:
  """Returns the text under a key; raises UserError if it is blank or no str."""
  if not isinstance(value, str) or not value.strip():
    shown = repr(value) if isinstance(value, str) else type(value).__name__
    raise harness.UserError(f'{key} is {shown}, expected a text')
  return require_encodable(value, key)


def require_encodable(value: str, key: str) -> str:
  """Returns a text; raises UserError if UTF-8 cannot encode it."""
  try:
    value.encode()
  except UnicodeEncodeError as error:
    raise harness.UserError(
      f'{key} has an unpaired surrogate at character {error.start}: save the '
      'file as UTF-8 again'
    ) from error
  return value


def as_messages(value: Any, key: str) -> Messages:
  """Converts a list to messages with `role` and `content`.

  Args:
    value: value in the row.
    key: its key, for messages.

  Returns:
    Messages by `system` (only the first one), `user` and `assistant`, without
    blank system messages.

  Raises:
    UserError: for other roles and fields, or contents that are not texts.
  """
  if isinstance(value, Mapping):
    value = [value]
  if not isinstance(value, Sequence) or isinstance(value, str) or not value:
    raise harness.UserError(f'{key} is not a list of messages')
  messages = []
  for i, message in enumerate(value):
    place = f'message {i} of {key}'
    if not isinstance(message, Mapping):
      raise harness.UserError(f'{place} is not an object with role and content')
    sharegpt = not is_empty(message.get('from'))
    names = ('from', 'value') if sharegpt else ('role', 'content')
    role, content = (message.get(name) for name in names)
    for field, entry in message.items():
      if field not in names and not is_empty(entry):
        raise harness.UserError(
          f'{place} has the field {field!r}, which is not supported: give only '
          f'{names[0]} and {names[1]}'
        )
    if not isinstance(role, str) or not isinstance(content, str):
      raise harness.UserError(
        f'{place} needs {names[0]} and {names[1]} that are texts'
      )
    if role not in _ROLES or (_ROLES[role] == 'system' and i):
      raise harness.UserError(
        f'{place} has the role {role!r}, expected system (only the first one), '
        'user or assistant; tool calls are not supported'
      )
    if _ROLES[role] == 'system' and not content.strip():
      continue
    messages.append(
      {'role': _ROLES[role], 'content': require_encodable(content, place)}
    )
  return tuple(messages)


def split(messages: Messages, key: str) -> tuple[Messages, str]:
  """Splits a dialogue into the prompt and its last turn, the answer."""
  if not messages or messages[-1]['role'] != 'assistant':
    role = messages[-1]['role'] if messages else 'system'
    raise harness.UserError(
      f"the last message of {key} is by {role!r}, expected 'assistant', the "
      'answer'
    )
  *before, last = messages
  return tuple(before), require_text(
    last['content'], f'the last message of {key}'
  )


def parse_turns(text: str) -> Messages:
  r"""Splits a text at `Human:` and `Assistant:` into messages.

  Args:
    text: any text. Turns are separated by blank lines, or by line breaks if the
      first answer follows one.

  Returns:
    Messages; the last one may be empty. () if the text does not begin with a
    turn.

  Example:
    >>> [m['role'] for m in parse_turns('Human: Hi\n\nAssistant: Hm')]
    ['user', 'assistant']
    >>> parse_turns('What does "Human: Hi" mean?')
    ()
  """
  wide, narrow = _TURNS
  if not wide.match(text):
    return ()
  first = re.search(r'(\n*)\nAssistant:', text)
  pattern = narrow if first and not first[1] else wide
  _, *parts = pattern.split(text)
  return tuple(
    {'role': _MARKS[mark], 'content': content.strip()}
    for mark, content in zip(parts[::2], parts[1::2])
  )


def split_answer(value: Any, key: str, *, marked: bool) -> tuple[Messages, str]:
  """Splits an answer from the preceding turns.

  Args:
    value: messages or a text.
    key: its key, for messages.
    marked: whether the prompt is a text with turns after `Human:`.

  Returns:
    The turns, and the answer.
  """
  if isinstance(value, (list, dict)):
    return split(as_messages(value, key), key)
  turns = parse_turns(require_text(value, key))
  if len(turns) > 1 and _asks(turns):
    return split(turns, key)
  if marked and '\n\nHuman:' in value:
    raise harness.UserError(
      f'{key} has further turns of Human:, expected one answer'
    )
  if marked and [turn['role'] for turn in turns] == ['assistant']:
    value = turns[0]['content']
  return (), require_text(value, key)


def is_marked(value: Any) -> bool:
  """Whether a value is a text with a turn after `Human:`."""
  return isinstance(value, str) and _asks(parse_turns(value))


def _asks(messages: Sequence[Mapping[str, str]]) -> bool:
  return any(message['role'] == 'user' for message in messages)


def open_dialogue(text: str, key: str) -> Messages:
  """Parses a dialogue without its last answer; () for other texts."""
  turns = parse_turns(text)
  if not _asks(turns):
    return ()
  if turns[-1]['role'] == 'user':
    return turns
  if turns[-1]['content']:
    raise harness.UserError(
      f'{key} is a dialogue that ends with an answer, expected a last turn of '
      'Human: or an empty Assistant:'
    )
  return turns[:-1]


def full_prompt(prompt: Prompt, before: Messages, key: str) -> Prompt:
  """Merges a prompt with the turns before its answer, which may repeat it.

  Raises:
    UserError: if the turns belong to another prompt.
  """
  if not before:
    return prompt
  if isinstance(prompt, str):
    if before[-1]['content'].strip() == prompt.strip():
      return before
  elif prompt in (before[: len(prompt)], before[-len(prompt) :]):
    return before
  elif before[0]['role'] == 'assistant':
    return (*prompt, *before)
  raise harness.UserError(
    f'the turns of {key} before its answer differ from the prompt'
  )
