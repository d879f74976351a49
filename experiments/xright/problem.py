"""A model, two sets of rows, and what is measured of both."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness
from experiments.lm import (
  batches,
  objectives,
  tables,
  tokenizer,
  weights,
)
from experiments.lm import data as data_lib
from experiments.lm import tuning as tuning_lib

# The parts into which rows are divided: to train on, for MAXRIGHT's looks at
# both losses, and for what is reported.
PARTS = ('train', 'refresh', 'held_out')


@dataclasses.dataclass(frozen=True)
class Sizes:
  """How rows become batches.

  Attributes:
    batch_size: rows of an update, comparisons or demonstrations.
    buckets: lengths to which rows are padded, tokens; longer rows are left out.
    held_out: rows of either kind that are reported on and not trained on.
    refresh: further rows of either kind, by which MAXRIGHT compares.
    train: at most so many rows of either kind are trained on; 0 for all.
    parts: micro-batches into which a batch is divided, for memory.
    overlap: the published rule: report on the first rows of the training data.
    pack: whether demonstrations that are trained on stand side by side in rows
      of the longest bucket; `batch_size` counts these rows then.
  """

  batch_size: int = 4
  buckets: tuple[int, ...] = (128, 256, 512)
  held_out: int = 64
  refresh: int = 16
  train: Annotated[int, harness.Allowed(low=0)] = 0
  parts: int = 1
  overlap: bool = False
  pack: bool = False


class Problem(NamedTuple):
  """All that a run needs.

  Attributes:
    tuning: what is trained.
    model: as it was loaded.
    words: its tokeniser.
    frozen: weights that are not trained, for `harness.train`.
    tables: by part and objective.
    left: rows that were left out, by objective.
    prompts: of the comparisons that are held out.
    shape: numbers of the losses.
  """

  tuning: tuning_lib.Tuning
  model: weights.Model
  words: tokenizer.Tokenizer
  frozen: Any
  tables: dict[str, dict[str, tables.Table]]
  left: dict[str, int]
  prompts: list[data_lib.Prompt]
  shape: objectives.Shape = objectives.Shape()

  @property
  def names(self) -> tuple[str, ...]:
    """Of the objectives, two or one: demonstrations first."""
    return tuple(self.tables['train'])

  def losses(
    self,
    given: dict[str, tables.Table],
    frozen: Any,
    key: jax.Array,
  ) -> dict[str, Callable[[Any, Any], jax.Array]]:
    """Losses of numbers of batches, in an order of the key.

    Args:
      given: the tables to train on.
      frozen: what is not trained.
      key: of the seed.
    """
    # In the order of the names: within a compiled program, dicts are sorted.
    return {
      name: tables.numbered_loss(
        objectives.make(name, self.tuning, frozen, self.shape),
        dataclasses.replace(
          given[name], seed=jax.random.bits(jax.random.fold_in(key, i))
        ),
      )
      for i, name in enumerate(self.names)
    }


def prepare(
  model: weights.Model,
  words: tokenizer.Tokenizer,
  tuning: tuning_lib.Tuning,
  examples: dict[str, Sequence[data_lib.Example]],
  sizes: Sizes,
  *,
  folder: Any = None,
  sources: Mapping[str, str] | None = None,
  skip: bool = False,
) -> Problem:
  """Encodes and divides the rows, and computes what stays the same once.

  Args:
    model: as it was loaded.
    words: its tokeniser.
    tuning: what is trained.
    examples: of both objectives by name, demonstrations first; or of one.
    sizes: how rows become batches.
    folder: where what is computed once is kept, for a run that goes on.
    sources: where the examples of an objective are from, for messages.
    skip: whether to leave out examples that the model's template refuses.

  Returns:
    A `Problem`.

  Raises:
    SettingsError: if too few rows fit.
    UserError: if there is nothing to learn from.
  """
  below, frozen = tuning.split(model.params)
  found: dict[str, dict[str, tables.Table]] = {part: {} for part in PARTS}
  left, prompts = {}, []
  for name, rows in examples.items():
    source = (sources or {}).get(name, name)
    encoded = batches.encode(
      words,
      rows,
      max_length=sizes.buckets[-1],
      source=source,
      flag='--buckets, rising lengths in tokens,',
      skip=skip,
    )
    left[name] = len(rows) - len(encoded.items)
    for part, at in _divided(source, encoded, sizes).items():
      some = encoded._replace(
        items=[encoded.items[i] for i in at],
        rows=encoded.rows[at],
        lengths=encoded.lengths[at],
      )
      each = sizes.batch_size // sizes.parts
      if part == 'train' and sizes.pack and name in objectives.TOKEN_LOSSES:
        table = tables.packed(some, each, length=sizes.buckets[-1])
      elif part == 'train':
        table = tables.make(some, each, buckets=sizes.buckets)
      else:
        table = tables.make(some, len(at), buckets=sizes.buckets[-1:])
      if below is not None:
        table = tuning_lib.cache(
          model.config, below, table, dtype=tuning.dtype, folder=folder
        )
      if name in (*objectives.COMPARISONS, *objectives.REFERENCED):
        # Of comparisons always: the accuracy of rewards needs it too.
        table = objectives.reference_columns(
          tuning, frozen, table, folder=folder
        )
      found[part][name] = table
      if part == 'held_out' and name in objectives.COMPARISONS:
        by_row = {example.row: example.prompt for example in rows}
        prompts = [by_row[int(row)] for row in some.rows]
  return Problem(tuning, model, words, frozen, found, left, prompts)


def _divided(
  name: str, encoded: batches.Encoded, sizes: Sizes
) -> dict[str, np.ndarray]:
  """Which examples are of which part."""
  count = len(encoded.items)
  apart = sizes.refresh + (0 if sizes.overlap else sizes.held_out)
  need = max(apart + sizes.batch_size, sizes.held_out)
  if count < need:
    raise harness.SettingsError(
      f'{name}: {count} rows fit into {sizes.buckets[-1]} tokens '
      f'({encoded.too_long} are longer), but {need} are needed: '
      f'{sizes.held_out} held out, {sizes.refresh} for looks at the loss, and '
      f'a batch of {sizes.batch_size}. Give more rows, longer --buckets, or a '
      'smaller --held_out.'
    )
  order = np.random.default_rng(0).permutation(count)
  held, refresh, rest = np.split(order, [apart - sizes.refresh, apart])
  rest = rest[: sizes.train] if sizes.train else rest
  if sizes.overlap:
    held = np.arange(sizes.held_out)
  return {'train': rest, 'refresh': refresh, 'held_out': held}


def measure(
  problem: Problem,
  trained: Any,
  frozen: Any,
  held_out: dict[str, tables.Table],
  *,
  rows: int = 16,
) -> dict[str, jax.Array]:
  """Losses on rows that are not trained on, some at a time.

  Args:
    problem: the problem.
    trained: what is trained, as it is now.
    frozen: what is not.
    held_out: tables of one bucket.
    rows: at a time.

  Returns:
    By the name of each objective its loss; `accuracy`, the share of comparisons
    in which the implicit reward is higher for what was chosen, ties counting
    half.
  """
  found = {}
  for name, table in held_out.items():
    part, longest = tables.all_rows(table), table.max_answers[0]
    names = objectives.token_names(name)
    # One row at a time, and some of them side by side: not split.
    tuning = problem.tuning._replace(rows=None)

    def one(row, name=name, longest=longest, tuning=tuning):
      row = {n: leaf[None] for n, leaf in row.items()}
      return objectives.answers(
        name, tuning, trained, frozen, row, problem.shape, max_answer=longest
      )

    answers = jax.lax.map(one, part, batch_size=rows)
    # From (examples, answers of each, tokens) to all rows, kind by kind.
    turned = jax.tree.map(
      lambda leaf: jnp.moveaxis(leaf, 1, 0).reshape(-1, leaf.shape[-1]), answers
    )
    loss = objectives.loss(name, turned, part, problem.shape)
    found[name] = loss
    if names == objectives.PAIR:
      chosen, rejected = jnp.split(turned.total, 2)
      gained = [
        total - part[f'reference_{n}_total']
        for n, total in zip(names, (chosen, rejected))
      ]
      found['accuracy'] = jnp.mean((1 + jnp.sign(gained[0] - gained[1])) / 2)
  return found


def length_controls(problem: Problem) -> dict[str, float]:
  """The accuracy on held-out comparisons of a preference for length.

  Args:
    problem: the problem.

  Returns:
    The share of comparisons whose chosen answer has more tokens than the
    rejected one, as `control/longer_answer`, and fewer, as
    `control/shorter_answer`; ties count half. Empty without comparisons.
  """
  for name, table in problem.tables['held_out'].items():
    if name in objectives.COMPARISONS:
      part = tables.all_rows(table)
      chosen, rejected = (
        np.asarray(part[f'{n}_mask']).sum(axis=1, dtype=int)
        for n in objectives.PAIR
      )
      longer = float(np.mean((1 + np.sign(chosen - rejected)) / 2))
      return {
        'control/longer_answer': longer,
        'control/shorter_answer': 1 - longer,
      }
  return {}


def made_up(
  rows: int = 64, dtype: Any = None
) -> tuple[Any, Any, dict[str, Any]]:
  """A small random model of bytes with rows of its own, for a first try.

  Demonstrations answer a letter by itself three times, comparisons prefer the
  next letter to the one before: not both can be had.

  Args:
    rows: of each kind.
    dtype: of the weights; None for float32.

  Returns:
    The model, its tokeniser, and the examples by objective.
  """
  model, words = weights.make_random(dtype=dtype)
  letters = 'abcdefghijklmnop'
  rng = np.random.default_rng(0)
  drawn = rng.integers(1, len(letters) - 1, size=rows)
  examples = {
    'sft': [
      data_lib.Example(i, f'say {letters[n]}: ', 3 * letters[n])
      for i, n in enumerate(drawn)
    ],
    'dpo': [
      data_lib.Example(
        i, f'say {letters[n]}: ', 3 * letters[n + 1], 3 * letters[n - 1]
      )
      for i, n in enumerate(drawn)
    ],
  }
  return model, words, examples
