"""Objectives by name: a loss of what is trained and of rows.

| name | rows | loss |
|---|---|---|
| `sft` | demonstrations | minus the mean log-probability of a token |
| `chord` | demonstrations | likewise, each token weighted by p (1 - p) |
| `dpo` | comparisons | direct preference optimisation, summed |
| `ipo` | comparisons | a margin of a given size, of means over tokens |
| `kto` | comparisons | each answer on its own, wanted or not |
| `orpo` | comparisons | the odds ratio, and fine-tuning on what was chosen |

`dpo`, `ipo` and `kto` compare with a reference, whose log-probabilities are
columns of the rows: `reference_columns`.
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

DEMONSTRATIONS = ('sft', 'chord')
COMPARISONS = ('dpo', 'ipo', 'kto', 'orpo')
PAIR = ('chosen', 'rejected')


class Shape(NamedTuple):
  """Numbers of the losses.

  Attributes:
    beta: of `dpo`, `ipo` and `kto`: how near the reference is to be kept.
    smoothing: of `dpo`: the share of comparisons that may be wrong.
    weight: of `orpo`: of the odds ratio.
  """

  beta: float = 0.1
  smoothing: float = 0.0
  weight: float = 0.1


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
  names = ('tokens',) if name in DEMONSTRATIONS else PAIR

  def loss(trained, rows, longest):
    found = tuning.answers(trained, frozen, rows, names, longest=longest)
    return of_answers(name, found, rows, shape)

  return loss


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
  if name in DEMONSTRATIONS:
    weights = None
    if name == 'chord':
      weights = bj.losses.chord_weights(found.log_probs)
    return bj.losses.sft(found.log_probs, found.mask, weights=weights)
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


def reference_columns(
  tuning: tuning_lib.Tuning,
  frozen: decoder.Params,
  table: tables.Table,
  *,
  folder: Any = None,
  rows: int = 8,
) -> tables.Table:
  """Adds what the model says of all comparisons before it is trained.

  Args:
    tuning: what is trained.
    frozen: what is not.
    table: of comparisons.
    folder: where it is kept; see `kept.arrays`.
    rows: at a time.

  Returns:
    The table with `reference_chosen_total`, a sum over the tokens of each
    answer in nats, `reference_chosen_mean` and likewise of the rejected ones.
  """
  plain = tuning._replace(rank=0, rows=None)
  nothing: dict[str, Any] = {}
  kinds = ('total', 'mean')

  @functools.partial(jax.jit, static_argnames='longest')
  def run(frozen, part, longest):
    def one(row):
      row = {name: leaf[None] for name, leaf in row.items()}
      found = plain.answers(nothing, frozen, row, PAIR, longest=longest)
      return {kind: getattr(found, kind) for kind in kinds}

    # The weights are an argument: as constants they would be in the program.
    found = jax.lax.map(one, part, batch_size=rows)
    return {
      f'reference_{name}_{kind}': found[kind][:, i]
      for kind in kinds
      for i, name in enumerate(PAIR)
    }

  parts = []
  for part, longest in zip(table.parts, table.longest, strict=True):
    used = {n: leaf for n, leaf in part.items() if n.startswith(PAIR)}
    columns = kept.arrays(
      folder,
      'reference',
      f'{tuning.config} {tuning.cut} {tuning.dtype}',
      {'frozen': frozen, 'used': used},
      functools.partial(run, frozen, used, longest),
      names=[f'reference_{name}_{kind}' for name in PAIR for kind in kinds],
      count=len(part['index']),
    )
    parts.append({**part, **columns})
  return tables.with_parts(table, parts)
