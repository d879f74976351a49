"""Metrics of training batches, from what the loss has computed already.

| name | meaning |
|---|---|
| `grad_norm` | norm of the gradient before clipping |
| `mean_token_accuracy/NAME` | fraction of answers' tokens that are likeliest |
| `logps/chosen`, `logps/rejected` | log-probability of an answer |
| `rewards/chosen`, `rewards/rejected` | beta times its log-ratio |
| `rewards/margins` | difference of both rewards |
| `rewards/accuracies` | fraction of pairs with a larger chosen reward |

The definitions are those of TRL. All are means over a batch; log-probabilities
are sums over the tokens of an answer, log-ratios are relative to the reference,
also for `ipo` and `orpo`. Of comparisons, the tokens are those of chosen
answers. With labels, wanted answers are the chosen ones.
"""

from collections.abc import Callable, Iterable, Mapping
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
_KINDS = ('logps', 'rewards')


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


def as_metrics(
  sums: Mapping[str, Sums], flags: Mapping[str, Any]
) -> dict[str, tuple[jax.Array, jax.Array]]:
  """Divides sums by their numbers of terms.

  Args:
    sums: results of `sum_metrics` by objective.
    flags: by objective, whether the last update evaluated it.

  Returns:
    By metric, its value, and whether the last update evaluated it. Metrics
    without terms or with a sum that is not finite are 0 and not evaluated: they
    never stop a run.
  """
  metrics = {}
  for name, own in sums.items():
    for metric, (total, terms) in own.items():
      if metric == _ACCURACY:
        metric = f'{metric}/{name}'
      value = total / jnp.where(terms > 0, terms, 1)
      metrics[metric] = value, flags[name] & (terms > 0)
  pair = [metrics.get(f'rewards/{n}') for n in objectives.PAIR]
  if None not in pair:
    (chosen, is_first), (rejected, is_second) = pair
    metrics['rewards/margins'] = chosen - rejected, is_first & is_second
  return {name: _as_finite(*one) for name, one in metrics.items()}


def _as_finite(value, flag):
  fine = jnp.isfinite(value)
  return jnp.where(fine, value, 0), flag & fine


def with_metrics(
  oracle: optax.GradientTransformationExtraArgs,
  optimiser: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Chains an oracle and an optimiser, and adds metrics of each update.

  Args:
    oracle: an oracle whose losses have the outputs `sum_metrics`; without these
      outputs, `grad_norm` is the only metric.
    optimiser: an optimiser.

  Returns:
    A solver with the same updates, whose metrics are in `bj.values`.
  """

  def measure(gradient, state):
    flags = bj.diagnostics.evaluated(state)
    metrics = as_metrics(bj.outputs(state), flags)
    norm = optax.tree.norm(gradient)
    metrics['grad_norm'] = _as_finite(norm, jnp.ones([], bool))
    values = {name: value for name, (value, _) in metrics.items()}
    return values, flags | {name: flag for name, (_, flag) in metrics.items()}

  def init_fn(params):
    state = oracle.init(params)
    gradient = jax.tree.map(jnp.zeros_like, params)
    return State(state, optimiser.init(params), *measure(gradient, state))

  def update_fn(batch, state, params=None, **extra_args):
    gradient, inner = oracle.update(batch, state.oracle, params, **extra_args)
    updates, outer = optimiser.update(gradient, state.optimiser, params)
    return updates, State(inner, outer, *measure(gradient, inner))

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
