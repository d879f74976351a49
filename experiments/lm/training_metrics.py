"""Metrics of training batches, from what the loss has computed already.

| name | of | meaning |
|---|---|---|
| `mean_token_accuracy/NAME` | an objective | fraction of its answers' tokens, of \
chosen answers, that were the likeliest ones |
| `logps/chosen`, `logps/rejected` | comparisons | mean log-probability of an \
answer, summed over its tokens |
| `rewards/chosen`, `rewards/rejected` | comparisons | mean of beta times the \
log-ratio of an answer to the reference |
| `rewards/margins` | comparisons | their difference |
| `rewards/accuracies` | pairs | fraction with a larger reward of the chosen \
answer |
| `grad_norm` | a step | norm of the gradient before clipping |

The definitions are those of TRL. With labels, wanted answers are the chosen
ones. Rewards are the same for all losses: with `ipo` and `orpo`, too, they are
sums over tokens relative to the reference.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj
from experiments.lm import log_probs, objectives, tables

# Sums and their numbers of terms, (2,), divided by the rows of the batch, so
# that means over micro-batches have the ratio of the batch.
Sums = dict[str, jax.Array]
_ACCURACY = 'mean_token_accuracy'


class State(NamedTuple):
  """State of `with_metrics`.

  Attributes:
    oracle: state of the oracle.
    optimiser: state of the optimiser.
    values: metrics of the last update.
    evaluated: which losses and metrics the last update evaluated.
  """

  oracle: Any
  optimiser: Any
  values: dict[str, jax.Array]
  evaluated: dict[str, jax.Array]


def outputs(names: Iterable[str]) -> dict[str, Callable[[Any], Sums]]:
  """Makes the `outputs` of `bj.gradient` for objectives, by name."""
  return {name: lambda params, name=name: _make_zeros(name) for name in names}


def _make_zeros(name: str) -> Sums:
  """Sums of an objective before its first update."""
  names = [] if name == 'distillation' else [_ACCURACY]
  if objectives.kind(name) != 'demonstrations':
    names += [f'{kind}/{n}' for kind in _KINDS for n in objectives.PAIR]
  if name in objectives.COMPARISONS:
    names.append('rewards/accuracies')
  return {n: jnp.zeros(2, jnp.float32) for n in names}


_KINDS = ('logps', 'rewards')


def sum_metrics(
  name: str,
  answers: log_probs.Answers,
  rows: tables.Rows,
  shape: objectives.Shape,
) -> Sums:
  """Sums the metrics of an objective over a batch.

  Args:
    name: name of the objective.
    answers: log-probabilities; chosen answers precede rejected ones.
    rows: rows with the columns of the reference.
    shape: hyperparameters of the losses.

  Returns:
    By name, the sum and its number of terms, divided by the number of rows,
    float32 (2,), without derivatives.
  """
  answers = jax.lax.stop_gradient(answers)
  names = objectives.token_names(name)
  count = answers.mask.shape[0] // len(names)
  sums = {}

  def add(metric, values, where):
    total = jnp.sum(jnp.where(where, values, 0), dtype=jnp.float32)
    terms = jnp.sum(where, dtype=jnp.float32)
    sums[metric] = jnp.stack([total, terms]) / count

  if answers.is_top is not None:
    add(_ACCURACY, answers.is_top[:count], answers.mask[:count] > 0)
  if objectives.kind(name) == 'demonstrations':
    return sums
  if name in objectives.LABELLED:
    wanted = rows['wanted'] > 0
    kinds = {'chosen': wanted, 'rejected': ~wanted}
    totals = dict.fromkeys(kinds, answers.total)
    references = dict.fromkeys(kinds, rows['reference_tokens_total'])
  else:
    kinds = dict.fromkeys(objectives.PAIR, jnp.ones(count, bool))
    totals = dict(zip(objectives.PAIR, jnp.split(answers.total, 2)))
    references = {n: rows[f'reference_{n}_total'] for n in objectives.PAIR}
  rewards = {n: shape.beta * (totals[n] - references[n]) for n in kinds}
  for n, where in kinds.items():
    add(f'logps/{n}', totals[n], where)
    add(f'rewards/{n}', rewards[n], where)
  if name in objectives.COMPARISONS:
    is_larger = rewards['chosen'] > rewards['rejected']
    add('rewards/accuracies', is_larger, kinds['chosen'])
  return sums


def with_metrics(
  oracle: optax.GradientTransformationExtraArgs,
  optimiser: optax.GradientTransformation,
  names: Sequence[str],
) -> optax.GradientTransformationExtraArgs:
  """Chains an oracle and an optimiser, and adds metrics of each update.

  Args:
    oracle: an oracle whose losses have the outputs `sum_metrics`; without these
      outputs, `grad_norm` is the only metric.
    optimiser: an optimiser.
    names: names of the objectives.

  Returns:
    A solver with the same updates, whose metrics are in `bj.values`.
  """

  def measure(gradient, state):
    flags = bj.diagnostics.evaluated(state)
    sums = bj.outputs(state)
    values, evaluated = {'grad_norm': optax.global_norm(gradient)}, {}
    for name in names:
      for metric, (total, terms) in sums.get(name, {}).items():
        own = f'{metric}/{name}' if metric == _ACCURACY else metric
        values[own] = total / jnp.where(terms > 0, terms, 1)
        evaluated[own] = flags[name] & (terms > 0)
    chosen, rejected = (f'rewards/{n}' for n in objectives.PAIR)
    if chosen in values:
      values['rewards/margins'] = values[chosen] - values[rejected]
      both = evaluated[chosen] & evaluated[rejected]
      evaluated['rewards/margins'] = both
    for metric, value in values.items():
      # Metrics never stop a run: those that are not finite are left out.
      fine = jnp.isfinite(value)
      values[metric] = jnp.where(fine, value, 0)
      evaluated[metric] = evaluated.get(metric, True) & fine
    return values, flags | evaluated

  def init_fn(params):
    state = oracle.init(params)
    gradient = jax.tree.map(jnp.zeros_like, params)
    return State(state, optimiser.init(params), *measure(gradient, state))

  def update_fn(batch, state, params=None, **extra_args):
    gradient, inner = oracle.update(batch, state.oracle, params, **extra_args)
    updates, outer = optimiser.update(gradient, state.optimiser, params)
    return updates, State(inner, outer, *measure(gradient, inner))

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


