"""The bias of multi-gradient directions at the end of a run, beside SMG's."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

import bilevel_jax as bj
from experiments import harness
from experiments.harness import comparison
from experiments.moco import methods
from experiments.moco import problem as problems

BATCHES = 256
MEASURED = ('mean', 'moco', 'moco_no_memory', 'moco_exact')


def biases(
  problem: problems.Problem,
  name: str,
  trials: Sequence[comparison.Trial],
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
    batches = jax.vmap(lambda k: problem.batch(k, data))(
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
  place: str,
  by_batch: dict[int, problems.Problem],
  outcomes: dict[str, comparison.Outcome],
) -> tuple[dict[str, float], dict[str, harness.Interval]]:
  """How many times SMG's bias is that of slower methods, and of controls.

  `mean`, whose weights never move, and `moco_no_memory`, which takes MoCo's
  weight steps on single batches, tell how much of a ratio comes from weights
  that are slow; the weights of `moco_exact` are as fast as SMG's.

  Args:
    place: name of the problem, in metrics.
    by_batch: the problem with several sizes of a batch, the last that of the
      training; none for no measurement.
    outcomes: of the runs, by method.

  Returns:
    Metrics `<method>/<place>/batch<size>/<share>/...` at the best learning rate
    for each value of the method's own hyperparameter, those without `<share>`
    at the chosen one, and `<method>/<place>/bias_ratio`, as chosen, at the last
    size. The latter also by method, with their intervals.
  """
  metrics, ratios = {}, {}
  for name in [name for name in MEASURED if name in outcomes and by_batch]:
    outcome = outcomes[name]
    if outcome.failure:
      continue
    best = [
      max(trials, key=lambda trial: trial.score)
      for _, trials in sorted(_by_own(outcome).items())
      if any(trial.trained for trial in trials)
    ]
    for batch, problem in by_batch.items():
      found = biases(problem, name, best)
      for i, trial in enumerate(best):
        ours, ratio = _summary({k: v[i] for k, v in found.items()})
        at = f'{name}/{place}/batch{batch}'
        own = int(trial.point['own'])
        metrics |= {f'{at}/share{own}/{k}': v for k, v in ours.items()}
        if trial.point['own'] == outcome.point['own']:
          metrics |= {f'{at}/{k}': v for k, v in ours.items()}
          ratios[name] = ratio
    metrics |= ratios[name].metrics(f'{name}/{place}/bias_ratio')
  return metrics, ratios


def _by_own(outcome):
  found: dict[float, list[comparison.Trial]] = {}
  for trial in outcome.trials:
    found.setdefault(trial.point['own'], []).append(trial)
  return found


def _summary(
  found: dict[str, np.ndarray],
) -> tuple[dict[str, float], harness.Interval]:
  metrics = {f'bias/{k}': harness.reduced(v, 'mean') for k, v in found.items()}
  intervals = {}
  for field in ('from_min_norm', 'at_own_weights'):
    # Without any bias of one's own the ratio is infinite, not an error.
    with np.errstate(divide='ignore'):
      ratio = found[f'smg/{field}'] / found[f'own/{field}']
    intervals[field] = harness.mean_interval(ratio)
    end = '' if field == 'at_own_weights' else f'/{field}'
    metrics |= intervals[field].metrics(f'bias_ratio{end}')
  return metrics, intervals['at_own_weights']
