"""Methods for two objectives of one model, each with its own data."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.lm import tables

TITLES = {
  'sequential': 'in stages, demonstrations first',
  'reversed': 'in stages, comparisons first',
  'replay': 'in stages, a tenth of demonstrations replayed',
  'mix': 'weighted sum, both losses per step',
  'alright': 'ALRIGHT',
  'maxright': 'MAXRIGHT',
  'demonstrations': 'demonstrations only',
  'comparisons': 'comparisons only',
  'mgda': 'MGDA on both gradients',
  'moco': 'MoCo on both gradients',
  'cagrad': 'CAGrad on both gradients',
}
# Accuracy of preferences by length.
CONTROLS = {
  'control/longer_answer': 'control: prefer the longer answer',
  'control/shorter_answer': 'control: prefer the shorter answer',
}
# Methods that store both gradients at once.
AGGREGATORS = ('mgda', 'moco', 'cagrad')
STAGES = ('sequential', 'reversed', 'replay')
SINGLE = ('demonstrations', 'comparisons')
BOTH = ('mix', *AGGREGATORS)
# Fraction of demonstrations in the second stage of `replay`.
REPLAYED = 0.1


class Plan(NamedTuple):
  """Parameters of a method.

  Attributes:
    mixing_ratio: weight of the comparisons, in [0, 1]; for stages, the fraction
      of the steps in the stage of comparisons, at least one step. It may be
      traced.
    steps: of the run.
    optima: the least loss of each objective, or 'running'.
    refresh_every: updates between two evaluations of both losses, for MAXRIGHT.
    cached_losses_rate: step of a cached loss towards a training loss, in
      [0, 1], for MAXRIGHT.
    micro_batches: per update.
  """

  mixing_ratio: float | jax.Array
  steps: int
  optima: Any = 'running'
  refresh_every: int = 10
  cached_losses_rate: float = 0.1
  micro_batches: int = 1


def check(name: str) -> None:
  """Raises SettingsError for an unknown method."""
  if name not in TITLES:
    raise harness.SettingsError(
      f'unknown method {name!r}; known: {", ".join(TITLES)}.'
    )


def batch(name: str, step: Any, refresh: Any) -> Any:
  """Makes the batch of an update.

  Args:
    name: of the method.
    step: of the run.
    refresh: rows by objective on which MAXRIGHT evaluates both losses.

  Returns:
    Batch numbers of both objectives for aggregators, else the rows: these
    methods count the batches of each objective themselves.
  """
  return (step, step) if name in AGGREGATORS else {'refresh': refresh}


def oracle(
  name: str,
  losses: Mapping[str, Callable[[Any, Any], Any]],
  plan: Plan,
  *,
  key: Any,
  outputs: Mapping[str, Callable[[Any], Any]] | None = None,
) -> optax.GradientTransformation:
  """Makes the oracle of a method, which takes batches of `batch`.

  Args:
    name: of the method.
    losses: (params, batch number or rows) -> loss, for demonstrations and then
      comparisons; a method for one objective needs only this one.
    plan: parameters of the method.
    key: PRNG key of ALRIGHT's draws.
    outputs: by objective, `outputs` of `bj.gradient` for losses that return
      (loss, auxiliary); aggregators have no outputs.

  Returns:
    An oracle. Only an evaluated objective advances in its data.

  Raises:
    SettingsError: if the method is unknown.
  """
  check(name)
  names = tuple(losses)
  weights: Any = (1 - plan.mixing_ratio, plan.mixing_ratio)
  if isinstance(plan.mixing_ratio, jax.Array):
    weights = jnp.stack(weights)

  def wrap(one):
    if plan.micro_batches == 1:
      return one
    return bj.evaluation.accumulate(one, plan.micro_batches, split=tables.split)

  number = lambda batch, taken: taken
  if name in AGGREGATORS:
    aggregator = getattr(bj.aggregators, name)(2)
    rows = bj.multi_objective(tuple(losses.values()), names, per_task=True)
    return optax.chain(wrap(rows), aggregator)
  if name in ('alright', 'maxright'):
    common = {'weights': weights, 'batch_at': number, 'outputs': outputs}
    if name == 'alright':
      oracle = bj.solvers.alright(
        losses.values(), names, key=key, even=True, **common
      )
      return bj.evaluation.wrapped(oracle, wrap)
    oracle = bj.solvers.maxright(
      losses.values(),
      names,
      optima=plan.optima,
      refresh_every=plan.refresh_every,
      share=plan.cached_losses_rate,
      refresh_at={
        n: lambda batch, taken, n=n: batch['refresh'][n] for n in names
      },
      **common,
    )
    return bj.evaluation.wrapped(oracle, wrap)
  oracles = {
    n: wrap(bj.gradient(f, name=n, outputs=(outputs or {}).get(n)))
    for n, f in losses.items()
  }
  if name == 'mix':
    return bj.evaluation.mixed(oracles, weights, batch_at=number)
  if name == 'replay':
    rule = bj.evaluation.at_random(_replayed(plan), key=key, even=True)
    return bj.evaluation.select(oracles, rule, batch_at=number)
  if name == 'reversed':
    oracles = dict(reversed(oracles.items()))
  if name in SINGLE:
    objective = names[0 if name == 'demonstrations' else -1]
    oracles = {objective: oracles[objective]}
    stages = []
  else:
    stages = [_first_stage(plan, 1 if name == 'reversed' else 0)]
  return bj.evaluation.select(
    oracles, bj.evaluation.in_sequence(stages), batch_at=number
  )


def _first_stage(plan: Plan, objective: int) -> Any:
  """Steps of the first stage, on an objective."""
  ratio = plan.mixing_ratio if objective else 1 - plan.mixing_ratio
  if isinstance(ratio, jax.Array):
    steps = jnp.round(ratio * plan.steps).astype(jnp.int32)
    return jnp.clip(steps, 1, plan.steps - 1)
  return min(max(round(ratio * plan.steps), 1), plan.steps - 1)


def _replayed(plan: Plan) -> Callable[[Any], jax.Array]:
  """Weights of both objectives by the number of updates, for `replay`."""
  first = _first_stage(plan, 0)

  def weights(count):
    demonstrations = jnp.where(count < first, 1.0, REPLAYED)
    return jnp.stack([demonstrations, 1 - demonstrations])

  return weights
