"""Dialogues as messages: their roles, turns in a text, and the last answer."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import harness

Messages = tuple[Mapping[str, str], ...]
# Messages of a dialogue, or a text that is continued as it stands.
Prompt = Messages | str

_ROLES = {
  'system': 'system',
  'user': 'user',
  'human': 'user',
  'assistant': 'assistant',
  'gpt': 'assistant',
}
_MARKS = {'Human': 'user', 'Assistant': 'assistant'}
# Turns stand behind a blank line, in some files behind a line break, as the
# last mark does, which waits for an answer.
_TURNS = tuple(
  re.compile(rf'(?:^\s*|{gap})(Human|Assistant):')
  for gap in (r'\n\n|\n(?=Assistant:\s*\Z)', r'\n')
)


def is_empty(value: Any) -> bool:
  """Whether a field counts as missing."""
  return value is None or value in ('', [], {})


def require_text(value: Any, key: str) -> str:
  """Returns the text under a key; raises UserError if it is none or blank."""
  if not isinstance(value, str) or not value.strip():
    shown = repr(value) if isinstance(value, str) else type(value).__name__
    raise harness.UserError(f'{key} is {shown}, expected a text')
  return require_encodable(value, key)


def require_encodable(value: str, key: str) -> str:
  """Returns a text; raises UserError if UTF-8 cannot hold it."""
  try:
    value.encode()
  except UnicodeEncodeError as error:
    raise harness.UserError(
      f'{key} has half of a surrogate pair at character {error.start}, which '
      'is no text: save it as UTF-8 again'
    ) from error
  return value


def as_messages(value: Any, key: str) -> Messages:
  """Converts a list to messages with `role` and `content`.

  Args:
    value: of the row.
    key: under which it stands.

  Returns:
    Messages of `system` (the first one only), `user` and `assistant`; a blank
    system message is left out.

  Raises:
    UserError: for other roles and fields, or contents that are no texts.
  """
  if isinstance(value, Mapping):
    value = [value]
  if not isinstance(value, Sequence) or isinstance(value, str) or not value:
    raise harness.UserError(f'{key} is no list of messages')
  messages = []
  for i, message in enumerate(value):
    place = f'message {i} of {key}'
    if not isinstance(message, Mapping):
      raise harness.UserError(f'{place} is no object with role and content')
    sharegpt = not is_empty(message.get('from'))
    names = ('from', 'value') if sharegpt else ('role', 'content')
    role, content = (message.get(name) for name in names)
    for field, entry in message.items():
      if field not in names and not is_empty(entry):
        raise harness.UserError(
          f'{place} has the field {field!r}, which is not supported: a message '
          f'has {names[0]} and {names[1]} only'
        )
    if not isinstance(role, str) or not isinstance(content, str):
      raise harness.UserError(
        f'{place} has no {names[0]} and {names[1]} that are texts'
      )
    if role not in _ROLES or (_ROLES[role] == 'system' and i):
      raise harness.UserError(
        f'{place} has the role {role!r}, expected system (the first one only), '
        'user or assistant; calls of tools are not supported'
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
    last = messages[-1]['role'] if messages else 'system'
    raise harness.UserError(
      f"the last message of {key} is of {last!r}, expected 'assistant', the "
      'answer'
    )
  *before, last = messages
  return tuple(before), require_text(
    last['content'], f'the last message of {key}'
  )


def turns_of(text: str) -> Messages:
  r"""Splits a text at `Human:` and `Assistant:` into messages.

  Args:
    text: any. Turns are separated by blank lines, or by line breaks if the
      first answer stands behind one.

  Returns:
    Messages; the last one may be empty. None if the text does not begin with
    a turn.

  Example:
    >>> [m['role'] for m in turns_of('Human: Hi\n\nAssistant: Hm')]
    ['user', 'assistant']
    >>> turns_of('What does "Human: Hi" mean?')
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
  """Splits an answer from the turns in front of it.

  Args:
    value: messages or a text.
    key: under which it stands.
    marked: whether the prompt is a text with turns after `Human:`.

  Returns:
    The turns, and the answer.
  """
  if isinstance(value, (list, dict)):
    return split(as_messages(value, key), key)
  turns = turns_of(require_text(value, key))
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
  return isinstance(value, str) and _asks(turns_of(value))


def _asks(messages: Sequence[Mapping[str, str]]) -> bool:
  return any(message['role'] == 'user' for message in messages)


def open_dialogue(text: str, key: str) -> Messages:
  """A dialogue that waits for an answer; empty if the text is no dialogue."""
  turns = turns_of(text)
  if not _asks(turns):
    return ()
  if turns[-1]['role'] == 'user':
    return turns
  if turns[-1]['content']:
    raise harness.UserError(
      f'{key} is a dialogue that ends with an answer, expected one that ends '
      'with a turn of Human: or with an empty Assistant:'
    )
  return turns[:-1]


def full_prompt(prompt: Prompt, before: Messages, key: str) -> Prompt:
  """Merges a prompt and the turns in front of its answer, which may repeat it.

  Raises:
    UserError: if the turns are of another prompt.
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
    f'the turns of {key} before its answer are not those of the prompt'
  )
