"""A model with encoded rows of both objectives, and their measures."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness
from experiments.harness.store import identity
from experiments.lm import (
  batches,
  objectives,
  stored_examples,
  tables,
  token_files,
  weights,
)
from experiments.lm import data as data_lib
from experiments.lm import tokenizer as tokenizer_lib
from experiments.lm import tuning as tuning_lib

# Rows to train on, rows on which MAXRIGHT evaluates both losses, and rows for
# the report.
SPLITS = ('train', 'refresh', 'held_out')


@dataclasses.dataclass(frozen=True)
class Sizes:
  """How rows become batches.

  Attributes:
    batch_size: rows of an update, comparisons or demonstrations.
    buckets: lengths to which rows are padded, tokens.
    held_out: rows of each kind for the report.
    refresh: rows of each kind on which MAXRIGHT evaluates both losses.
    train: largest number of rows of each kind to train on; 0 for all.
    micro_batches: parts of a batch that are evaluated in turn, for memory.
    overlap: whether to report on the first rows of the training data, as in the
      paper, instead of held-out rows.
    pack: whether several demonstrations share a row of the longest bucket in
      training; batch_size counts these rows.
    too_long: what happens to rows longer than the last bucket: leave_out, or
      truncate, which cuts off the end of their answers.
    turns: which of the assistant's turns in a demonstration are learned, the
      last one or all.
  """

  batch_size: int = 4
  buckets: tuple[int, ...] = (128, 256, 512)
  held_out: int = 64
  refresh: int = 16
  train: Annotated[int, harness.Allowed(low=0)] = 0
  micro_batches: int = 1
  overlap: bool = False
  pack: bool = False
  too_long: batches.TooLong = 'leave_out'
  turns: batches.Turns = 'last'


class Problem(NamedTuple):
  """Model and data of a run.

  Attributes:
    tuning: which weights are trained.
    model: the loaded model.
    tokenizer: of the model.
    frozen: weights that are not trained, for `harness.train`.
    tables: encoded rows by split and objective.
    left_out: numbers of rows that were left out, by objective and reason.
    prompts: prompts of the held-out comparisons.
    shape: parameters of the losses.
  """

  tuning: tuning_lib.Tuning
  model: weights.Model
  tokenizer: tokenizer_lib.Tokenizer
  frozen: Any
  tables: dict[str, dict[str, tables.Table]]
  left_out: dict[str, dict[str, int]]
  prompts: list[data_lib.Prompt]
  shape: objectives.Shape = objectives.Shape()

  @property
  def names(self) -> tuple[str, ...]:
    """Names of the objectives, two or one, demonstrations first."""
    return tuple(self.tables['train'])

  def weights(self, mixing_ratio: Any) -> dict[str, Any]:
    """Weights of the objectives by name; a single one has the weight 1."""
    two = len(self.names) == 2
    shares = (1 - mixing_ratio, mixing_ratio) if two else (1.0,)
    return dict(zip(self.names, shares, strict=True))

  def losses(
    self,
    train_tables: dict[str, tables.Table],
    frozen: Any,
    key: jax.Array,
    *,
    measure: Callable[..., Any] | None = None,
  ) -> dict[str, Callable[[Any, Any], Any]]:
    """Makes losses of (params, batch number); the key orders the rows.

    Args:
      train_tables: rows to train on, by objective.
      frozen: weights that are not trained.
      key: PRNG key of the seed.
      measure: as in `objectives.make`: then the losses return
        (loss, metrics).
    """
    # In the order of the names: within a compiled program, dicts are sorted.
    return {
      name: tables.numbered_loss(
        objectives.make(name, self.tuning, frozen, self.shape, measure=measure),
        dataclasses.replace(
          train_tables[name], seed=jax.random.bits(jax.random.fold_in(key, i))
        ),
        has_aux=measure is not None,
      )
      for i, name in enumerate(self.names)
    }


def prepare(
  model: weights.Model,
  tokenizer: tokenizer_lib.Tokenizer,
  tuning: tuning_lib.Tuning,
  examples: dict[str, Sequence[data_lib.Example]],
  sizes: Sizes,
  *,
  folder: Any = None,
  sources: Mapping[str, str] | None = None,
  skip: bool = False,
) -> Problem:
  """Encodes and splits the rows, and runs frozen layers and references once.

  Args:
    model: the loaded model.
    tokenizer: of the model.
    tuning: which weights are trained.
    examples: by objective, demonstrations first; or of one objective.
    sizes: how rows become batches.
    folder: cache of the outputs of frozen layers and references, or None.
    sources: files of the examples by objective, for error messages.
    skip: whether to leave out examples that the model's template refuses.

  Returns:
    A `Problem`.

  Raises:
    SettingsError: if too few rows fit.
    UserError: if no example has tokens to learn.
  """
  below, frozen = tuning.split(model.params)
  splits: dict[str, dict[str, tables.Table]] = {split: {} for split in SPLITS}
  left_out, prompts = {}, []
  for name, rows in examples.items():
    source = (sources or {}).get(name, name)
    options = {
      'max_length': sizes.buckets[-1],
      'skip': skip,
      'turns': sizes.turns if name in objectives.DEMONSTRATIONS else 'last',
      'too_long': sizes.too_long,
    }
    encode = functools.partial(
      batches.encode,
      tokenizer,
      rows,
      source=source,
      flag='--buckets, rising lengths in tokens,',
      **options,
    )
    if isinstance(rows, stored_examples.StoredExamples):
      encoded = token_files.load_or_encode(
        folder,
        f'{identity.digest_files(name, [rows.path], folder)} {options} '
        f'{objectives.kind(name)} {token_files.describe(tokenizer)}',
        lambda items, encode=encode: encode(items=items),
      )
    else:
      encoded = encode()
    columns: dict[str, np.ndarray] = {}
    if name in objectives.LABELLED:
      labels = [rows[place].wanted for place in encoded.places]
      columns['wanted'] = np.array(labels, np.int32)
    if encoded.truncated:
      print(f'{name}: {encoded.truncated} examples truncated.')
    left_out[name] = encoded.left_out
    for split, at in _split(source, encoded, sizes).items():
      items = encoded.items
      if split == 'train' and isinstance(items, token_files.TokenFile):
        items = items.select(at)
      else:
        items = [items[i] for i in at]
      part = encoded._replace(
        items=items, rows=encoded.rows[at], lengths=encoded.lengths[at]
      )
      own = {column: values[at] for column, values in columns.items()}
      if split == 'held_out' and own:
        _require_both(source, own['wanted'])
      size = sizes.batch_size // sizes.micro_batches
      if split == 'train' and sizes.pack and name in objectives.TOKEN_LOSSES:
        table = tables.packed(part, size, length=sizes.buckets[-1])
      elif split == 'train':
        table = tables.make(part, size, buckets=sizes.buckets, columns=own)
      else:
        # One batch of all rows, in the shortest bucket that holds them.
        table = tables.make(part, len(at), buckets=sizes.buckets, columns=own)
      if below is not None:
        table = tuning_lib.cache(
          model.config, below, table, dtype=tuning.dtype, folder=folder
        )
      if name in (*objectives.COMPARISONS, *objectives.REFERENCED):
        # The accuracy of rewards needs the reference of all comparisons.
        table = objectives.reference_columns(
          tuning, frozen, table, folder=folder
        )
      splits[split][name] = table
      if split == 'held_out' and name in objectives.COMPARISONS:
        prompts = [rows[int(encoded.places[i])].prompt for i in at]
  return Problem(tuning, model, tokenizer, frozen, splits, left_out, prompts)


def _require_both(source: str, wanted: np.ndarray) -> None:
  """Raises SettingsError if the labels of held-out rows are equal."""
  if wanted.min() == wanted.max():
    word = 'wanted' if wanted[0] else 'unwanted'
    raise harness.SettingsError(
      f'{source}: all {len(wanted)} held-out answers are {word}, expected both '
      'labels, true and false: give rows of both, or raise --held_out.'
    )


def _split(
  name: str, encoded: batches.Encoded, sizes: Sizes
) -> dict[str, np.ndarray]:
  """Indices of the examples of each split."""
  count = len(encoded.items)
  reserved = sizes.refresh + (0 if sizes.overlap else sizes.held_out)
  needed = max(reserved + sizes.batch_size, sizes.held_out)
  if count < needed:
    remedy = 'Give more rows'
    if encoded.too_long:
      remedy += ', longer --buckets'
    # A third of the rows that a batch leaves, for each of both.
    third = (count - sizes.batch_size) // 3
    held_out, refresh = min(third, sizes.held_out), min(third, sizes.refresh)
    refresh -= refresh % sizes.micro_batches
    if min(held_out, refresh) > 0:
      remedy += f', or --held_out={held_out} --refresh={refresh}'
    raise harness.SettingsError(
      f'{name}: {count} rows fit into {sizes.buckets[-1]} tokens '
      f'({encoded.too_long} are longer), but {needed} are needed: '
      f'held_out={sizes.held_out} for the report, refresh={sizes.refresh} for '
      f'maxright, and a batch of batch_size={sizes.batch_size}. {remedy}.'
    )
  order = np.random.default_rng(0).permutation(count)
  held_out, refresh, train = np.split(
    order, [reserved - sizes.refresh, reserved]
  )
  train = train[: sizes.train] if sizes.train else train
  if sizes.overlap:
    held_out = np.arange(sizes.held_out)
  return {'train': train, 'refresh': refresh, 'held_out': held_out}


def measure(
  problem: Problem,
  trained: Any,
  frozen: Any,
  held_out: dict[str, tables.Table],
  *,
  rows: int = 16,
) -> dict[str, jax.Array]:
  """Computes losses and the accuracy of rewards on rows.

  Args:
    problem: the problem.
    trained: trained weights.
    frozen: weights that are not trained.
    held_out: tables with one bucket, by objective.
    rows: number of rows at a time.

  Returns:
    Losses by objective, and `accuracy`: the fraction of comparisons whose
    implicit reward is higher for the chosen answer; ties count half. With
    labels, comparisons are all pairs of a wanted and an unwanted answer. And
    the means of rewards times beta: `rewards/chosen`, `rewards/rejected`, and
    their difference `rewards/margins`.
  """
  measures = {}
  for name, table in held_out.items():
    part, max_length = tables.all_rows(table), table.max_answers[0]
    names = objectives.token_names(name)
    # Single rows are not sharded.
    tuning = problem.tuning._replace(rows=None)

    def one(row, name=name, max_length=max_length, tuning=tuning):
      row = {n: leaf[None] for n, leaf in row.items()}
      return objectives.answers(
        name, tuning, trained, frozen, row, problem.shape, max_answer=max_length
      )

    answers = jax.lax.map(one, part, batch_size=rows)
    # From (examples, 1 or 2 answers, tokens) to (answers, tokens): the chosen
    # ones first.
    stacked = jax.tree.map(
      lambda leaf: jnp.moveaxis(leaf, 1, 0).reshape(-1, leaf.shape[-1]), answers
    )
    measures[name] = objectives.loss(name, stacked, part, problem.shape)
    if names == objectives.PAIR:
      chosen, rejected = jnp.split(stacked.total, 2)
      rewards = [
        total - part[f'reference_{n}_total']
        for n, total in zip(names, (chosen, rejected))
      ]
      difference = rewards[0] - rewards[1]
      measures['accuracy'] = jnp.mean((1 + jnp.sign(difference)) / 2)
      means = [jnp.mean(reward) for reward in rewards]
    elif name in objectives.LABELLED:
      rewards = stacked.total - part['reference_tokens_total']
      wanted = part['wanted'] > 0
      pairs = wanted[:, None] & ~wanted
      ranks = (1 + jnp.sign(rewards[:, None] - rewards)) / 2
      measures['accuracy'] = jnp.sum(pairs * ranks) / jnp.sum(pairs)
      means = [jnp.mean(rewards, where=label) for label in (wanted, ~wanted)]
    else:
      continue
    chosen, rejected = (problem.shape.beta * mean for mean in means)
    measures['rewards/chosen'], measures['rewards/rejected'] = chosen, rejected
    measures['rewards/margins'] = chosen - rejected
  return measures


def length_controls(problem: Problem) -> dict[str, float]:
  """Accuracy on held-out comparisons of preferences by length.

  Args:
    problem: the problem.

  Returns:
    Fractions of comparisons whose chosen answer has more tokens than the
    rejected one, `control/longer_answer`, and fewer, `control/shorter_answer`;
    ties count half. Empty without comparisons.
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
  """Makes a small random model of bytes, with rows.

  Demonstrations repeat a letter three times; comparisons prefer the next letter
  to the one before. The objectives conflict.

  Args:
    rows: number of each kind.
    dtype: of the weights; None for float32.

  Returns:
    The model, its tokenizer, and the examples by objective.
  """
  model, tokenizer = weights.make_random(dtype=dtype)
  letters = 'abcdefghijklmnop'
  rng = np.random.default_rng(0)
  indices = rng.integers(1, len(letters) - 1, size=rows)
  examples = {
    'sft': [
      data_lib.Example(i, f'say {letters[n]}: ', 3 * letters[n])
      for i, n in enumerate(indices)
    ],
    'dpo': [
      data_lib.Example(
        i, f'say {letters[n]}: ', 3 * letters[n + 1], 3 * letters[n - 1]
      )
      for i, n in enumerate(indices)
    ],
  }
  return model, tokenizer, examples
