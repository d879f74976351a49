"""Objectives by name: a loss of what is trained and of rows.

| name | rows | loss |
|---|---|---|
| `sft` | demonstrations | minus the mean log-probability of a token |
| `chord` | demonstrations | likewise, each token weighted by p (1 - p) |
| `distillation` | demonstrations | the divergence from a teacher, each token |
| `uft` | demonstrations | an implicit reward, which is to be 1 |
| `dpo` | comparisons | direct preference optimisation, summed |
| `ipo` | comparisons | a margin of a given size, of means over tokens |
| `kto` | comparisons | each answer on its own, wanted or not |
| `orpo` | comparisons | the odds ratio, and fine-tuning on what was chosen |
| `uft_pairs` | comparisons | rewards, to be 1 and 0 |

`uft`, `dpo`, `ipo`, `kto` and `uft_pairs` compare with a reference, whose
log-probabilities are columns of the rows: `reference_columns`. What `kto` takes
answers to differ from, its baseline, is the mean of the log-ratios of the
batch's own answers, chosen and rejected, at least 0 and constant in
derivatives: its authors take answers to other prompts, for one more pass. The
teacher of `distillation` reads the same rows in the same step, its weights are
`frozen['teacher']`; it may be of other sizes, but has the same words.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import bilevel_jax as bj
from experiments import harness
from experiments.lm import decoder, kept, log_probs, tables
from experiments.lm import tuning as tuning_lib
from experiments.lm.config import Config

DEMONSTRATIONS = ('sft', 'chord', 'distillation', 'uft')
COMPARISONS = ('dpo', 'ipo', 'kto', 'orpo', 'uft_pairs')
PAIR = ('chosen', 'rejected')
# Those that compare with a reference, and those that see each token for itself.
REFERENCED = ('uft', 'dpo', 'ipo', 'kto', 'uft_pairs')
OF_TOKENS = ('sft', 'chord', 'distillation')


class Shape(NamedTuple):
  """Numbers of the losses.

  Attributes:
    beta: of the losses with a reference: how near it is to be kept.
    smoothing: of `dpo`: the share of comparisons that may be wrong.
    weight: of `orpo`: of the odds ratio.
    divergence: of `distillation`: 'forward' or 'reverse'.
    distance: of `uft` and `uft_pairs`: 'squared' or 'cross_entropy'.
    teacher: of `distillation`: what the teacher is.
  """

  beta: float = 0.1
  smoothing: float = 0.0
  weight: float = 0.1
  divergence: str = 'forward'
  distance: str = 'squared'
  teacher: Config | None = None


def names_of(name: str) -> tuple[str, ...]:
  """The names of an objective's tokens in rows: of an answer, or of two."""
  return ('tokens',) if name in DEMONSTRATIONS else PAIR


def make(
  name: str,
  tuning: tuning_lib.Tuning,
  frozen: decoder.Params,
  shape: Shape,
) -> Callable[[Any, tables.Rows, int], jax.Array]:
  """The loss of an objective.

  Args:
    name: one of those above.
    tuning: what is trained.
    frozen: what is not.
    shape: numbers of the losses.

  Returns:
    `(trained, rows, longest)` to a scalar, for `tables.loss_of_numbers`.

  Raises:
    SettingsError: if there is none of this name.
  """
  known = DEMONSTRATIONS + COMPARISONS
  if name not in known:
    raise harness.SettingsError(
      f'unknown objective {name!r}; known: {", ".join(known)}.'
    )

  def loss(trained, rows, longest):
    found = answers(name, tuning, trained, frozen, rows, shape, longest=longest)
    return of_answers(name, found, rows, shape)

  return loss


def answers(
  name: str,
  tuning: tuning_lib.Tuning,
  trained: Any,
  frozen: decoder.Params,
  rows: tables.Rows,
  shape: Shape,
  *,
  longest: int | None = None,
) -> log_probs.Answers:
  """What an objective sees of answers, for `of_answers`.

  Args:
    name: of the objective.
    tuning: what is trained.
    trained: as it is now.
    frozen: what is not, with the teacher where there is one.
    rows: as `tuning.answers` takes them.
    shape: numbers of the losses.
    longest: as in `log_probs.of_answers`.

  Returns:
    Log-probabilities; of `distillation`, minus the divergence of each token.
  """
  if name != 'distillation':
    return tuning.answers(
      trained, frozen, rows, names_of(name), longest=longest
    )
  ours = tuning.answers(
    trained, frozen, rows, longest=longest, read=log_probs.distributions
  )
  where = {n: rows[n] for n in ('segments', 'positions') if n in rows}
  tokens, teacher = rows['tokens'], frozen['teacher']
  if tuning.rows is not None:
    tokens = jax.lax.with_sharding_constraint(tokens, tuning.rows)
  x = decoder.trunk(shape.teacher, teacher, tokens, tuning.dtype, **where)
  theirs = log_probs.distributions(
    shape.teacher, teacher, x, tokens, rows['mask'], longest=longest
  )
  # Each token as a row of its own: the library's loss is a mean over them.
  each = lambda array: array.reshape(-1, 1, 1, *array.shape[2:])
  lost = jax.vmap(
    lambda model, other, mask: bj.losses.distillation(
      model, other, mask, divergence=shape.divergence
    )
  )(each(ours.log_probs), each(theirs.log_probs), each(ours.mask))
  return log_probs.Answers(-lost.reshape(ours.mask.shape), ours.mask)


def of_answers(
  name: str, found: log_probs.Answers, rows: tables.Rows, shape: Shape
) -> jax.Array:
  """The loss of an objective, from log-probabilities.

  Args:
    name: of the objective.
    found: of the answers; of comparisons, all that were chosen come first.
    rows: with the columns of the reference, where there is one.
    shape: numbers of the losses.

  Returns:
    A scalar.
  """
  if name in OF_TOKENS:
    weights = None
    if name == 'chord':
      weights = bj.losses.chord_weights(found.log_probs)
    return bj.losses.sft(found.log_probs, found.mask, weights=weights)
  if name in ('uft', 'uft_pairs'):
    before = [rows[f'reference_{n}_total'] for n in names_of(name)]
    wanted = jnp.arange(found.total.size) < before[0].size
    return bj.losses.uft(
      found.total,
      jnp.concatenate(before),
      wanted.astype(found.total.dtype),
      beta=shape.beta,
      distance=shape.distance,
    )
  of_means = name in ('ipo', 'orpo')
  chosen, rejected = jnp.split(found.mean if of_means else found.total, 2)
  if name == 'orpo':
    return bj.losses.orpo(chosen, rejected, weight=shape.weight)
  kind = 'mean' if of_means else 'total'
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
  # The divergence is estimated by the answers of the batch themselves.
  return bj.losses.kto(
    both,
    before,
    jnp.arange(both.size) < chosen.size,
    both - before,
    beta=shape.beta,
  )


def of_rows(
  name: str, found: log_probs.Answers, rows: tables.Rows, shape: Shape
) -> jax.Array:
  """The loss of each row by itself, as `of_answers` of it alone.

  Args:
    name: of the objective; `kto` compares with the rows beside it, of which
      there are none here.
    found: as in `of_answers`.
    rows: likewise.
    shape: numbers of the losses.

  Returns:
    (rows,).
  """
  kinds = len(names_of(name))
  turned = jax.tree.map(
    lambda a: jnp.moveaxis(a.reshape(kinds, -1, *a.shape[1:]), 0, 1), found
  )
  columns = {n: a for n, a in rows.items() if n.startswith('reference_')}
  return jax.vmap(
    lambda one, row: of_answers(
      name, one, {n: a[None] for n, a in row.items()}, shape
    )
  )(turned, columns)


def reference_columns(
  tuning: tuning_lib.Tuning,
  frozen: decoder.Params,
  table: tables.Table,
  *,
  folder: Any = None,
  rows: int = 8,
) -> tables.Table:
  """Adds what the model says of all answers before it is trained.

  Args:
    tuning: what is trained.
    frozen: what is not.
    table: of comparisons, or of demonstrations.
    folder: where it is kept; see `kept.arrays`.
    rows: at a time.

  Returns:
    The table with `reference_chosen_total`, a sum over the tokens of each
    answer in nats, `reference_chosen_mean` and likewise of the rejected ones,
    or `reference_tokens_total` and `_mean`.
  """
  plain = tuning._replace(rank=0, rows=None)
  nothing: dict[str, Any] = {}
  kinds = ('total', 'mean')
  names = PAIR if 'chosen' in table.parts[0] else ('tokens',)
  begin = PAIR if names == PAIR else ('tokens', 'mask')

  @functools.partial(jax.jit, static_argnames='longest')
  def run(frozen, part, longest):
    def one(row):
      row = {name: leaf[None] for name, leaf in row.items()}
      found = plain.answers(nothing, frozen, row, names, longest=longest)
      return {kind: getattr(found, kind) for kind in kinds}

    # The weights are an argument: as constants they would be in the program.
    found = jax.lax.map(one, part, batch_size=rows)
    return {
      f'reference_{name}_{kind}': found[kind][:, i]
      for kind in kinds
      for i, name in enumerate(names)
    }

  parts = []
  for part, longest in zip(table.parts, table.longest, strict=True):
    used = {n: leaf for n, leaf in part.items() if n.startswith(begin)}
    columns = kept.arrays(
      folder,
      'reference',
      f'{tuning.config} {tuning.cut} {tuning.dtype}',
      {'frozen': frozen, 'used': used},
      functools.partial(run, frozen, used, longest),
      names=[f'reference_{name}_{kind}' for name in names for kind in kinds],
      count=len(part['index']),
    )
    parts.append({**part, **columns})
  return tables.with_parts(table, parts)
