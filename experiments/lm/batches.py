"""Examples as tokens with a mask of the answer, and as padded arrays.

The prompt and the answer are encoded each on its own: so the mask is exact
whatever would merge across their boundary, and the prompt's tokens are those
that it has when an answer is sampled. Control tokens are those of the template
and the one that ends an answer: the text of one within a prompt or an answer is
encoded as plain text, with a warning.
"""

import bisect
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import harness
from experiments.lm import data as data_lib
from experiments.lm import tokenizer as tokenizer_lib


class Encoded(NamedTuple):
  """Encoded examples, those that fit.

  Attributes:
    rows: the numbers of the rows in their file, (examples,).
    items: for each, arrays by name; of a demonstration `tokens` and `mask`, of
      a comparison `chosen`, `chosen_mask`, `rejected` and `rejected_mask`; and
      the example's own place, `index`.
    lengths: of the longer sequence of each, (examples,).
    left: how many were too long.
    empty: how many more had an answer without any token but the one that ends
      it: a template may strip what looked like a text.
    equal: how many comparisons were of two answers with the same tokens, which
      say nothing.
    refused: why the template refuses further examples.
    controls: how often the text of a control token occurs in the examples.
    places: where each encoded example stands among those that were given.
  """

  rows: np.ndarray
  items: list[dict[str, np.ndarray]]
  lengths: np.ndarray
  left: int
  empty: int = 0
  equal: int = 0
  refused: tuple[str, ...] = ()
  controls: int = 0
  places: tuple[int, ...] = ()


def encode_prompt(
  tokenizer: tokenizer_lib.Tokenizer, prompt: data_lib.Prompt
) -> list[int]:
  """Tokens of a prompt, up to where an answer begins.

  Args:
    tokenizer: of the model.
    prompt: messages, which are rendered by the model's template, or a text.

  Raises:
    UserError: if messages are given and the model has no template.
  """
  if isinstance(prompt, str):
    return tokenizer.encode_plain(prompt, first=True)
  hidden = [tokenizer.hide(message) for message in prompt]
  return tokenizer.encode_rendered(tokenizer.render(hidden, answer=True))


def encode_answer(
  tokenizer: tokenizer_lib.Tokenizer, prompt: data_lib.Prompt, answer: str
) -> tuple[np.ndarray, np.ndarray]:
  """Tokens of a prompt with an answer, and which are the answer's.

  Args:
    tokenizer: of the model.
    prompt: messages, which are rendered by the model's template, or a text.
    answer: the text after it; the token that ends it is added.

  Returns:
    Tokens, int32, and a mask, both (length,).

  Raises:
    UserError: if the template does not end a dialogue with its answer.
  """
  if isinstance(prompt, str):
    first = tokenizer.encode_plain(prompt, first=True)
    then = [*tokenizer.encode_plain(answer), tokenizer.end]
  else:
    last = tokenizer.hide({'role': 'assistant', 'content': answer})
    hidden = [tokenizer.hide(message) for message in prompt]
    before = tokenizer.render(hidden, answer=True)
    rendered = tokenizer.render([*hidden, last])
    if not rendered.startswith(before):
      raise harness.UserError(
        'the chat template renders a dialogue with its answer otherwise than '
        'it renders what comes before it: it cannot be told which tokens are '
        'the answer. Give prompts as texts.'
      )
    first = tokenizer.encode_rendered(before)
    then = tokenizer.encode_rendered(rendered[len(before) :])
    if tokenizer.end in then:  # And what a template adds behind it.
      then = then[: len(then) - then[::-1].index(tokenizer.end)]
    else:
      then = [*then, tokenizer.end]
  tokens = np.array([*first, *then], np.int32)
  mask = np.arange(len(tokens)) >= len(first)
  return tokens, mask.astype(np.int32)


def warn_of_controls(
  tokenizer: tokenizer_lib.Tokenizer,
  examples: Sequence[data_lib.Example],
  source: str = '',
) -> int:
  """Counts texts of control tokens in examples, and prints a line if any.

  Args:
    tokenizer: of the model.
    examples: whose prompts and answers are looked at.
    source: where they are from, for the line.

  Returns:
    How many occurrences there are.
  """
  controls = tokenizer.controls()
  counts = []
  for example in examples:
    prompt = example.prompt
    texts = [prompt] if isinstance(prompt, str) else []
    texts += [] if isinstance(prompt, str) else [m['content'] for m in prompt]
    texts += [example.answer, example.rejected or '']
    counts.append(sum(map(controls.count, texts)))
  total = sum(counts)
  if total:
    place = next(e.row for e, count in zip(examples, counts) if count)
    print(
      f'{source or "examples"}: warning: the text of control tokens occurs '
      f'{total} times, first in row {place} (from 0); it is encoded as plain '
      'text. A dialogue is given as messages, not in the form of a template.',
      file=sys.stderr,
    )
  return total


def encode(
  tokenizer: tokenizer_lib.Tokenizer,
  examples: Sequence[data_lib.Example],
  *,
  longest: int,
  source: str = '',
  flag: str = '',
  skip: bool = False,
) -> Encoded:
  """Encodes examples; what cannot be learnt from is left out and counted.

  Those that are too long are not cut: an answer without its end teaches not to
  end. So no row has a mask of zeros, and no loss is a mean over nothing.

  Args:
    tokenizer: of the model.
    examples: all demonstrations, or all comparisons.
    longest: tokens of a prompt with its answer.
    source: where the examples are from, for messages.
    flag: by which a user lets examples be longer, likewise.
    skip: whether to leave out examples that the template refuses.

  Returns:
    An `Encoded`.

  Raises:
    UserError: if demonstrations and comparisons are mixed, none is left, or
      without `skip`, if the template refuses one.
  """
  told = f'{source}: ' if source else ''
  kinds = {example.rejected is None for example in examples}
  if len(kinds) != 1:
    raise harness.UserError(
      f'{told}examples are either demonstrations or comparisons, one or more; '
      'got '
      f'{"both" if kinds else "none"}.'
    )
  rows, items, lengths, places = [], [], [], []
  left = empty = equal = 0
  refused: list[str] = []
  for place, example in enumerate(examples):
    answers = [example.answer]
    if example.rejected is not None:
      answers.append(example.rejected)
    try:
      pairs = [encode_answer(tokenizer, example.prompt, a) for a in answers]
    except harness.UserError as error:
      reason = f'{told}row {example.row} (from 0): {error}'
      if not skip:
        raise harness.UserError(reason) from error
      refused.append(reason)
      continue
    length = max(len(tokens) for tokens, _ in pairs)
    if length > longest:
      left += 1
      continue
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
    rows.append(example.row)
    places.append(place)
    items.append(item)
    lengths.append(length)
  if not items:
    mend = f' {flag} lets examples be longer.' if flag and left else ''
    if refused:
      mend += f' The template refuses {len(refused)}; the first: {refused[0]}'
    raise harness.UserError(
      f'{told}none of {len(examples)} examples is left: {left} do not fit into '
      f'{longest} tokens, {empty} have an empty answer, {equal} two answers '
      f'that are equal.{mend}'
    )
  if refused:
    print(
      f'{told}rows skipped, since the template refuses them: {len(refused)}. '
      f'The first: {refused[0]}',
      file=sys.stderr,
    )
  return Encoded(
    np.array(rows),
    items,
    np.array(lengths),
    left,
    empty,
    equal,
    tuple(refused),
    warn_of_controls(tokenizer, examples, source),
    tuple(places),
  )


def padding(items: Sequence[dict[str, Any]]) -> dict[str, int]:
  """What each array of an example is filled up with, for `harness.Stream`."""
  return {name: 0 for name in items[0] if name != 'index'}


def stream(
  encoded: Encoded,
  batch_size: int | Sequence[int],
  buckets: Sequence[int],
  *,
  seed: int = 0,
) -> harness.Stream:
  """Shuffled batches, each of one length.

  Args:
    encoded: the examples.
    batch_size: examples in a batch, or one number for each bucket.
    buckets: rising lengths to which batches are padded; those that no example
      needs are left out.
    seed: of the order.

  Returns:
    A stream for `harness.train(stream=...)`.

  Raises:
    SettingsError: if an example is longer than the last bucket, or a bucket has
      fewer examples than a batch.
  """
  buckets = tuple(buckets)
  which = np.searchsorted(buckets, encoded.lengths)
  used = [i for i in range(len(buckets)) if np.any(which == i)]
  if np.ndim(batch_size):
    batch_size = [np.asarray(batch_size)[i] for i in used]
  if np.any(which == len(buckets)):
    used = list(range(len(buckets)))  # The stream says it.
  return harness.Stream(
    encoded.items,
    batch_size,
    seed=seed,
    lengths=encoded.lengths,
    buckets=tuple(buckets[i] for i in used),
    pad=padding(encoded.items),
  )


def stacked(encoded: Encoded, length: int | None = None) -> dict[str, Any]:
  """All examples as arrays of one length, for data that stays on the device.

  Args:
    encoded: the examples.
    length: to pad to; by default the longest.

  Returns:
    By name, (examples, length), int32.
  """
  length = int(encoded.lengths.max()) if length is None else length
  count = len(encoded.items)
  found: dict[str, Any] = {}
  for name, value in padding(encoded.items).items():
    out = np.full((count, length), value, np.int32)
    for row, item in zip(out, encoded.items):
      row[: len(item[name])] = item[name]
    found[name] = out
  found['index'] = np.arange(count, dtype=np.int32)
  return found


def packed(encoded: Encoded, length: int) -> dict[str, Any]:
  """Demonstrations side by side in rows, so that little is padding.

  Best fit: the longest are placed first, each into the row where it leaves the
  least room. The same examples always give the same rows.

  Args:
    encoded: demonstrations.
    length: tokens of a row.

  Returns:
    By name, (rows, length), int32: `tokens`; `mask`, zero for the first token
    of each demonstration, which nothing predicts; `segments`, 1 + the place of
    the demonstration in `encoded.items`, 0 where there is none; and
    `positions`, which start at 0 in each. For `log_probs.of_model`.

  Raises:
    UserError: if they are comparisons, or one is longer than a row.
  """
  if 'tokens' not in encoded.items[0]:
    raise harness.UserError(
      'comparisons are not packed: their log-probabilities are sums over a '
      'row. Give demonstrations.'
    )
  if (longest := int(encoded.lengths.max())) > length:
    raise harness.UserError(
      f'a demonstration of {longest} tokens does not fit into rows of {length}.'
    )
  rooms: list[tuple[int, int]] = []  # Sorted: tokens left, row.
  rows: list[list[int]] = []
  for place in np.argsort(-encoded.lengths, kind='stable'):
    size = int(encoded.lengths[place])
    at = bisect.bisect_left(rooms, (size, -1))
    if at == len(rooms):
      room, row = length, len(rows)
      rows.append([])
    else:
      room, row = rooms.pop(at)
    rows[row].append(int(place))
    bisect.insort(rooms, (room - size, row))
  names = ('tokens', 'mask', 'segments', 'positions')
  found = {name: np.zeros((len(rows), length), np.int32) for name in names}
  for row, places in enumerate(rows):
    start = 0
    for place in places:
      item = encoded.items[place]
      part = (row, slice(start, start + len(item['tokens'])))
      start = part[1].stop
      found['tokens'][part] = item['tokens']
      found['mask'][part] = item['mask']
      found['mask'][row, part[1].start] = 0
      found['segments'][part] = place + 1
      found['positions'][part] = np.arange(len(item['tokens']))
  return found
