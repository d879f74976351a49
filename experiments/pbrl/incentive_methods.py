"""Methods for incentive design: a penalty, and a meta-gradient."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.pbrl import markov_games, zero_sum

# Policy pairs per update: each player against the other's best response. The
# penalty and the responses use the same values.
PBRL_EVALUATIONS = 2


def make_problem(game: bj.rl.MarkovGame, tau: float) -> bj.BilevelProblem:
  """Makes the designer's loss and the payoff between the players."""

  def loss(x, y, batch):
    del x, batch
    a, b = zero_sum.as_policies(y)
    mdp = bj.rl.induced_mdp(game, a, game.rewards[0], player=1)
    return -bj.rl.expected_return(mdp, b)

  def payoff(x, y, batch):
    del batch
    return zero_sum.payoff(game, jax.nn.sigmoid(x), y, tau)

  return bj.BilevelProblem(loss, payoff)


def make_pbrl(settings: Any, context: harness.Context):
  """Makes penalty descent with the Nikaido-Isoda function."""
  game, tau = context.own, settings.game.temperature
  inner = context.hyper['inner_rate']

  def faced(at):
    x, y = at
    return bj.rl.zero_sum_responses(
      game, jax.nn.sigmoid(x), zero_sum.as_policies(y), temperature=tau
    )

  return bj.descend(
    at_one_point(
      bj.oracles.nikaido_isoda(
        make_problem(game, tau),
        penalty=markov_games.rising(*settings.penalty, settings.steps),
      ),
      bj.rl.policy_mirror_descent(
        faced, temperature=tau, at=lambda p: (p.upper, p.lower)
      ),
    ),
    upper=designer(context, settings.steps),
    lower=optax.adam(inner),
    value=bj.Sequence(optax.sgd(1.0), start=lambda params: params.lower),
  )


def designer(context: harness.Context, steps: int):
  """Makes Adam; with `falls` of 1 its rate decays to zero by a cosine."""
  rate, falls = context.hyper['rate'], context.hyper['falls']
  cosine = optax.cosine_decay_schedule(1.0, steps)
  return optax.adam(lambda count: rate * (1 - falls * (1 - cosine(count))))


def at_one_point(penalty: bj.oracles.Oracle, respond: bj.oracles.Oracle):
  """Evaluates the penalty and the moves of the responses at the same point.

  Both need the values of (a, b') and (a', b) only.
  """

  def fn(params, batch, inner):
    slopes, inner = penalty.update(batch, inner, params)
    moves, _ = respond.update(batch, respond.init(params), params)
    return (), slopes._replace(value=moves.value), inner

  # The state of the penalty counts the evaluations.
  return bj.oracle(fn, (), penalty.init, moves=('upper', 'lower', 'value'))


def make_meta(settings: Any, method: str, context: harness.Context):
  """Makes the gradient through K steps of learning players."""
  game, tau = context.own, settings.game.temperature
  inner = context.hyper['inner_rate']
  loss = make_problem(game, tau).upper
  steps = parse_inner_steps(method)

  def learned(x, y):
    def step(y, _):
      return zero_sum.learn(
        game, jax.nn.sigmoid(x), y, temperature=tau, rate=inner
      ), None

    return jax.lax.scan(step, y, length=steps)[0]

  def fn(params, batch, inner):
    def through(x):
      y = learned(x, params.lower)
      return loss(x, y, batch), y

    (value, after), slope = jax.value_and_grad(through, has_aux=True)(
      params.upper
    )
    # The players continue from their last policies: a step of length 1.
    moves = jax.tree.map(jnp.subtract, params.lower, after)
    return (value,), params._replace(upper=slope, lower=moves), inner

  oracle = bj.oracle(
    fn,
    ('upper',),
    counts={
      'gradients/upper': 1,
      'gradients/lower': steps,
      'hessian_vector_products/lower': steps,
    },
    moves=('upper', 'lower'),
  )
  upper = designer(context, count_updates(method, settings))
  return bj.descend(oracle, upper=upper, lower=optax.sgd(1.0))


def parse_inner_steps(method: str) -> int:
  """Reads K from the name of a method."""
  return int(method.split('/')[1].removeprefix('k'))


def count_evaluations(method: str) -> int:
  """Evaluated policy pairs per update.

  The backward pass through the K steps costs as much again and is not counted,
  in favour of the meta-gradient.
  """
  return PBRL_EVALUATIONS if method == 'pbrl' else parse_inner_steps(method)


def count_updates(method: str, settings: Any) -> int:
  """Updates at as many updates, or as many evaluations, as PBRL."""
  if method == 'pbrl' or method.endswith('/equal_updates'):
    return settings.steps
  return max(1, settings.steps * PBRL_EVALUATIONS // parse_inner_steps(method))
