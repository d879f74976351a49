"""The bias of multi-gradient directions at the end of a run, beside SMG's."""

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
MEASURED = ('mean', 'moco', 'moco_no_memory', 'moco_exact')


def biases(
  problem: problems.Problem,
  name: str,
  trials: Sequence[comparison.Trial],
  batch: int,
) -> dict[str, np.ndarray]:
  """Multi-gradient biases at the end of a run, of its method and of SMG.

  The mean over the same fresh batches stands for the expectation and for the
  true gradients alike, so that no error of sampling is counted as a bias. A
  method with a memory sees them one after another, the parameters staying; the
  expectation over the next batch alone, given what the memory is now, is
  `next_batch/`.

  Args:
    problem: what was learned.
    name: of the method.
    trials: of its runs.
    batch: the size of a batch.

  Returns:
    By `own/`, `next_batch/` or `smg/` and a field of
    `bj.diagnostics.MultiGradientBias`, (trials, seeds).
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

  def measure(given, data):
    params, state, value, key = given
    own = methods.METHODS[name].make(
      count, key, ('heads',), methods.own_value(name, value)
    )
    begin = oracle.init(params)
    batches = jax.vmap(lambda k: problem.batch(k, data, batch))(
      jax.random.split(key, BATCHES)
    )
    jacobian = lambda batch: oracle.update(batch, begin, params)[0]

    def add(total, batch):
      return jax.tree.map(jnp.add, total, jacobian(batch)), None

    first = jax.eval_shape(jacobian, jax.tree.map(lambda x: x[0], batches))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
    total, _ = jax.lax.scan(add, zeros, batches)
    truth = jax.tree.map(lambda x: x / BATCHES, total)
    of = lambda link, begun, remember: bj.diagnostics.multi_gradient_bias(
      oracle, link, begun, params, batches, truth, remember=remember
    )
    return {
      'own': of(own, state, True),
      'next_batch': of(own, state, False),
      'smg': of(smg, smg.init(params), False),
    }

  # The same batches for a seed whatever the hyperparameter.
  keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(
    jnp.tile(jnp.arange(seeds), len(trials))
  )
  run_all = jax.jit(
    lambda given, data: jax.lax.map(lambda one: measure(one, data), given)
  )
  given = params, state, jnp.asarray(values), keys
  found = jax.device_get(run_all(given, problem.data))
  return {
    f'{which}/{field}': np.asarray(value, np.float64).reshape(-1, seeds)
    for which, result in found.items()
    for field, value in result._asdict().items()
  }


def measure(
  results: harness.Results,
  problem: problems.Problem,
  sizes: Sequence[int],
  outcomes: Mapping[str, comparison.Outcome],
) -> dict[str, harness.Interval]:
  """How many times SMG's bias is that of slower methods, and of controls.

  `mean`, whose weights never move, and `moco_no_memory`, which takes MoCo's
  weight steps on single batches, tell how much of a ratio comes from weights
  that are slow; the weights of `moco_exact` are as fast as SMG's.

  Args:
    results: to which biases and ratios are added, at the best learning rate for
      each value of the method's own hyperparameter (the coordinate `own`) and
      each size (`batch`), and `bias_ratio` as chosen, at the last size.
    problem: what was learned.
    sizes: of a batch, the last that of the training; empty for no measurement.
    outcomes: of the runs, by method.

  Returns:
    The latter ratio by method.
  """
  ratios = {}
  for name in [name for name in MEASURED if name in outcomes and sizes]:
    outcome = outcomes[name]
    if outcome.failure:
      continue
    place = {'method': name, 'data': problem.name}
    ran = [trial for trial in outcome.trials if trial.trained]
    best = [
      max(
        (trial for trial in ran if trial.point['own'] == own),
        key=lambda trial: trial.score,
      )
      for own in sorted({trial.point['own'] for trial in ran})
    ]
    for batch in sizes:
      measured = biases(problem, name, best, batch)
      for i, trial in enumerate(best):
        own = int(trial.point['own'])
        numbers = _summary({k: v[i] for k, v in measured.items()})
        results.put({**place, 'batch': batch, 'own': own}, numbers)
        if trial.point['own'] == outcome.point['own']:
          ratios[name] = numbers['bias_ratio']
    results.add(place, bias_ratio=ratios[name])
  return ratios


def _summary(measured: Mapping[str, np.ndarray]) -> dict[str, Any]:
  numbers: dict[str, Any] = {
    f'bias/{k}': harness.reduced(v, 'mean') for k, v in measured.items()
  }
  for field, end in (
    ('from_min_norm', '/from_min_norm'),
    ('at_own_weights', ''),
  ):
    # Without any bias of one's own the ratio is infinite, not an error.
    with np.errstate(divide='ignore'):
      ratio = measured[f'smg/{field}'] / measured[f'own/{field}']
    numbers[f'bias_ratio{end}'] = harness.mean_interval(ratio)
  return numbers
