"""Encodes examples as tokens with a mask of the answer, and pads them.

The prompt and the answer are encoded separately: no token merges across their
boundary, and the prompt has the same tokens as in generation. Control tokens
come only from the template and the end of an answer. Their text within a prompt
or an answer is encoded as plain text, with a warning.
"""

import array
import bisect
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments import harness
from experiments.lm import control_tokens
from experiments.lm import data as data_lib
from experiments.lm import tokenizer as tokenizer_lib

# Which turns of the assistant are learned, and what happens to long examples.
Turns = Literal['last', 'all']
TooLong = Literal['leave_out', 'truncate']
# Arrays of packed rows.
PACKED = ('tokens', 'mask', 'segments', 'positions')


class Encoded(NamedTuple):
  """Encoded examples and counts of skipped ones.

  Attributes:
    rows: row numbers in the file, (examples,).
    items: arrays by name of each example, a list or a `token_files.TokenFile`:
      `tokens` and `mask` of a demonstration, or `chosen`, `chosen_mask`,
      `rejected` and `rejected_mask` of a comparison; and `index`, the place of
      the example.
    lengths: length of the longer sequence, (examples,).
    too_long: number of examples that were too long and left out.
    empty: number of examples with an empty answer after the template.
    equal: number of comparisons whose answers have equal tokens.
    refused: messages about examples that the template refuses.
    controls: number of texts of control tokens in the examples.
    places: index of each encoded example among all examples, (examples,).
    truncated: number of examples whose end was cut off.
  """

  rows: np.ndarray
  items: Any
  lengths: np.ndarray
  too_long: int
  empty: int = 0
  equal: int = 0
  refused: tuple[str, ...] = ()
  controls: int = 0
  places: Any = ()
  truncated: int = 0

  @property
  def left_out(self) -> dict[str, int]:
    """Numbers of unusable examples by reason, without zeros."""
    counts = {
      'too long': self.too_long,
      'no token to learn': self.empty,
      'two equal answers': self.equal,
      'refused by the chat template': len(self.refused),
    }
    return {reason: count for reason, count in counts.items() if count}


def mask_name(tokens: str) -> str:
  """Returns the name of the mask of tokens: `mask` or `chosen_mask`."""
  return 'mask' if tokens == 'tokens' else f'{tokens}_mask'


def encode_prompt(
  tokenizer: tokenizer_lib.Tokenizer, prompt: data_lib.Prompt
) -> list[int]:
  """Encodes a prompt up to the start of the answer.

  Args:
    tokenizer: tokeniser of the model.
    prompt: messages, rendered by the model's template, or a text.

  Raises:
    UserError: if the prompt has messages and the model has no template.
  """
  if isinstance(prompt, str):
    return tokenizer.encode_plain(prompt, first=True)
  hidden = [tokenizer.hide(message) for message in prompt]
  return tokenizer.encode_rendered(tokenizer.render(hidden, answer=True))


def encode_answer(
  tokenizer: tokenizer_lib.Tokenizer,
  prompt: data_lib.Prompt,
  answer: str,
  *,
  turns: Turns = 'last',
) -> tuple[np.ndarray, np.ndarray]:
  """Encodes a prompt with an answer.

  Args:
    tokenizer: tokeniser of the model.
    prompt: messages, rendered by the model's template, or a text.
    answer: text of the answer, without its end token.
    turns: 'last' to mark the answer, 'all' to mark the assistant's turns in the
      prompt too.

  Returns:
    Tokens and a mask of the marked turns, int32 (length,).

  Raises:
    UserError: if the template does not end a dialogue with its answer.
  """
  if isinstance(prompt, str):
    first = tokenizer.encode_plain(prompt, first=True)
    then = [*tokenizer.encode_plain(answer), tokenizer.end]
    parts = [(first, 0), (then, 1)]
  else:
    messages = [*prompt, {'role': 'assistant', 'content': answer}]
    parts = _encode_turns(
      tokenizer, [tokenizer.hide(message) for message in messages], turns
    )
  tokens = [token for part, _ in parts for token in part]
  mask = [marked for part, marked in parts for _ in part]
  return np.array(tokens, np.int32), np.array(mask, np.int32)


def _encode_turns(
  tokenizer: tokenizer_lib.Tokenizer,
  hidden: Sequence[tokenizer_lib.Message],
  turns: Turns,
) -> list[tuple[list[int], int]]:
  """Encodes a dialogue as parts of tokens with a mark."""
  last, done = len(hidden) - 1, 0
  parts: list[tuple[list[int], int]] = []
  text = tokenizer.render(hidden)
  for i, message in enumerate(hidden):
    if message['role'] != 'assistant' or (turns == 'last' and i < last):
      continue
    before = tokenizer.render(hidden[:i], answer=True)
    until = text if i == last else tokenizer.render(hidden[: i + 1])
    if not (text.startswith(until) and until.startswith(before)):
      raise harness.UserError(
        'the chat template renders the prompt differently with and without an '
        'answer, so that the tokens of the answer are unknown: give prompts as '
        'texts, or train on the last turn only.'
      )
    parts.append((tokenizer.encode_rendered(before[done:]), 0))
    then = tokenizer.encode_rendered(until[len(before) :])
    done = len(until)
    # What the template adds after the end is no part of the answer.
    if tokenizer.end in then:
      size = len(then) - then[::-1].index(tokenizer.end)
    else:
      size = len(then)
    parts.append((then[:size], 1))
    if i < last:
      parts.append((then[size:], 0))
    elif size == 0 or then[size - 1] != tokenizer.end:
      parts.append(([tokenizer.end], 1))
  return parts


def warn_of_controls(
  tokenizer: tokenizer_lib.Tokenizer,
  examples: Sequence[data_lib.Example],
  source: str = '',
) -> int:
  """Counts texts of control tokens in examples, and warns about them.

  Args:
    tokenizer: tokeniser of the model.
    examples: the examples.
    source: name of their file, for the warning.

  Returns:
    The number of occurrences.
  """
  counter = control_tokens.Counter(tokenizer.controls())
  for example in examples:
    counter.add(_texts(example), example.row)
  return counter.warn(source)


def _texts(example: data_lib.Example) -> list[str]:
  prompt = example.prompt
  texts = [prompt] if isinstance(prompt, str) else []
  texts += [] if isinstance(prompt, str) else [m['content'] for m in prompt]
  return [*texts, example.answer, example.rejected or '']


def encode(
  tokenizer: tokenizer_lib.Tokenizer,
  examples: Sequence[data_lib.Example],
  *,
  max_length: int,
  source: str = '',
  flag: str = '',
  skip: bool = False,
  turns: Turns = 'last',
  too_long: TooLong = 'leave_out',
  items: Any = None,
) -> Encoded:
  """Encodes examples; skips and counts unusable ones.

  Args:
    tokenizer: tokeniser of the model.
    examples: demonstrations or comparisons, not both.
    max_length: largest number of tokens of a prompt with its answer.
    source: name of the file, for messages.
    flag: flag that allows longer examples, for messages.
    skip: whether to skip examples that the template refuses.
    turns: as in `encode_answer`.
    too_long: 'leave_out' skips long examples; 'truncate' cuts off their end, so
      that an answer has no end token, and skips those whose prompt is too long.
    items: empty list of the encoded examples, or a `token_files.TokenFile`;
      None for a new list.

  Returns:
    An `Encoded`.

  Raises:
    UserError: if demonstrations and comparisons are mixed, no example remains,
      or without `skip`, if the template refuses one.
  """
  prefix = f'{source}: ' if source else ''
  counter = control_tokens.Counter(tokenizer.controls())
  kinds: set[bool] = set()
  items = [] if items is None else items
  # Arrays take a fifth of the memory of lists.
  rows, lengths, places = (array.array('q') for _ in range(3))
  longer = truncated = empty = equal = 0
  refused: list[str] = []
  for place, example in enumerate(examples):
    counter.add(_texts(example), example.row)
    kinds.add(example.rejected is None)
    if len(kinds) > 1:
      raise harness.UserError(
        f'{prefix}got demonstrations and comparisons, expected examples of one '
        'kind.'
      )
    answers = [example.answer]
    if example.rejected is not None:
      answers.append(example.rejected)
    try:
      pairs = [
        encode_answer(tokenizer, example.prompt, answer, turns=turns)
        for answer in answers
      ]
    except harness.UserError as error:
      reason = f'{prefix}row {example.row} (from 0): {error}'
      if not skip:
        raise harness.UserError(reason) from error
      refused.append(reason)
      continue
    length = max(len(tokens) for tokens, _ in pairs)
    cut = length > max_length
    if cut:
      pairs = [(t[:max_length], m[:max_length]) for t, m in pairs]
      # Comparisons that are cut before they differ are too long, too.
      same = len(pairs) == 2 and np.array_equal(pairs[0][0], pairs[1][0])
      short = any(mask.sum() < 2 for _, mask in pairs)
      if too_long == 'leave_out' or same or short:
        longer += 1
        continue
      length = max_length
    if any(mask.sum() < 2 for _, mask in pairs):
      empty += 1
      continue
    if len(pairs) == 2 and np.array_equal(pairs[0][0], pairs[1][0]):
      equal += 1
      continue
    item = dict(zip(('tokens', 'mask'), pairs[0]))
    if len(pairs) == 2:
      (chosen, chosen_mask), (rejected, rejected_mask) = pairs
      item = {'chosen': chosen, 'chosen_mask': chosen_mask}
      item |= {'rejected': rejected, 'rejected_mask': rejected_mask}
    item['index'] = np.int32(len(items))
    truncated += cut
    rows.append(example.row)
    places.append(place)
    items.append(item)
    lengths.append(length)
  if not len(items):
    remedy = f' {flag} allows longer examples.' if flag and longer else ''
    if refused:
      remedy += f' The template refuses {len(refused)}; the first: {refused[0]}'
    raise harness.UserError(
      f'{prefix}no example of {len(examples)} is usable: {longer} are longer '
      f'than {max_length} tokens, {empty} have an empty answer, {equal} have '
      f'two equal answers.{remedy}'
    )
  if refused:
    print(
      f'{prefix}rows skipped, since the template refuses them: {len(refused)}. '
      f'The first: {refused[0]}',
      file=sys.stderr,
    )
  return Encoded(
    np.array(rows),
    items,
    np.array(lengths),
    longer,
    empty,
    equal,
    tuple(refused),
    counter.warn(source),
    np.array(places),
    truncated,
  )


def stacked(encoded: Encoded, length: int | None = None) -> dict[str, Any]:
  """Stacks all examples, padded to one length, for data on the device.

  Args:
    encoded: the examples.
    length: length to pad to; by default the longest.

  Returns:
    int32 (examples, length) by name.
  """
  length = int(encoded.lengths.max()) if length is None else length
  count = len(encoded.items)
  arrays: dict[str, Any] = {}
  for name in encoded.items[0]:
    if name != 'index':
      arrays[name] = np.zeros((count, length), np.int32)
      for row, item in zip(arrays[name], encoded.items):
        row[: len(item[name])] = item[name]
  arrays['index'] = np.arange(count, dtype=np.int32)
  return arrays


def assign_rows(encoded: Encoded, length: int) -> list[list[int]]:
  """Assigns demonstrations to rows by best-fit decreasing.

  Args:
    encoded: demonstrations.
    length: tokens of a row.

  Returns:
    Indices of the demonstrations of each row in `encoded.items`.

  Raises:
    UserError: if the examples are comparisons, or one is longer than a row.
  """
  if 'tokens' not in encoded.items[0]:
    raise harness.UserError(
      'comparisons are not packed, since their log-probabilities are sums over '
      'a row: give demonstrations.'
    )
  if (longest := int(encoded.lengths.max())) > length:
    raise harness.UserError(
      f'a demonstration of {longest} tokens does not fit into rows of '
      f'{length}: pack longer rows.'
    )
  rooms: list[tuple[int, int]] = []  # Sorted: free tokens, row.
  rows: list[list[int]] = []
  for place in np.argsort(-encoded.lengths, kind='stable'):
    size = int(encoded.lengths[place])
    best = bisect.bisect_left(rooms, (size, -1))
    if best == len(rooms):
      room, row = length, len(rows)
      rows.append([])
    else:
      room, row = rooms.pop(best)
    rows[row].append(int(place))
    bisect.insort(rooms, (room - size, row))
  return rows


def packed(encoded: Encoded, length: int) -> dict[str, Any]:
  """Packs demonstrations into rows, see `assign_rows` and `pack`.

  Raises:
    UserError: as `assign_rows`.
  """
  return pack(encoded.items, assign_rows(encoded, length), length)


def pack(items: Any, rows: Sequence[Iterable[int]], length: int) -> Any:
  """Joins demonstrations to rows.

  Args:
    items: demonstrations by index, in `Encoded.items` for instance.
    rows: indices of the demonstrations of each row.
    length: tokens of a row.

  Returns:
    int32 (rows, length) by name: `tokens`; `mask`, zero for the first token of
    each demonstration, which has no prediction; `segments`, 1 + the index of
    the demonstration, or 0 for padding; and `positions`, which start at 0 in
    each. For `log_probs.from_tokens`.
  """
  arrays = {name: np.zeros((len(rows), length), np.int32) for name in PACKED}
  for row, places in enumerate(rows):
    start = 0
    for place in places:
      item = items[place]
      part = (row, slice(start, start + len(item['tokens'])))
      start = part[1].stop
      arrays['tokens'][part] = item['tokens']
      arrays['mask'][part] = item['mask']
      arrays['mask'][row, part[1].start] = 0
      arrays['segments'][part] = place + 1
      arrays['positions'][part] = np.arange(len(item['tokens']))
  return arrays
