"""Methods of leaders whose follower acts in several contexts."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.pbrl import contexts, markov_games

RADIUS = 1.0  # Of the zero order, over the number of the update; the paper's.


class Study(NamedTuple):
  """What a binary compares methods on.

  Attributes:
    process: from the leader's weights (weights,), the number of a context and
      the numbers of a cell, by name, to a `contexts.Process`.
    contexts: how many.
    start: from a key to the leader's first weights.
    shape: of the follower's logits, (states, actions).
    cells: numbers by name for each row of the table; `temperature` is one.
  """

  process: Callable[[Any, Any, Any], contexts.Process]
  contexts: int
  start: Callable[[Any], Any]
  shape: tuple[int, int]
  cells: Sequence[dict[str, float]]


class Cell(NamedTuple):
  """A study at the numbers of one cell of the table.

  Attributes:
    study: the study.
    hyper: numbers by name, the leader's rate too.
  """

  study: Study
  hyper: Any

  @property
  def heat(self) -> Any:
    """The temperature of the follower's entropy."""
    return self.hyper['temperature']

  def process(self, x: Any, k: Any) -> contexts.Process:
    """What the follower faces in a context."""
    return self.study.process(x, k, self.hyper)

  def over(self, function: Callable[..., Any], x: Any, z: Any) -> Any:
    """A function of a process and the follower's logits, in all contexts."""
    every = range(self.study.contexts)
    return jnp.stack([function(self.process(x, k), z[k]) for k in every])

  def answers(self, x: Any, z: Any) -> Any:
    """Logits of the follower's best answers to its values."""
    return self.over(lambda p, z: contexts.improve(p, z, self.heat), x, z)

  def values(self, x: Any, z: Any) -> Any:
    """What logits are worth to the follower."""
    value = lambda p, z: p.start @ contexts.soft_values(p, z, self.heat)
    return self.over(value, x, z)

  def gains(self, x: Any, z: Any, policy: Any = jax.nn.softmax) -> Any:
    """What logits are worth to the leader."""
    return self.over(lambda p, z: contexts.leader_return(p, policy(z)), x, z)

  def drawn(self, key: Any) -> Any:
    """The context of an update."""
    return jax.random.randint(key, (), 0, self.study.contexts)


def make_solver(
  study: Study, method: str, settings: Any, context: harness.Context
):
  """The solver of a method in one cell."""
  cell = Cell(study, context.hyper)
  clip, sgd = optax.clip_by_global_norm(1.0), optax.sgd(cell.hyper['rate'])
  upper = optax.chain(clip, sgd)
  if method == 'amd':
    return bj.descend(adaptive_design(cell, settings.backups), upper=upper)

  def follow(params, batch, inner):
    del batch
    move = params.value - cell.answers(params.upper, params.value)
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
  if method == 'hpgd':
    hyper = bj.gradient(
      lambda params, batch: at_optimum(cell, params, batch),
      name='upper',
      of='upper',
    )
    return bj.descend(following, hyper, **sequences)
  scale = markov_games.rising(*settings.penalty, settings.steps)
  penalty = lambda count: scale(count) / cell.heat
  # The follower first: times a large penalty, an answer to the weights of the
  # update before would be a wrong slope for the leader.
  return bj.descend(
    following,
    *penalties(cell, penalty),
    **sequences,
    # Along worths, not advantages, each step adds a value over the temperature
    # to all logits of a state, in which floats would drown.
    lower=bj.Sequence(
      optax.sgd(lambda k: 1 / (cell.heat * penalty(k))), set=jax.nn.log_softmax
    ),
  )


def penalties(cell: Cell, penalty: Callable[[Any], Any]):
  """Oracles of the value penalty, of the follower and of the leader."""
  problem = bj.BilevelProblem(
    lambda x, y, batch: -cell.gains(x, y, contexts.straight).mean(),
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
    _changed(lower, natural, lower.moves),
    _changed(
      bj.value_gap(problem, **rule),
      lambda params, directions: directions._replace(lower=None),
      ('upper',),
    ),
  )


def _changed(oracle, change, moves):
  """An oracle whose directions are changed by a function of the params."""

  def update(batch, state, params=None, **extra_args):
    directions, state = oracle.update(batch, state, params, **extra_args)
    return change(params, directions), state

  return bj.oracles.Oracle(oracle.init, update, moves, linear=True)


def at_optimum(cell: Cell, params: Any, key: Any, x: Any = None) -> Any:
  """The leader's loss at the follower's optimum in a drawn context.

  Args:
    cell: of the table.
    params: whose second follower is near its optimum.
    key: of the context.
    x: the leader's weights, those of the params if None.
  """
  k = cell.drawn(key)
  here = cell.process(params.upper if x is None else x, k)
  best = contexts.optimum(here, params.value[k], cell.heat)
  return -contexts.leader_return(here, jax.nn.softmax(best))


def zero_order(cell: Cell):
  """The leader's slope by differences in a random direction."""

  def fn(params, batch, count):
    one, key = jax.random.split(batch)
    away = jax.random.normal(key, params.upper.shape)
    radius = RADIUS / (count + 1)
    f, g = (
      at_optimum(cell, params, one, x)
      for x in (params.upper, params.upper + radius * away)
    )
    slope = (g - f) / radius * away
    return (f,), params._replace(upper=slope, lower=None, value=None), count + 1

  start = lambda params: jnp.zeros([], jnp.float32)
  return bj.oracle(fn, ('upper',), start, moves=('upper',))


def adaptive_design(cell: Cell, backups: int):
  """The leader's slope, by tables that take some backups an update."""
  every = range(cell.study.contexts)

  def advance(x, tables, steps):
    def one(k):
      step = lambda _, t: contexts.design_step(
        lambda x: cell.process(x, k), x, t, cell.heat
      )
      of_context = jax.tree.map(lambda leaf: leaf[k], tables)
      return jax.lax.fori_loop(0, steps, step, of_context)

    stack = lambda *leaves: jnp.stack(leaves)
    return jax.tree.map(stack, *(one(k) for k in every))

  def fn(params, batch, tables):
    k = cell.drawn(batch)
    tables = advance(params.upper, tables, backups)
    start = cell.process(params.upper, k).start
    slope = -(start @ tables.gain_slopes[k])
    gain = start @ tables.gains[k]
    return (-gain,), params._replace(upper=slope, lower=None), tables

  def begin(params):
    x = params.upper
    empty = contexts.zero_tables(cell.study.shape[0], x.size, x.dtype)
    tables = jax.tree.map(lambda z: jnp.stack([z for _ in every]), empty)
    # Like its authors' runs, it begins with tables of the first weights.
    return advance(x, tables, 300)

  counts = {'gradients/lower': backups * len(every)}
  return bj.oracle(fn, ('upper',), begin, counts=counts, moves=('upper',))


def measure(study: Study, context: harness.Context, params, state):
  """The leader's return at the exact optimum, and how exact that is."""
  del state
  cell, x, z = Cell(study, context.hyper), params.upper, params.lower

  def best(process, z):
    improve = lambda _, z: contexts.improve(process, z, cell.heat)
    return jax.lax.fori_loop(0, 20, improve, z)

  at = cell.over(best, x, jnp.zeros_like(z))
  change = jax.nn.softmax(cell.answers(x, at)) - jax.nn.softmax(at)
  return {
    'leader_return': cell.gains(x, at).mean(),
    'pair_return': cell.gains(x, z).mean(),
    'follower_gap': (cell.values(x, at) - cell.values(x, z)).mean(),
    'error': jnp.max(jnp.abs(change)),
  }
