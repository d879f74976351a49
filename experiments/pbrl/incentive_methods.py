"""Methods of incentive design: a penalty, and a gradient through learning."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.pbrl import markov_games, zero_sum

# Pairs of policies evaluated in an update: each player against the other's best
# response. A response moves by the values that the penalty is made of.
PBRL_EVALUATIONS = 2


def problem_of(game: bj.rl.MarkovGame, tau: float) -> bj.BilevelProblem:
  """The designer's loss, and the payoff between the players."""

  def loss(x, y, batch):
    del x, batch
    a, b = zero_sum.policies_of(y)
    mdp = bj.rl.induced_mdp(game, a, game.rewards[0], player=1)
    return -bj.rl.expected_return(mdp, b)

  def payoff(x, y, batch):
    del batch
    return zero_sum.payoff(game, jax.nn.sigmoid(x), y, tau)

  return bj.BilevelProblem(loss, payoff)


def make_pbrl(settings: Any, context: harness.Context):
  """Penalty descent with the function of Nikaido and Isoda."""
  game, tau = context.own, settings.game.temperature
  inner = context.hyper['inner_rate']

  def faced(at):
    x, y = at
    return bj.rl.zero_sum_responses(
      game, jax.nn.sigmoid(x), zero_sum.policies_of(y), temperature=tau
    )

  return bj.descend(
    at_one_point(
      bj.oracles.nikaido_isoda(
        problem_of(game, tau),
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
  """Adam, whose rate falls to zero by a cosine where `falls` is one."""
  rate, falls = context.hyper['rate'], context.hyper['falls']
  cosine = optax.cosine_decay_schedule(1.0, steps)
  return optax.adam(lambda count: rate * (1 - falls * (1 - cosine(count))))


def at_one_point(penalty: bj.oracles.Oracle, respond: bj.oracles.Oracle):
  """The penalty and the best responses' moves, before either has moved.

  Both are made of the values of (a, b') and (a', b), so these two pairs are all
  that an update evaluates.
  """

  def fn(params, batch, inner):
    slopes, inner = penalty.update(batch, inner, params)
    moves, _ = respond.update(batch, respond.init(params), params)
    return (), slopes._replace(value=moves.value), inner

  # The penalty's own state counts what is evaluated.
  return bj.oracle(fn, (), penalty.init, moves=('upper', 'lower', 'value'))


def make_meta(settings: Any, method: str, context: harness.Context):
  """The gradient through K steps of players who learn."""
  game, tau = context.own, settings.game.temperature
  inner = context.hyper['inner_rate']
  loss = problem_of(game, tau).upper
  steps = inner_steps_of(method)

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
    # The players go on from where they have come to: a step of length one.
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
  upper = designer(context, updates_of(method, settings))
  return bj.descend(oracle, upper=upper, lower=optax.sgd(1.0))


def inner_steps_of(method: str) -> int:
  """K, from a method's name."""
  return int(method.split('/')[1].removeprefix('k'))


def evaluations_of(method: str) -> int:
  """Evaluated pairs of policies in an update.

  What the backward pass of the K steps costs, as much again, is not counted, in
  the meta-gradient's favour.
  """
  return PBRL_EVALUATIONS if method == 'pbrl' else inner_steps_of(method)


def updates_of(method: str, settings: Any) -> int:
  """As many as PBRL's, or as its evaluations of pairs allow."""
  if method == 'pbrl' or method.endswith('/equal_updates'):
    return settings.steps
  return max(1, settings.steps * PBRL_EVALUATIONS // inner_steps_of(method))
