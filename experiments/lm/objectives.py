"""Objectives of language models by name.

| name | rows | loss |
|---|---|---|
| `sft` | demonstrations | negative mean log-probability per token |
| `chord` | demonstrations | `sft` with token weights p (1 - p) |
| `distillation` | demonstrations | divergence from a teacher per token |
| `uft` | demonstrations | implicit reward with target 1 |
| `dpo` | comparisons | direct preference optimisation, summed over tokens |
| `ipo` | comparisons | margin of a fixed size, of means over tokens |
| `kto` | comparisons | separate losses of wanted and unwanted answers |
| `kto_labelled` | labelled answers | the same |
| `orpo` | comparisons | odds ratio, and fine-tuning on chosen answers |
| `uft_pairs` | comparisons | implicit rewards with targets 1 and 0 |

`uft`, `dpo`, `ipo`, `kto`, `kto_labelled` and `uft_pairs` compare with a
reference, whose log-probabilities are columns of the rows, see
`reference_columns`. The baseline of `kto` is the mean log-ratio of the batch's
own answers, at least 0 and without a gradient; its authors use answers to other
prompts, which needs another pass. The teacher of `distillation` runs on the
same rows with the weights `frozen['teacher']`; it may have other sizes, but the
same vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import bilevel_jax as bj
from experiments import harness
from experiments.lm import (
  array_cache,
  decoder,
  log_probs,
  row_kinds,
  tables,
)
from experiments.lm import tuning as tuning_lib
from experiments.lm.config import Config

DEMONSTRATIONS = ('sft', 'chord', 'distillation', 'uft')
COMPARISONS = ('dpo', 'ipo', 'kto', 'orpo', 'uft_pairs')
LABELLED = ('kto_labelled',)
MEANINGS = {
  'sft': 'negative log-probability per token.',
  'chord': 'sft with token weights p (1 - p).',
  'distillation': 'divergence from a teacher per token.',
  'uft': 'implicit reward with target 1.',
  'dpo': 'direct preference optimisation, summed over tokens.',
  'ipo': 'a margin of a fixed size, of means over tokens.',
  'kto': 'separate losses of wanted and unwanted answers.',
  'kto_labelled': 'kto of single answers with a label.',
  'orpo': 'odds ratio, and fine-tuning on chosen answers.',
  'uft_pairs': 'implicit rewards with targets 1 and 0.',
}
PAIR = ('chosen', 'rejected')
# Objectives with a reference, and objectives that are means over tokens.
REFERENCED = ('uft', 'dpo', 'ipo', 'kto', 'kto_labelled', 'uft_pairs')
TOKEN_LOSSES = ('sft', 'chord', 'distillation')
# Rows that are read from a file at once, a multiple of those per batch.
_CHUNK = 512


class Shape(NamedTuple):
  """Hyperparameters of the losses.

  Attributes:
    beta: regularisation towards the reference.
    smoothing: label smoothing of `dpo`.
    weight: weight of the odds ratio of `orpo`.
    divergence: 'forward' or 'reverse' divergence of `distillation`.
    distance: 'squared' or 'cross_entropy' distance of `uft` and `uft_pairs`.
    teacher: config of the teacher of `distillation`.
  """

  beta: float = 0.1
  smoothing: float = 0.0
  weight: float = 0.1
  divergence: str = 'forward'
  distance: str = 'squared'
  teacher: Config | None = None


def kind(name: str) -> row_kinds.Kind:
  """Returns the kind of rows that an objective needs."""
  if name in DEMONSTRATIONS:
    return 'demonstrations'
  return 'labelled' if name in LABELLED else 'comparisons'


def token_names(name: str) -> tuple[str, ...]:
  """Returns the names of an objective's token arrays in rows."""
  return PAIR if name in COMPARISONS else ('tokens',)


def make(
  name: str,
  tuning: tuning_lib.Tuning,
  frozen: decoder.Params,
  shape: Shape,
  *,
  measure: Callable[..., Any] | None = None,
) -> Callable[[Any, tables.Rows, int], Any]:
  """Makes the loss of an objective.

  Args:
    name: name of the objective.
    tuning: the trained part of the model.
    frozen: frozen weights.
    shape: hyperparameters of the losses.
    measure: `(name, answers, rows, shape)` -> metrics, from the answers of the
      loss; None for no metrics.

  Returns:
    `(trained, rows, max_answer)` -> scalar, or (scalar, metrics), for
    `tables.numbered_loss`.

  Raises:
    SettingsError: if the name is unknown.
  """
  known = DEMONSTRATIONS + COMPARISONS + LABELLED
  if name not in known:
    raise harness.SettingsError(
      f'unknown objective {name!r}; known: {", ".join(known)}.'
    )

  def run(trained, rows, max_answer):
    row_answers = answers(
      name,
      tuning,
      trained,
      frozen,
      rows,
      shape,
      max_answer=max_answer,
      tops=measure is not None,
    )
    value = loss(name, row_answers, rows, shape)
    if measure is None:
      return value
    return value, measure(name, row_answers, rows, shape)

  return run


def answers(
  name: str,
  tuning: tuning_lib.Tuning,
  trained: Any,
  frozen: decoder.Params,
  rows: tables.Rows,
  shape: Shape,
  *,
  max_answer: int | None = None,
  tops: bool = False,
) -> log_probs.Answers:
  """Computes the log-probabilities of an objective, for `loss`.

  Args:
    name: name of the objective.
    tuning: the trained part of the model.
    trained: its weights.
    frozen: frozen weights, with those of the teacher.
    rows: rows for `tuning.answers`.
    shape: hyperparameters of the losses.
    max_answer: as in `log_probs.from_hidden`.
    tops: whether to compute `is_top` too, except for `distillation`.

  Returns:
    Log-probabilities; for `distillation`, the negative divergence per token.
  """
  if name != 'distillation':
    return tuning.answers(
      trained,
      frozen,
      rows,
      token_names(name),
      max_answer=max_answer,
      read=log_probs.with_tops if tops else log_probs.from_hidden,
    )
  student = tuning.answers(
    trained, frozen, rows, max_answer=max_answer, read=log_probs.distributions
  )
  packing = {n: rows[n] for n in ('segments', 'positions') if n in rows}
  tokens, weights = rows['tokens'], frozen['teacher']
  if tuning.rows is not None:
    tokens = jax.lax.with_sharding_constraint(tokens, tuning.rows)
  x = decoder.trunk(shape.teacher, weights, tokens, tuning.dtype, **packing)
  teacher = log_probs.distributions(
    shape.teacher, weights, x, tokens, rows['mask'], max_answer=max_answer
  )
  # One row per token, since the library's loss is a mean over rows.
  per_token = [
    array.reshape(-1, 1, 1, *array.shape[2:])
    for array in (student.log_probs, teacher.log_probs, student.mask)
  ]
  divergence = jax.vmap(
    functools.partial(bj.losses.distillation, divergence=shape.divergence)
  )(*per_token)
  return log_probs.Answers(
    -divergence.reshape(student.mask.shape), student.mask
  )


def loss(
  name: str, answers: log_probs.Answers, rows: tables.Rows, shape: Shape
) -> jax.Array:
  """Computes the loss of an objective from log-probabilities.

  Args:
    name: name of the objective.
    answers: log-probabilities; chosen answers precede rejected ones.
    rows: rows with the columns of the reference.
    shape: hyperparameters of the losses.

  Returns:
    A scalar.
  """
  if name in TOKEN_LOSSES:
    weights = None
    if name == 'chord':
      weights = bj.losses.chord_weights(answers.log_probs)
    return bj.losses.sft(answers.log_probs, answers.mask, weights=weights)
  if name in ('uft', 'uft_pairs'):
    before = [rows[f'reference_{n}_total'] for n in token_names(name)]
    wanted = jnp.arange(answers.total.size) < before[0].size
    return bj.losses.uft(
      answers.total,
      jnp.concatenate(before),
      wanted.astype(answers.total.dtype),
      beta=shape.beta,
      distance=shape.distance,
    )
  if name == 'kto_labelled':
    total, before = answers.total, rows['reference_tokens_total']
    wanted = rows['wanted'] > 0
    return bj.losses.kto(total, before, wanted, total - before, beta=shape.beta)
  kind = 'mean' if name in ('ipo', 'orpo') else 'total'
  chosen, rejected = jnp.split(getattr(answers, kind), 2)
  if name == 'orpo':
    return bj.losses.orpo(chosen, rejected, weight=shape.weight)
  reference = [rows[f'reference_{n}_{kind}'] for n in PAIR]
  if name == 'ipo':
    return bj.losses.ipo(chosen, rejected, *reference, beta=shape.beta)
  if name == 'dpo':
    return bj.losses.dpo(
      chosen,
      rejected,
      *reference,
      beta=shape.beta,
      smoothing=shape.smoothing,
    )
  both = jnp.concatenate([chosen, rejected])
  before = jnp.concatenate(reference)
  return bj.losses.kto(
    both,
    before,
    jnp.arange(both.size) < chosen.size,
    both - before,
    beta=shape.beta,
  )


def row_losses(
  name: str, answers: log_probs.Answers, rows: tables.Rows, shape: Shape
) -> jax.Array:
  """Computes the loss of each row separately.

  Args:
    name: name of the objective. The baseline of `kto` is that of the row.
    answers: log-probabilities; chosen answers precede rejected ones.
    rows: rows with the columns of the reference.
    shape: hyperparameters of the losses.

  Returns:
    (rows,).
  """
  kinds = len(token_names(name))
  by_row = jax.tree.map(
    lambda a: jnp.moveaxis(a.reshape(kinds, -1, *a.shape[1:]), 0, 1), answers
  )
  columns = {
    n: a for n, a in rows.items() if n.startswith(('reference_', 'wanted'))
  }
  return jax.vmap(
    lambda row_answers, row: loss(
      name, row_answers, {n: a[None] for n, a in row.items()}, shape
    )
  )(by_row, columns)


def reference_columns(
  tuning: tuning_lib.Tuning,
  frozen: decoder.Params,
  table: tables.Table,
  *,
  folder: Any = None,
  rows: int = 8,
) -> tables.Table:
  """Adds log-probabilities of all answers under the untrained model.

  Args:
    tuning: the trained part of the model.
    frozen: frozen weights.
    table: comparisons or demonstrations.
    folder: folder of stored arrays, see `array_cache.load_or_compute`.
    rows: rows per batch.

  Returns:
    The table with `reference_chosen_total` (sum over the tokens of an answer,
    nats), `reference_chosen_mean` and the same for `rejected`, or with
    `reference_tokens_total` and `reference_tokens_mean`.
  """
  plain = tuning._replace(rank=0, rows=None)
  untrained: dict[str, Any] = {}
  kinds = ('total', 'mean')
  source, (first, *_) = table.source, table.parts
  pairs = 'chosen' in (first if source is None else source.names)
  names = PAIR if pairs else ('tokens',)
  prefixes = PAIR if names == PAIR else ('tokens', 'mask')

  # The weights are an argument: constants would be part of the program.
  @functools.partial(jax.jit, static_argnames='max_answer')
  def run(frozen, part, max_answer):
    def one(row):
      row = {name: leaf[None] for name, leaf in row.items()}
      answers = plain.answers(
        untrained, frozen, row, names, max_answer=max_answer
      )
      return {kind: getattr(answers, kind) for kind in kinds}

    columns = jax.lax.map(one, part, batch_size=rows)
    return {
      f'reference_{name}_{kind}': columns[kind][:, i]
      for kind in kinds
      for i, name in enumerate(names)
    }

  def compute(bucket, count):
    columns = []
    for chunk in table.chunks(bucket, _CHUNK):
      used = {n: leaf for n, leaf in chunk.items() if n.startswith(prefixes)}
      columns.append(harness.as_numpy(run(frozen, used, count)))
    return {n: np.concatenate([c[n] for c in columns]) for n in columns[0]}

  parts = []
  for bucket, part in enumerate(table.parts):
    count = table.max_answers[bucket]
    used = {n: leaf for n, leaf in part.items() if n.startswith(prefixes)}
    if table.source is not None:
      used = {'number': part['number'], 'digest': table.digest}
    columns = array_cache.load_or_compute(
      folder,
      'reference',
      f'{tuning.config} {tuning.cut} {tuning.dtype}',
      {'frozen': frozen, 'used': used},
      functools.partial(compute, bucket, count),
      names=[f'reference_{name}_{kind}' for name in names for kind in kinds],
      count=len(part['index']),
    )
    parts.append({**part, **columns})
  return tables.with_parts(table, parts)
