"""Two objectives of one model, each with its own data, by several methods."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import optax

import bilevel_jax as bj
from experiments import harness
from experiments.lm import tables

TITLES = {
  'sequential': 'in stages, demonstrations first',
  'reversed': 'in stages, comparisons first',
  'mix': 'weighted sum, both losses a step',
  'alright': 'ALRIGHT',
  'maxright': 'MAXRIGHT',
  'demonstrations': 'demonstrations alone',
  'comparisons': 'comparisons alone',
  'mgda': 'MGDA on both gradients',
  'moco': 'MoCo on both gradients',
  'cagrad': 'CAGrad on both gradients',
}
# What prefers an answer by its length alone.
CONTROLS = {
  'control/longer_answer': 'control: the longer answer is preferred',
  'control/shorter_answer': 'control: the shorter answer is preferred',
}
# Those that hold the gradients of both objectives at once.
AGGREGATORS = ('mgda', 'moco', 'cagrad')
STAGES = ('sequential', 'reversed')
SINGLE = ('demonstrations', 'comparisons')
BOTH = ('mix', *AGGREGATORS)


class Plan(NamedTuple):
  """What a method is given beside the losses.

  Attributes:
    share: the weight of the comparisons, in [0, 1]; of stages, the part of the
      steps that they get, at least one.
    steps: of the run.
    optima: the least loss of either objective, or 'running'.
    refresh_every: evaluations of MAXRIGHT between two looks at both losses.
    memo: how far a training loss moves what MAXRIGHT knows, in [0, 1].
    parts: micro-batches of an update.
  """

  share: float
  steps: int
  optima: Any = 'running'
  refresh_every: int = 10
  memo: float = 0.1
  parts: int = 1


def check(name: str) -> None:
  """Raises SettingsError for an unknown method."""
  if name not in TITLES:
    raise harness.SettingsError(
      f'unknown method {name!r}; known: {", ".join(TITLES)}.'
    )


def batch(name: str, step: Any, refresh: Any) -> Any:
  """What an update of a method is given.

  Args:
    name: of the method.
    step: of the run.
    refresh: rows by objective, for MAXRIGHT's looks.

  Returns:
    A pytree: both numbers of batches, or the rows; others count themselves.
  """
  return (step, step) if name in AGGREGATORS else {'refresh': refresh}


def oracle(
  name: str,
  losses: Mapping[str, Callable[[Any, Any], Any]],
  plan: Plan,
  *,
  key: Any,
) -> optax.GradientTransformation:
  """The gradient of a method, from a batch as `batch` gives it.

  Args:
    name: of the method.
    losses: of the demonstrations and of the comparisons, in this order, of
      (params, number of a batch or rows), as `tables.numbered_loss` gives; of
      a method of one objective, that alone will do.
    plan: numbers.
    key: PRNG key, of ALRIGHT's coin.

  Returns:
    An oracle. Only the objective whose turn it is moves on in its data.

  Raises:
    SettingsError: if the method is unknown.
  """
  check(name)
  names = tuple(losses)
  weights = (1 - plan.share, plan.share)

  def wrap(one):
    if plan.parts == 1:
      return one
    return bj.evaluation.accumulate(one, plan.parts, split=tables.split)

  number = lambda batch, taken: taken
  if name in AGGREGATORS:
    aggregator = getattr(bj.aggregators, name)(2)
    rows = bj.multi_objective(tuple(losses.values()), names, per_task=True)
    return optax.chain(wrap(rows), aggregator)
  if name in ('alright', 'maxright'):
    common = {'weights': weights, 'batch_at': number}
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
      share=plan.memo,
      refresh_at={
        n: lambda batch, taken, n=n: batch['refresh'][n] for n in names
      },
      **common,
    )
    return bj.evaluation.wrapped(oracle, wrap)
  parts = {n: wrap(bj.gradient(f, name=n)) for n, f in losses.items()}
  if name == 'mix':
    return bj.evaluation.mixed(parts, weights, batch_at=number)
  if name == 'reversed':
    parts = dict(reversed(parts.items()))
  if name in SINGLE:
    own = names[0 if name == 'demonstrations' else -1]
    parts = {own: parts[own]}
    stages = []
  else:
    first = plan.share if name == 'reversed' else 1 - plan.share
    stages = [min(max(round(first * plan.steps), 1), plan.steps - 1)]
  return bj.evaluation.select(
    parts, bj.evaluation.in_sequence(stages), batch_at=number
  )
