"""Methods for incentive design: penalties, and gradients of the designer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.pbrl import incentive_search, markov_games, zero_sum
from experiments.pbrl.incentives import Incentives

# Extragradient steps by which an update follows the equilibrium.
_MATRIX_STEPS = 10
_K = 'meta_gradient/k'  # Names of meta-gradients end with K.
PENALTIES = ('value_penalty', 'bellman_penalty', 'nikaido_isoda')
TITLES = {
  'value_penalty': 'value penalty',
  'bellman_penalty': 'Bellman penalty',
  'nikaido_isoda': 'Nikaido-Isoda penalty',
  'hpgd': 'HPGD, its mean',
  'random_search': 'random search',
}


def title(method: str) -> str:
  """The title of a method."""
  if method.startswith(_K):
    return f'meta-gradient, K = {inner_steps(method)}'
  return TITLES[method]


def meta_gradients(counts: tuple[int, ...]) -> tuple[str, ...]:
  """Names of the meta-gradients with these numbers of inner steps."""
  return tuple(f'{_K}{count}' for count in counts)


def inner_steps(method: str) -> int:
  """Reads K from the name of a meta-gradient."""
  return int(method.removeprefix(_K))


def count_pairs(method: str) -> int:
  """Evaluated pairs of policies per update.

  Several rewards of one pair count once. Backward passes are not counted.
  """
  if method.startswith(_K):
    # The pair after the last step is the designer's.
    return inner_steps(method) + 1
  return {
    'value_penalty': 3,  # The pair, a response, and the equilibrium.
    'bellman_penalty': 2,  # The pair, and the equilibrium.
    'nikaido_isoda': 3,  # The pair, and two responses.
    'hpgd': 1,
    'exact': 1,
    'random_search': incentive_search.PAIRS,
  }[method]


def count_updates(method: str, settings: Any) -> int:
  """Updates of a method with equal numbers of evaluated pairs."""
  if method == 'exact':
    return settings.exact_steps
  return max(1, settings.evaluations // count_pairs(method))


def make_solver(
  method: str, settings: Any, context: harness.Context
) -> bj.descent.Solver:
  """Makes the solver of a method on one game."""
  incentives = Incentives.from_context(settings, context)
  steps = count_updates(method, settings)
  if method == 'random_search':
    return incentive_search.random_search(incentives, context.hyper)
  schedule = optax.cosine_decay_schedule(1.0, steps)
  rate = context.hyper['rate']
  upper = optax.adam(lambda count: rate * schedule(count))
  if method in ('hpgd', 'exact'):
    oracle = implicit_gradient(incentives, reactions=method == 'exact')
    return bj.descend(oracle, upper=upper, lower=optax.sgd(1.0))
  inner_rate = context.hyper['inner_rate']
  if method.startswith(_K):
    oracle = meta_gradient(incentives, inner_steps(method), inner_rate)
    return bj.descend(oracle, upper=upper, lower=optax.sgd(1.0))
  first, last = settings.penalty
  if method == 'bellman_penalty':
    # Its weights of states sum to 1, those of the others to the sum of
    # discounts.
    scale = 1 / (1 - settings.game.discount)
    first, last = first * scale, last * scale
  penalty = markov_games.rising(first, last, steps)
  make = {
    'value_penalty': value_penalty,
    'bellman_penalty': bellman_penalty,
    'nikaido_isoda': nikaido_isoda,
  }[method]
  # Natural steps, as the learning players take them: a plain gradient vanishes
  # with the probability of an action.
  oracle = bj.rl.natural(
    make(incentives, penalty), _state_weights(incentives, method)
  )
  return bj.descend(
    oracle,
    upper=upper,
    lower=optax.sgd(inner_rate / settings.game.temperature),
    value=bj.Sequence(optax.sgd(1.0), start=STARTS[method]),
  )


def _state_weights(incentives, method):
  """Weights of states in a penalty, for both players."""
  game = incentives.game

  def weights(params):
    if method == 'bellman_penalty':
      return game.initial, game.initial
    a, b = zero_sum.as_policies(params.lower)
    mdp = bj.rl.induced_mdp(game, a, game.rewards[0], player=1)
    visits = bj.rl.state_visits(mdp, b) / (1 - game.discount)
    return visits, visits

  return weights


class Followed(NamedTuple):
  """The policies that the value penalty compares with.

  Attributes:
    response: logits of the second player's best response.
    equilibrium: logits of both players at the equilibrium.
  """

  response: chex.Array
  equilibrium: zero_sum.Pair


# First policies that a penalty compares with, from the params.
STARTS = {
  'value_penalty': lambda params: Followed(params.lower[1], params.lower),
  'bellman_penalty': lambda params: params.lower,
  'nikaido_isoda': lambda params: params.lower,
}


def value_penalty(
  incentives: Incentives, penalty: Callable[[Any], Any]
) -> bj.oracles.Oracle:
  r"""Makes the penalty on values, for the minimiser and the maximiser.

  .. math::
    p = [\max_{b'} J(x, a, b') - v(x)] + [\max_{b'} J(x, a, b') - J(x, a, b)]

  with v, the payoff at the equilibrium. The first player loses against the best
  response, the second one against its own.
  """
  game, tau = incentives.game, incentives.temperature

  def gap(x, y, value):
    costs = incentives.costs(x)
    values = zero_sum.state_values(game, costs, value.equilibrium, tau)
    a, b = zero_sum.as_policies(y)
    _, mdp = bj.rl.zero_sum_responses(game, costs, (a, b), temperature=tau)
    response = jax.nn.softmax(value.response)
    best = bj.rl.state_values(mdp, response, tau)
    here = bj.rl.expected_return(mdp, b, tau)
    after = Followed(
      bj.rl.backup(mdp, best) / tau,
      _solved(incentives, costs, values, value.equilibrium),
    )
    height = 2 * game.initial @ best - game.initial @ values - here
    return height, after

  return _penalised(incentives, gap, penalty, count_pairs('value_penalty'))


def bellman_penalty(
  incentives: Incentives, penalty: Callable[[Any], Any]
) -> bj.oracles.Oracle:
  r"""Makes the penalty on the matrix games of the equilibrium's values.

  .. math::
    p = \sum_s \rho(s) \Big[ \max_{b'} \big( a_s^\top Q_s b' + \tau H(b') -
    \tau H(a_s) \big) - \min_{a'} \big( a'^\top Q_s b_s - \tau H(a') +
    \tau H(b_s) \big) \Big]

  with Q(x), the values of pairs of actions at the equilibrium. It is zero if
  both policies are in equilibrium in each state.
  """
  game, tau = incentives.game, incentives.temperature

  def gap(x, y, value):
    costs = incentives.costs(x)
    values = zero_sum.state_values(game, costs, value, tau)
    pairs = zero_sum.pair_values(game, costs, values)
    loss_a, loss_b = zero_sum.answers(pairs, y, tau)
    best = jax.nn.logsumexp(loss_a, axis=1) + jax.nn.logsumexp(loss_b, axis=1)
    a, b = zero_sum.as_policies(y)
    height = best - bj.rl.entropy(a) - bj.rl.entropy(b)
    return tau * game.initial @ height, _solved(
      incentives, costs, values, value
    )

  return _penalised(incentives, gap, penalty, count_pairs('bellman_penalty'))


def _solved(incentives, costs, values, equilibrium):
  """Logits of the equilibrium after a step of `zero_sum.follow`."""
  costs, values = jax.lax.stop_gradient((costs, values))
  return zero_sum.solve_matrices(
    zero_sum.pair_values(incentives.game, costs, values),
    equilibrium,
    temperature=incentives.temperature,
    steps=_MATRIX_STEPS,
  )


def _penalised(incentives, gap, penalty, pairs):
  """Makes the gradient of a penalised loss, and the moves of `value`."""

  def fn(params, batch, count):
    weight = penalty(count)

    def total(x, y):
      height, after = gap(x, y, params.value)
      loss = incentives.loss(x, y, batch)
      scale = jnp.maximum(weight, 1)  # As in the oracles of the library.
      return (loss + weight * height) / scale, (loss, height, after)

    (upper, lower), (loss, height, after) = jax.grad(
      total, (0, 1), has_aux=True
    )(params.upper, params.lower)
    moves = jax.tree.map(jnp.subtract, params.value, after)
    slopes = params._replace(upper=upper, lower=lower, value=moves)
    return (loss, height), slopes, count + 1

  return bj.oracle(
    fn,
    ('upper', 'gap'),
    lambda params: jnp.zeros([], jnp.int32),
    counts={'gradients/upper': 1, 'gradients/lower': pairs},
    moves=('upper', 'lower', 'value'),
  )


def nikaido_isoda(
  incentives: Incentives, penalty: Callable[[Any], Any]
) -> bj.oracles.Oracle:
  """Makes the Nikaido-Isoda penalty, whose responses move from one point.

  Both need the values of (a, b') and (a', b) only.
  """
  tau = incentives.temperature

  def faced(at):
    x, y = at
    return bj.rl.zero_sum_responses(
      incentives.game,
      incentives.costs(x),
      zero_sum.as_policies(y),
      temperature=tau,
    )

  height = bj.oracles.nikaido_isoda(
    bj.BilevelProblem(incentives.loss, incentives.payoff), penalty=penalty
  )
  respond = bj.rl.policy_mirror_descent(
    faced, temperature=tau, at=lambda p: (p.upper, p.lower)
  )

  def fn(params, batch, inner):
    slopes, inner = height.update(batch, inner, params)
    moves, _ = respond.update(batch, respond.init(params), params)
    values = [bj.values(inner)[name] for name in ('upper', 'gap')]
    return values, slopes._replace(value=moves.value), inner

  # The state of the penalty counts the evaluations.
  return bj.oracle(
    fn, ('upper', 'gap'), height.init, moves=('upper', 'lower', 'value')
  )


def meta_gradient(
  incentives: Incentives, steps: int, rate: chex.Numeric
) -> bj.oracles.Oracle:
  """Makes the gradient through steps of learning players.

  Args:
    incentives: the problem.
    steps: K, number of steps.
    rate: of the players' natural steps.
  """

  def learned(x, y):
    def step(y, _):
      return zero_sum.learn(
        incentives.game,
        incentives.costs(x),
        y,
        temperature=incentives.temperature,
        rate=rate,
      ), None

    return jax.lax.scan(step, y, length=steps)[0]

  def fn(params, batch, inner):
    def through(x):
      y = learned(x, params.lower)
      return incentives.loss(x, y, batch), y

    (value, after), slope = jax.value_and_grad(through, has_aux=True)(
      params.upper
    )
    # The players continue from their last policies: a step of length 1.
    moves = jax.tree.map(jnp.subtract, params.lower, after)
    return (value,), params._replace(upper=slope, lower=moves), inner

  return bj.oracle(
    fn,
    ('upper',),
    counts={
      'gradients/upper': 1,
      'gradients/lower': steps,
      'hessian_vector_products/lower': steps,
    },
    moves=('upper', 'lower'),
  )


def implicit_gradient(
  incentives: Incentives, *, reactions: bool
) -> bj.oracles.Oracle:
  r"""Makes the designer's gradient at a followed equilibrium.

  At an equilibrium each policy answers the other one in the matrix game of each
  state, :math:`y = R(Q(x), y)`, and the derivative of Q in x has constant
  policies. So

  .. math:: \nabla F = \nabla_x f + (\partial_x R)^\top \lambda, \qquad
    \lambda = \nabla_y f + (\partial_y R)^\top \lambda

  Args:
    incentives: the problem.
    reactions: whether the players react to one another. False neglects
      :math:`\partial_y R`: the estimator of HPGD for each player in the process
      that the other one's policy induces.
  """
  game, tau = incentives.game, incentives.temperature

  def fn(params, batch, inner):
    x, y = params.upper, params.lower
    value, (direct, slopes) = jax.value_and_grad(incentives.loss, (0, 1))(
      x, y, batch
    )

    def pairs_at(x):
      costs = incentives.costs(x)
      values = zero_sum.state_values(game, costs, y, tau)
      return zero_sum.pair_values(game, costs, values)

    pairs, pull = jax.vjp(pairs_at, x)
    if reactions:
      slopes = _with_reactions(pairs, y, slopes, tau)
    _, pull_pairs = jax.vjp(lambda q: zero_sum.answers(q, y, tau), pairs)
    upper = direct + pull(*pull_pairs(slopes))[0]
    after = zero_sum.solve_matrices(
      pairs, y, temperature=tau, steps=_MATRIX_STEPS
    )
    moves = jax.tree.map(jnp.subtract, y, after)
    return (value,), params._replace(upper=upper, lower=moves), inner

  return bj.oracle(
    fn,
    ('upper',),
    counts={'gradients/upper': 1, 'gradients/lower': 1},
    moves=('upper', 'lower'),
  )


def _with_reactions(pairs, y, slopes, temperature):
  """Solves the adjoint equation of the players' reactions in each state."""
  a, b = zero_sum.as_policies(y)
  scaled = pairs / temperature
  # Derivatives of the policies in logits.
  spread = lambda p: jax.vmap(jnp.diag)(p) - p[:, :, None] * p[:, None, :]
  to_a = jnp.einsum('sij,sjk->sik', spread(a), scaled)
  to_b = jnp.einsum('sij,skj->sik', spread(b), scaled)
  slope_a, slope_b = slopes
  matrix = jnp.eye(b.shape[1], dtype=b.dtype) + to_b @ to_a
  right = slope_b - jnp.einsum('sij,sj->si', to_b, slope_a)
  adjoint_b = jnp.linalg.solve(matrix, right[:, :, None])[:, :, 0]
  adjoint_a = slope_a + jnp.einsum('sij,sj->si', to_a, adjoint_b)
  return adjoint_a, adjoint_b
