"""Bias of multi-gradient directions after training, and that of SMG."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel_jax as bj
from experiments import harness
from experiments.harness.study import comparison
from experiments.moco import methods
from experiments.moco import problem as problems

BATCHES = 256
METHODS = ('mean', 'moco', 'moco_no_memory', 'moco_exact')


def biases(
  problem: problems.Problem,
  name: str,
  trials: Sequence[comparison.Trial],
  batch: int,
) -> dict[str, np.ndarray]:
  """Measures multi-gradient biases of a method and of SMG after training.

  Expectation and true gradients are means over the same fresh batches, so that
  sampling error does not count as bias. A method with memory gets the batches
  in turn at fixed parameters; `next_batch/` is the expectation over the next
  batch given the current memory.

  Args:
    problem: problem of the runs.
    name: name of the method.
    trials: trials of the method.
    batch: batch size.

  Returns:
    Fields of `bj.diagnostics.MultiGradientBias`, (trials, seeds), with the
    prefix `own/`, `next_batch/` or `smg/`.
  """
  params, state = jax.tree.map(
    lambda *leaves: jnp.concatenate(leaves),
    *(
      jax.tree.map(
        lambda x, rows=trial.members: jnp.asarray(x)[rows],
        (trial.trained.params, trial.trained.state[1]),
      )
      for trial in trials
    ),
  )
  seeds = len(trials[0].members)
  values = np.repeat([int(trial.point['own']) for trial in trials], seeds)
  key = jax.random.key(10_000)
  count = len(problem.tasks)
  oracle = problem.oracle()
  smg = bj.aggregators.smg(count)

  def measure(member, data):
    params, state, value, key = member
    own = methods.METHODS[name].make(
      count, key, ('heads',), methods.hyperparameter_value(name, value)
    )
    oracle_state = oracle.init(params)
    batches = jax.vmap(lambda k: problem.batch(k, data, batch))(
      jax.random.split(key, BATCHES)
    )
    jacobian = lambda batch: oracle.update(batch, oracle_state, params)[0]

    def add(total, batch):
      return jax.tree.map(jnp.add, total, jacobian(batch)), None

    first = jax.eval_shape(jacobian, jax.tree.map(lambda x: x[0], batches))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
    total, _ = jax.lax.scan(add, zeros, batches)
    truth = jax.tree.map(lambda x: x / BATCHES, total)
    compute = lambda link, state, remember: bj.diagnostics.multi_gradient_bias(
      oracle, link, state, params, batches, truth, remember=remember
    )
    return {
      'own': compute(own, state, True),
      'next_batch': compute(own, state, False),
      'smg': compute(smg, smg.init(params), False),
    }

  # Batches depend on the seed, not on the hyperparameter.
  keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(
    jnp.tile(jnp.arange(seeds), len(trials))
  )
  run_all = jax.jit(
    lambda members, data: jax.lax.map(lambda one: measure(one, data), members)
  )
  members = params, state, jnp.asarray(values), keys
  measurements = jax.device_get(run_all(members, problem.data))
  return {
    f'{kind}/{field}': np.asarray(value, np.float64).reshape(-1, seeds)
    for kind, result in measurements.items()
    for field, value in result._asdict().items()
  }


def measure(
  results: harness.Results,
  problem: problems.Problem,
  sizes: Sequence[int],
  outcomes: Mapping[str, comparison.Outcome],
) -> dict[str, harness.Interval]:
  """Measures SMG's bias over that of MoCo variants and controls.

  The controls are `mean`, whose weights are constant, and `moco_no_memory`,
  which takes MoCo's weight steps on single batches. They show how much of a
  ratio is due to slow weights; those of `moco_exact` are as fast as SMG's.

  Args:
    results: receives biases and ratios at the coordinates `own` (index of the
      hyperparameter's value, each at its best learning rate) and `batch`, and
      `bias_ratio` of the chosen trial at the last batch size.
    problem: problem of the runs.
    sizes: batch sizes, the last one that of training; empty to skip.
    outcomes: outcomes of the runs, by method.

  Returns:
    `bias_ratio` by method.
  """
  ratios = {}
  for name in [name for name in METHODS if name in outcomes and sizes]:
    outcome = outcomes[name]
    if outcome.failure:
      continue
    place = {'method': name, 'data': problem.name}
    trained = [trial for trial in outcome.trials if trial.trained]
    best = [
      max(
        (trial for trial in trained if trial.point['own'] == own),
        key=lambda trial: trial.score,
      )
      for own in sorted({trial.point['own'] for trial in trained})
    ]
    for batch in sizes:
      values = biases(problem, name, best, batch)
      for i, trial in enumerate(best):
        own = int(trial.point['own'])
        numbers = _summary({k: v[i] for k, v in values.items()})
        results.put({**place, 'batch': batch, 'own': own}, numbers)
        if trial.point['own'] == outcome.point['own']:
          ratios[name] = numbers['bias_ratio']
    results.add(place, bias_ratio=ratios[name])
  return ratios


def _summary(values: Mapping[str, np.ndarray]) -> dict[str, Any]:
  numbers: dict[str, Any] = {
    f'bias/{k}': harness.reduced(v, 'mean') for k, v in values.items()
  }
  for field, end in (
    ('from_min_norm', '/from_min_norm'),
    ('at_own_weights', ''),
  ):
    # The ratio is infinite for a method without bias.
    with np.errstate(divide='ignore'):
      ratio = values[f'smg/{field}'] / values[f'own/{field}']
    numbers[f'bias_ratio{end}'] = harness.mean_interval(ratio)
  return numbers
