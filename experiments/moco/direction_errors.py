"""Conflicts of gradients and errors of their directions, along a run."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.moco import compare, methods

# Methods whose directions are compared with the exact ones.
BIASED = ('smg', 'mgda', 'pcgrad', 'cagrad', 'upgrad', 'moco_exact')


class WatchState(NamedTuple):
  """State of `watch`.

  Attributes:
    steps: number of steps in which two gradients conflict.
    pairs: sum over steps of the fraction of pairs that conflict.
    memory: state of the aggregator.
  """

  steps: chex.Array
  pairs: chex.Array
  memory: Any


def detect_conflicts(jacobian: bj.Jacobian) -> tuple[Any, Any]:
  """Whether two gradients have a negative cosine, and the fraction of pairs."""
  cosines = bj.diagnostics.conflict_cosines(jacobian)
  negative = cosines[jnp.triu_indices(len(cosines), 1)] < 0
  return jnp.any(negative).astype(jnp.float32), jnp.mean(negative)


def watch(link: optax.GradientTransformation) -> optax.GradientTransformation:
  """Passes a Jacobian on; counts its conflicts and updates an aggregator.

  Args:
    link: an aggregator with memory, whose direction is not used.
  """

  def init_fn(params):
    return WatchState(jnp.zeros([]), jnp.zeros([]), link.init(params))

  def update_fn(jacobian, state, params=None, **extra_args):
    del extra_args
    _, memory = link.update(jacobian, state.memory, params)
    step, pairs = detect_conflicts(jacobian)
    return jacobian, WatchState(state.steps + step, state.pairs + pairs, memory)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class DirectionError(NamedTuple):
  """Errors of a direction of the trunk at one point.

  Attributes:
    bias: norm of the mean direction minus the exact one.
    deviation: root mean square distance of a direction from the exact one.
    exact: norm of the exact direction.
  """

  bias: chex.Array
  deviation: chex.Array
  exact: chex.Array


def measure_errors(
  links: Mapping[str, Any],
  states: Mapping[str, Any],
  jacobian: Callable[[chex.PRNGKey], bj.Jacobian],
  keys: chex.PRNGKey,
  params: Any,
  ideal: Mapping[str, Any],
) -> dict[str, DirectionError]:
  r"""Compares mean stochastic directions with those of exact gradients.

  .. math::
    \| \mathbb{E}_\xi [ d(J_\xi) ] - d(\mathbb{E}_\xi [ J_\xi ]) \|

  Both expectations are means over the same batches, so that sampling error of
  the gradients does not count as bias. States pass from batch to batch at the
  fixed point: the expectation includes the memory of a method.

  Args:
    links: aggregators by name.
    states: their states at the point, by name.
    jacobian: draws a stochastic Jacobian with the rest `heads`.
    keys: keys of the batches.
    params: the point, with a sequence `trunk`.
    ideal: by name, another stateless aggregator of the exact direction.

  Returns:
    A `DirectionError` by name, in units of a gradient norm.
  """

  def mean_directions(links, states, draw):
    def one(key, states):
      drawn = draw(key)
      moved = {
        name: link.update(drawn, states[name], params)
        for name, link in links.items()
      }
      directions = {name: move[0].trunk for name, move in moved.items()}
      squares = {
        name: optax.tree.norm(x, squared=True) for name, x in directions.items()
      }
      return (drawn, directions, squares), {n: m[1] for n, m in moved.items()}

    def add(carry, key):
      total, states = carry
      terms, states = one(key, states)
      return (jax.tree.map(jnp.add, total, terms), states), None

    shapes, _ = jax.eval_shape(one, keys[0], states)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (total, _), _ = jax.lax.scan(add, (zeros, states), keys)
    return jax.tree.map(lambda x: x / len(keys), total)

  states = {name: states[name] for name in links}
  truth, directions, squares = mean_directions(links, states, jacobian)
  # Also a mean, because PCGrad draws the order of the gradients.
  exact_links = {**links, **ideal}
  exact_states = {
    name: link.init(params) if name in ideal else states[name]
    for name, link in exact_links.items()
  }
  _, exact, _ = mean_directions(exact_links, exact_states, lambda _: truth)

  def compare(mean, ideal, square):
    cross = optax.tree.vdot(mean, ideal)
    norm = optax.tree.norm(ideal)
    deviation = jnp.sqrt(jnp.maximum(square - 2 * cross + norm**2, 0))
    bias = optax.tree.norm(optax.tree.sub(mean, ideal))
    return DirectionError(bias, deviation, norm)

  return {n: compare(directions[n], exact[n], squares[n]) for n in links}


def train_watched(
  runs: compare.Runs,
  options: harness.Options,
  points: tuple[Any, Any],
  samples: int,
) -> harness.Trained:
  """Trains with the mean of the gradients, and measures all directions.

  Args:
    runs: runs at a batch size.
    options: options of these runs.
    points: chosen hyperparameters of the mean, and of MoCo with exact weights,
      whose memory follows the run.
    samples: batches of a measured bias.
  """
  problem, settings = runs.problem, options.settings
  count, rest = len(problem.tasks), ('heads',)

  def make(name, own=0):
    value = methods.hyperparameter_value(name, own)
    return methods.METHODS[name].make(count, jax.random.key(17), rest, value)

  def tracker(context):
    return make('moco_exact', context.hyper['own'].astype(int))

  def solver(context):
    return optax.chain(
      problem.oracle(),
      watch(tracker(context)),
      bj.aggregators.mean(count),
      compare.make_adam(context.hyper['rate'], settings.steps),
    )

  def evaluate(context, params, state):
    links = {name: make(name) for name in BIASED if name != 'moco_exact'}
    states = {name: link.init(params) for name, link in links.items()}
    watched = state[1]
    links['moco_exact'] = tracker(context)
    states['moco_exact'] = watched.memory
    oracle = problem.oracle()
    begin = oracle.init(params)
    draw = lambda key: oracle.update(
      problem.batch(key, context.data, settings.batch), begin, params
    )[0]
    errors = measure_errors(
      links,
      states,
      draw,
      jax.random.split(context.key, samples),
      params,
      # With exact gradients, no memory is needed.
      {'moco_exact': make('smg')},
    )
    metrics = {
      'conflicts/steps': watched.steps / watched.memory.count,
      'conflicts/pairs': watched.pairs / watched.memory.count,
    }
    for name, error in errors.items():
      metrics |= {f'{k}/{name}': v for k, v in error._asdict().items()}
    return metrics

  rate, own = points[0]['rate'], points[1]['own']
  fill = lambda value: np.full(len(options.seeds), value, np.float32)
  identity = harness.run_settings(settings, *compare.COMPARISON_SETTINGS)
  return harness.train(
    solver,
    harness.Task(
      init=lambda context: problem.init(context.seed_key),
      batch=lambda context: problem.batch(
        context.key, context.data, settings.batch
      ),
      data=problem.data,
      hyper={'rate': fill(rate), 'own': fill(own)},
    ),
    harness.Training.from_options(
      options,
      steps=settings.steps,
      chunk=-(-settings.steps // 4),
      name=f'{problem.name}/watched',
      settings=identity | {'bias_samples': samples},
    ),
    harness.Measure(evaluate),
  )


def add_errors(
  results: harness.Results, at: Mapping[str, Any], trained: harness.Trained
) -> dict[str, np.ndarray]:
  """Adds shares of conflicts, and errors relative to exact directions.

  Args:
    results: receives the metrics.
    at: coordinates of the data set and the batch size.
    trained: run of `train_watched`.

  Returns:
    Relative biases by method, (seeds,).
  """
  history = trained.history
  results.put(
    at,
    {
      'conflicting_steps': history['conflicts/steps'][-1],
      'conflicting_pairs': history['conflicts/pairs'][-1],
    },
  )
  biases = {}
  for name in BIASED:
    # Ratios of means: near stationary points, exact directions vanish.
    bias, deviation, exact = (
      history[f'{kind}/{name}'].mean(axis=0) for kind in DirectionError._fields
    )
    biases[name] = bias / exact
    results.put({'method': name, **at}, {'bias': biases[name]})
    if name in ('smg', 'moco_exact'):
      results.put({'method': name, **at}, {'deviation': deviation / exact})
  return biases
