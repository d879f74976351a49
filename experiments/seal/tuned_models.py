"""A language model whose last layers are trained, and rows encoded for it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness
from experiments.lm import batches, objectives, tables
from experiments.lm import tuning as tuning_lib

# Limit of the cached outputs of the frozen layers, for all rows of a file.
CACHE_BYTES = 8 * 2**30


class EncodedRows(NamedTuple):
  """Rows as arrays.

  Attributes:
    rows: arrays by name with a leading axis of rows: `tokens`, `mask`, and
      `tokens_x`, the output of the frozen layers. Comparisons have the same
      arrays for `chosen` and `rejected`. Losses with a reference add its
      log-probabilities.
    indices: index of each row among the examples, (rows,).
    max_length: tokens of the longest answer.
  """

  rows: tables.Rows
  indices: np.ndarray
  max_length: int

  def subset(self, mask: np.ndarray) -> 'EncodedRows':
    """Selects rows by a mask, bool (rows,)."""
    at = np.flatnonzero(mask)
    return self._replace(rows=take(self.rows, at), indices=self.indices[at])

  def joined(self, other: 'EncodedRows') -> 'EncodedRows':
    """Concatenates the rows of two sets."""
    put = lambda a, b: np.concatenate([np.asarray(a), np.asarray(b)])
    return EncodedRows(
      {n: put(self.rows[n], other.rows[n]) for n in self.rows},
      put(self.indices, other.indices),
      max(self.max_length, other.max_length),
    )


class TunedModel(NamedTuple):
  """A language model whose last layers are trained.

  Attributes:
    tuning: which weights are trained.
    frozen: the frozen weights that a training step reads.
    below: the layers below the trained ones; None without any.
    tokenizer: of the model.
    shape: parameters of the losses.
  """

  tuning: tuning_lib.Tuning
  frozen: Any
  below: Any
  tokenizer: Any
  shape: objectives.Shape = objectives.Shape()

  def encode(
    self,
    examples: Sequence[Any],
    max_length: int,
    *,
    loss: str = 'sft',
    source: str = '',
    skip: bool = False,
  ) -> EncodedRows:
    """Encodes the rows that fit, and runs the frozen layers once per row.

    Args:
      examples: the rows.
      max_length: tokens of a prompt with its answer.
      loss: the objective: one of comparisons needs rejected answers, the others
        read chosen answers only.
      source: origin of the rows, for error messages.
      skip: whether to leave out rows that the model's template refuses.

    Raises:
      UserError: if no row fits, if an objective of comparisons gets a row with
        one answer, or if the outputs of the frozen layers need too much memory.
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
      self.tokenizer,
      examples,
      max_length=max_length,
      source=source,
      flag='--max_length',
      skip=skip,
    )
    # One length for all sets: one program.
    table = tables.make(encoded, 1, buckets=(max_length,))
    if self.below is not None:
      _require_room(len(encoded.rows) * (1 + pairs), max_length, self.tuning)
      table = tuning_lib.cache(
        self.tuning.config, self.below, table, dtype=self.tuning.dtype
      )
    if loss in objectives.REFERENCED:
      table = objectives.reference_columns(self.tuning, self.frozen, table)
    rows = tables.all_rows(table)
    rows.pop('index')
    return EncodedRows(rows, np.array(encoded.places), table.max_answers[0])


def _require_room(
  rows: int, max_length: int, tuning: tuning_lib.Tuning
) -> None:
  """Raises UserError if the outputs of the frozen layers are too large."""
  size = jnp.dtype(tuning.dtype or jnp.float32).itemsize
  needed = rows * max_length * tuning.config.width * size
  if needed > CACHE_BYTES:
    raise harness.UserError(
      f'the cached outputs of the frozen layers take {needed / 2**30:.1f} GB '
      f'for {rows} rows of {max_length} tokens, more than '
      f'{CACHE_BYTES / 2**30:.0f}: take --layers=0, which caches nothing and '
      'runs the whole model in each step, a smaller --max_length or fewer rows.'
    )


def row_losses(
  model: TunedModel,
  trained: Any,
  frozen: Any,
  rows: tables.Rows,
  max_length: int,
) -> jax.Array:
  """Computes minus the mean log-probability of answer tokens, (rows,)."""
  answers = model.tuning.answers(trained, frozen, rows, max_answer=max_length)
  return -answers.mean


def objective_losses(
  name: str,
  model: TunedModel,
  trained: Any,
  frozen: Any,
  rows: tables.Rows,
  max_length: int,
) -> jax.Array:
  """Computes the loss of each row, (rows,); `sft` is `row_losses`.

  `kto` compares the rows of a batch: each row gets the loss of the batch.
  """
  if name == 'sft':
    return row_losses(model, trained, frozen, rows, max_length)
  answers = objectives.answers(
    name,
    model.tuning,
    trained,
    frozen,
    rows,
    model.shape,
    max_answer=max_length,
  )
  if name == 'kto':
    loss = objectives.loss(name, answers, rows, model.shape)
    return jnp.full(len(rows['chosen']), loss)
  return objectives.row_losses(name, answers, rows, model.shape)


def take(rows: tables.Rows, at: Any) -> tables.Rows:
  """Selects rows by their indices."""
  return {name: leaf[at] for name, leaf in rows.items()}
