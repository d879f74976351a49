"""Methods for leaders whose follower acts in several contexts."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.pbrl import contexts, markov_games

RADIUS = 1.0  # Of zero order, divided by the update count, as in the paper.


class Study(NamedTuple):
  """The problem on which a binary compares methods.

  Attributes:
    process: (leader's weights, index of a context, parameters of a cell) -> a
      `contexts.Process`.
    contexts: number of contexts.
    start: from a key to the leader's initial weights.
    shape: of the follower's logits, (states, actions).
    cells: parameters by name for each row of the table, with `temperature`.
  """

  process: Callable[[Any, Any, Any], contexts.Process]
  contexts: int
  start: Callable[[Any], Any]
  shape: tuple[int, int]
  cells: Sequence[dict[str, float]]


class Cell(NamedTuple):
  """A study with the parameters of one cell of the table.

  Attributes:
    study: the study.
    hyper: parameters by name, with the leader's rate.
  """

  study: Study
  hyper: Any

  @property
  def temperature(self) -> Any:
    """The temperature of the follower's entropy."""
    return self.hyper['temperature']

  def process(self, x: Any, k: Any) -> contexts.Process:
    """The follower's process in a context."""
    return self.study.process(x, k, self.hyper)

  def over(self, function: Callable[..., Any], x: Any, z: Any) -> Any:
    """Applies a function of (process, logits) in all contexts."""
    indices = range(self.study.contexts)
    return jnp.stack([function(self.process(x, k), z[k]) for k in indices])

  def improved(self, x: Any, z: Any) -> Any:
    """Logits after a step of policy iteration."""
    return self.over(
      lambda p, z: contexts.improve(p, z, self.temperature), x, z
    )

  def values(self, x: Any, z: Any) -> Any:
    """The follower's returns with entropy."""
    value = lambda p, z: p.start @ contexts.soft_values(p, z, self.temperature)
    return self.over(value, x, z)

  def leader_returns(self, x: Any, z: Any, policy: Any = jax.nn.softmax) -> Any:
    """The leader's returns under the follower's logits."""
    return self.over(lambda p, z: contexts.leader_return(p, policy(z)), x, z)

  def draw(self, key: Any) -> Any:
    """Draws the context of an update."""
    return jax.random.randint(key, (), 0, self.study.contexts)


def make_solver(
  study: Study, method: str, settings: Any, context: harness.Context
):
  """Makes the solver of a method in one cell."""
  cell = Cell(study, context.hyper)
  clip, sgd = optax.clip_by_global_norm(1.0), optax.sgd(cell.hyper['rate'])
  upper = optax.chain(clip, sgd)
  if method == 'amd':
    return bj.descend(adaptive_design(cell, settings.backups), upper=upper)

  def follow(params, batch, inner):
    del batch
    move = params.value - cell.improved(params.upper, params.value)
    return (), params._replace(upper=None, lower=None, value=move), inner

  following = bj.oracle(
    follow, (), counts={'gradients/lower': study.contexts}, moves=('value',)
  )
  sequences = {
    'upper': upper,
    'value': bj.Sequence(optax.sgd(1.0), start=lambda params: params.lower),
  }
  if method == 'zero_order':
    return bj.descend(following, zero_order(cell), **sequences)
  if method in ('hpgd', 'exact_gradient'):
    loss = at_optimum if method == 'hpgd' else at_optima
    hyper = bj.gradient(
      lambda params, batch: loss(cell, params, batch), name='upper', of='upper'
    )
    return bj.descend(following, hyper, **sequences)
  scale = markov_games.rising(*settings.penalty, settings.steps)
  penalty = lambda count: scale(count) / cell.temperature
  # The follower moves first: a response to the weights before the update, times
  # a large penalty, would give the leader a wrong gradient.
  forms = {'value_penalty': value_penalty, 'bellman_penalty': bellman_penalty}
  return bj.descend(
    following,
    *forms[method](cell, penalty),
    **sequences,
    # Steps along action values shift all logits of a state, so they are
    # normalised: otherwise floats lose the differences.
    lower=bj.Sequence(
      optax.sgd(lambda k: 1 / (cell.temperature * penalty(k))),
      set=jax.nn.log_softmax,
    ),
  )


def value_penalty(cell: Cell, penalty: Callable[[Any], Any]):
  """Makes the oracles of the value penalty, for follower and leader."""
  problem = bj.BilevelProblem(
    lambda x, y, batch: -cell.leader_returns(x, y, contexts.straight).mean(),
    lambda x, y, batch: -cell.values(x, y).mean(),
  )
  rule: dict[str, Any] = {'penalty': penalty, 'rescale': False}
  visits = lambda p, z: contexts.visits(p, jax.nn.softmax(z))

  def natural(params, directions):
    # Derivatives in probabilities, divided by the visits.
    counts = cell.over(visits, params.upper, params.lower)
    counts = jnp.maximum(counts / cell.study.contexts, 1e-12)
    return directions._replace(lower=directions.lower / counts[:, :, None])

  lower = bj.oracles.penalised_lower_gradient(problem, **rule)
  return (
    _transformed(lower, natural, lower.moves),
    _transformed(
      bj.value_gap(problem, **rule),
      lambda params, directions: directions._replace(lower=None),
      ('upper',),
    ),
  )


def bellman_penalty(cell: Cell, penalty: Callable[[Any], Any]):
  """Makes the oracles of the Bellman penalty, for follower and leader.

  It weights a state by the visits of the optimal policy, so that it has the
  scale of the value penalty.
  """
  temperature = cell.temperature

  def height(process, z, best, weights):
    # Of the follower's logits z, with the values of its optimum.
    values = contexts.soft_values(process, best, temperature)
    q = contexts.backup(process, values)
    log = jax.lax.stop_gradient(jax.nn.log_softmax(z))
    terms = contexts.straight(z) * (temperature * log - q)
    return jnp.sum(weights * terms.sum(axis=1))

  def total(x, y, value, weight, *, own):
    best = jax.lax.stop_gradient(value)
    gaps = []
    for k in range(cell.study.contexts):
      process = cell.process(x, k)
      fixed = jax.lax.stop_gradient(process)
      visits = contexts.visits(fixed, jax.nn.softmax(best[k]))
      gap = height(process, y[k], best[k], visits)
      if own:
        gap -= height(process, best[k], best[k], visits)
      gaps.append(gap)
    gap = jnp.stack(gaps).mean()
    leader = -cell.leader_returns(x, y, contexts.straight).mean()
    return leader + weight * gap

  def lower(params, batch, count):
    del batch
    weight = penalty(count)
    slope = jax.grad(total, argnums=1)(
      params.upper, params.lower, params.value, weight, own=False
    )
    visits = cell.over(
      lambda p, z: contexts.visits(p, jax.nn.softmax(z)),
      params.upper,
      params.value,
    )
    counts = jnp.maximum(visits / cell.study.contexts, 1e-12)
    slope = slope / counts[:, :, None]
    return (), params._replace(upper=None, lower=slope, value=None), count + 1

  def upper(params, batch, count):
    del batch
    loss, slope = jax.value_and_grad(total)(
      params.upper, params.lower, params.value, penalty(count), own=True
    )
    after = params._replace(upper=slope, lower=None, value=None)
    return (loss,), after, count + 1

  start = lambda params: jnp.zeros([], jnp.int32)
  return (
    bj.oracle(lower, (), start, moves=('lower',)),
    bj.oracle(upper, ('upper',), start, moves=('upper',)),
  )


def _transformed(oracle, transform, moves):
  """Transforms the directions of an oracle by a function of the params."""

  def update(batch, state, params=None, **extra_args):
    directions, state = oracle.update(batch, state, params, **extra_args)
    return transform(params, directions), state

  return bj.oracles.Oracle(oracle.init, update, moves, linear=True)


def at_optimum(cell: Cell, params: Any, key: Any, x: Any = None) -> Any:
  """The leader's loss at the follower's optimum in a drawn context.

  Args:
    cell: of the table.
    params: with `value` near the follower's optimum.
    key: of the context.
    x: the leader's weights; None for those of the params.
  """
  k = cell.draw(key)
  process = cell.process(params.upper if x is None else x, k)
  best = contexts.optimum(process, params.value[k], cell.temperature)
  return -contexts.leader_return(process, jax.nn.softmax(best))


def at_optima(cell: Cell, params: Any, batch: Any) -> Any:
  """The leader's loss at the follower's optima in all contexts."""
  del batch

  def at_best(process, z):
    best = contexts.optimum(process, z, cell.temperature)
    return contexts.leader_return(process, jax.nn.softmax(best))

  return -cell.over(at_best, params.upper, params.value).mean()


def zero_order(cell: Cell):
  """Estimates the leader's gradient by differences in a random direction."""

  def fn(params, batch, count):
    one, key = jax.random.split(batch)
    direction = jax.random.normal(key, params.upper.shape)
    radius = RADIUS / (count + 1)
    f, g = (
      at_optimum(cell, params, one, x)
      for x in (params.upper, params.upper + radius * direction)
    )
    slope = (g - f) / radius * direction
    return (f,), params._replace(upper=slope, lower=None, value=None), count + 1

  start = lambda params: jnp.zeros([], jnp.float32)
  return bj.oracle(fn, ('upper',), start, moves=('upper',))


def adaptive_design(cell: Cell, backups: int):
  """Computes the leader's gradient from tables with some backups per update."""
  indices = range(cell.study.contexts)

  def advance(x, tables, steps):
    def one(k):
      step = lambda _, t: contexts.design_step(
        lambda x: cell.process(x, k), x, t, cell.temperature
      )
      start = jax.tree.map(lambda leaf: leaf[k], tables)
      return jax.lax.fori_loop(0, steps, step, start)

    stack = lambda *leaves: jnp.stack(leaves)
    return jax.tree.map(stack, *(one(k) for k in indices))

  def fn(params, batch, tables):
    k = cell.draw(batch)
    tables = advance(params.upper, tables, backups)
    start = cell.process(params.upper, k).start
    slope = -(start @ tables.leader_slopes[k])
    loss = -(start @ tables.leader_values[k])
    return (loss,), params._replace(upper=slope, lower=None), tables

  def begin(params):
    x = params.upper
    empty = contexts.zero_tables(cell.study.shape[0], x.size, x.dtype)
    tables = jax.tree.map(lambda z: jnp.stack([z for _ in indices]), empty)
    # As in its authors' runs, the tables begin at the first weights.
    return advance(x, tables, 300)

  counts = {'gradients/lower': backups * len(indices)}
  return bj.oracle(fn, ('upper',), begin, counts=counts, moves=('upper',))


def measure(study: Study, context: harness.Context, params, state):
  """Measures the leader's return at the follower's optimum, and its error."""
  del state
  cell, x, z = Cell(study, context.hyper), params.upper, params.lower

  def best(process, z):
    improve = lambda _, z: contexts.improve(process, z, cell.temperature)
    return jax.lax.fori_loop(0, 20, improve, z)

  optimum = cell.over(best, x, jnp.zeros_like(z))
  after = cell.improved(x, optimum)
  change = jax.nn.softmax(after) - jax.nn.softmax(optimum)
  return {
    'leader_return': cell.leader_returns(x, optimum).mean(),
    'pair_return': cell.leader_returns(x, z).mean(),
    'follower_gap': (cell.values(x, optimum) - cell.values(x, z)).mean(),
    'error': jnp.max(jnp.abs(change)),
  }
