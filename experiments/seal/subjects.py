"""A model, of which the last layers are trained, and rows as it takes them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness
from experiments.lm import batches, objectives, tables
from experiments.lm import tuning as tuning_lib

# Of what leaves the frozen layers, for all rows of a file.
CACHE_BYTES = 8 * 2**30


class Made(NamedTuple):
  """Rows as a model takes them.

  Attributes:
    rows: arrays by name with a leading axis of rows: `tokens`, `mask`, and
      `tokens_x`, what leaves the frozen layers; of comparisons the same of
      `chosen` and `rejected`; and what a reference says, for a loss that has
      one.
    places: of each among the examples, (rows,).
    longest: tokens of the longest answer.
  """

  rows: tables.Rows
  places: np.ndarray
  longest: int

  def part(self, which: np.ndarray) -> 'Made':
    """Some of the rows, of (rows,) of bool."""
    at = np.flatnonzero(which)
    return self._replace(rows=take(self.rows, at), places=self.places[at])

  def joined(self, other: 'Made') -> 'Made':
    """Rows of two sets."""
    put = lambda a, b: np.concatenate([np.asarray(a), np.asarray(b)])
    return Made(
      {n: put(self.rows[n], other.rows[n]) for n in self.rows},
      put(self.places, other.places),
      max(self.longest, other.longest),
    )


class Subject(NamedTuple):
  """A model, of which the last layers are trained.

  Attributes:
    tuning: what is trained.
    frozen: what is not.
    below: the layers under those that are trained, None without any.
    words: the tokeniser.
    shape: numbers of the losses.
  """

  tuning: tuning_lib.Tuning
  frozen: Any
  below: Any
  words: Any
  shape: objectives.Shape = objectives.Shape()

  def make(
    self,
    examples: Sequence[Any],
    longest: int,
    *,
    loss: str = 'sft',
    source: str = '',
    skip: bool = False,
  ) -> Made:
    """Encodes rows, those that fit, and runs the frozen layers once.

    Args:
      examples: the rows.
      longest: tokens of a prompt with its answer.
      loss: what for: of comparisons, or of what is to be learnt of them alone.
      source: where they are from, for messages.
      skip: whether to leave out rows that the model's template refuses.

    Raises:
      UserError: if none fits, one has no second answer and the loss is of
        comparisons, or what is to be held is too large.
    """
    pairs = loss in objectives.COMPARISONS
    if not pairs:
      examples = [one._replace(rejected=None) for one in examples]
    for one in examples:
      if pairs and one.rejected is None:
        raise harness.UserError(
          f'{source}: row {one.row} (from 0) has one answer, but {loss} '
          'compares two, chosen and rejected.'
        )
    encoded = batches.encode(
      self.words,
      examples,
      max_length=longest,
      source=source,
      flag='--max_length',
      skip=skip,
    )
    # One length for all sets: one program.
    table = tables.make(encoded, 1, buckets=(longest,))
    if self.below is not None:
      _require_room(len(encoded.rows) * (1 + pairs), longest, self.tuning)
      table = tuning_lib.cache(
        self.tuning.config, self.below, table, dtype=self.tuning.dtype
      )
    if loss in objectives.REFERENCED:
      table = objectives.reference_columns(self.tuning, self.frozen, table)
    rows = tables.all_rows(table)
    rows.pop('index')
    return Made(rows, np.array(encoded.places), table.max_answers[0])


def _require_room(rows: int, longest: int, how: tuning_lib.Tuning) -> None:
  """Raises UserError if what leaves the frozen layers cannot be held."""
  size = jnp.dtype(how.dtype or jnp.float32).itemsize
  needed = rows * longest * how.config.width * size
  if needed > CACHE_BYTES:
    raise harness.UserError(
      f'what leaves the frozen layers takes {needed / 2**30:.1f} GB for {rows} '
      f'rows of {longest} tokens, more than {CACHE_BYTES / 2**30:.0f}: with '
      '--layers=0 all layers get adapters and nothing is kept, at the price of '
      'a whole pass a step; or take a smaller --max_length, or fewer rows.'
    )


def row_losses(
  subject: Subject, trained: Any, frozen: Any, rows: tables.Rows, longest: int
) -> jax.Array:
  """Minus the mean log-probability of each answer's tokens, (rows,)."""
  found = subject.tuning.answers(trained, frozen, rows, max_answer=longest)
  return -found.mean


def losses_of(
  name: str,
  subject: Subject,
  trained: Any,
  frozen: Any,
  rows: tables.Rows,
  longest: int,
) -> jax.Array:
  """The loss of each row by an objective, (rows,); `sft` is `row_losses`.

  Of `kto`, which compares rows, all have the same: that of the batch.
  """
  if name == 'sft':
    return row_losses(subject, trained, frozen, rows, longest)
  found = objectives.answers(
    name,
    subject.tuning,
    trained,
    frozen,
    rows,
    subject.shape,
    max_answer=longest,
  )
  if name == 'kto':
    loss = objectives.loss(name, found, rows, subject.shape)
    return jnp.full(len(rows['chosen']), loss)
  return objectives.row_losses(name, found, rows, subject.shape)


def take(rows: tables.Rows, at: Any) -> tables.Rows:
  """Some of the rows."""
  return {name: leaf[at] for name, leaf in rows.items()}
