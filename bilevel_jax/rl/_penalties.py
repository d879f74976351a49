"""What a penalty method needs where the lower level is a decision process.

The value penalty is `bj.value_gap` of a problem whose lower loss is minus the
regularised return, `follower_loss`, at a value sequence that follows the best
policy, by `policy_mirror_descent` or `soft_value_iteration_step`. The Bellman
penalty is `bellman_gap`, at the same sequence.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax import _checks, types
from bilevel_jax.oracles import _penalised, base
from bilevel_jax.rl import _mdp, _optimal, _values

# From the upper variable to the lower level's process.
Process = Callable[[Any], _mdp.MDP]


def follower_loss(process: Process, *, temperature: chex.Numeric) -> types.Loss:
  r"""Minus the follower's regularised return, as a lower loss.

  .. math::
    g(x, y) = - V^{\pi_y}_{M_\tau(x)}(\rho), \qquad
    V^\pi = E \sum_t \gamma^t [ r_x(s_t, a_t) + \tau H(\pi(s_t)) ]

  with :math:`\pi_y` the softmax of y.

  Args:
    process: from the upper variable to an `MDP`; rewards, transitions or both
      may depend on it.
    temperature: :math:`\tau > 0`, reward per nat of entropy.

  Returns:
    A loss of (x, logits (states, actions), batch), for `bj.BilevelProblem`.

  Raises:
    ValueError: if the temperature is not above zero.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> def process(x):
    ...   return bj.rl.make_mdp([[[1.0], [1.0]]], x[None], discount=0.5)
    >>> loss = bj.rl.follower_loss(process, temperature=0.1)
    >>> rewards, logits = jnp.array([0.0, 2.0]), jnp.array([[0.0, 100.0]])
    >>> print(loss(rewards, logits, None))
    -4.0
  """
  _require_temperature('follower_loss', temperature)

  def loss(x, y, batch):
    del batch
    policy = jax.nn.softmax(y)
    return -_values.expected_return(process(x), policy, temperature)

  return loss


def policy_mirror_descent(
  process: Callable[[Any], Any],
  *,
  temperature: chex.Numeric,
  of: str = 'value',
  at: Callable[[Any], Any] = lambda params: params.upper,
) -> base.Oracle:
  r"""Moves logits to the best policy of a process, by policy mirror descent.

  .. math::
    d = \log \pi_z - Q^{\pi_z} / \tau, \qquad \pi_z = \mathrm{softmax}(z)

  A step :math:`z - \eta d` is one of mirror descent in the divergence of
  Kullback and Leibler; with :math:`\eta = 1` one of soft policy iteration,
  which converges quadratically. Costs a linear system in the states.

  Args:
    process: from the upper variable to an `MDP`; or to a pytree of them, for
      as many tables of logits.
    temperature: :math:`\tau > 0`.
    of: the sequence of logits.
    at: what `process` is given, of all parameters: both levels, where a
      process depends on other players' policies.

  Returns:
    An oracle that measures no loss; each process counts as a gradient of the
    lower one.

  Raises:
    ValueError: if the temperature is not above zero; at init, if a process is
      known and no process, for its rows that are no probabilities, or logits
      have another shape than its rewards.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp, optax
    >>> process = lambda x: bj.rl.make_mdp(
    ...   [[[1.0], [1.0]]], x[None], discount=0.5
    ... )
    >>> follow = bj.rl.policy_mirror_descent(process, temperature=1.0)
    >>> solver = bj.descend(follow, value=optax.sgd(1.0))
    >>> params = bj.sequences(
    ...   upper=jnp.log(jnp.array([1.0, 3.0])), value=jnp.zeros((1, 2))
    ... )
    >>> updates, _ = solver.update(None, solver.init(params), params)
    >>> print(jnp.exp(updates.value[0, 1] - updates.value[0, 0]).round(2))
    3.0

  References:
    Lan, `Policy Mirror Descent for Reinforcement Learning
    <https://arxiv.org/abs/2102.00135>`_, 2021. Cen, Cheng, Chen, Wei and Chi,
    `Fast Global Convergence of Natural Policy Gradient Methods with Entropy
    Regularization <https://arxiv.org/abs/2007.06558>`_, 2020.
  """

  def direction(mdp, z):
    q = _values.action_values(mdp, jax.nn.softmax(z), temperature)
    return jax.nn.log_softmax(z) - q / temperature

  return _following(
    'policy_mirror_descent', direction, process, temperature, of, at
  )


def soft_value_iteration_step(
  process: Callable[[Any], Any],
  *,
  temperature: chex.Numeric,
  of: str = 'value',
  at: Callable[[Any], Any] = lambda params: params.upper,
) -> base.Oracle:
  r"""Moves logits to those of the best policy, by soft value iteration.

  .. math::
    d = z - [ r + \gamma P \, \tau \log \textstyle\sum_a \exp z ] / \tau

  The logits stand for :math:`Q / \tau`. A step of length 1 is one backup, a
  contraction by :math:`\gamma`, for a product with the transitions.

  Args:
    process: as in `policy_mirror_descent`.
    temperature: :math:`\tau > 0`.
    of: the sequence of logits.
    at: as in `policy_mirror_descent`.

  Returns:
    An oracle that measures no loss.

  Raises:
    ValueError: as in `policy_mirror_descent`.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp, optax
    >>> process = lambda x: bj.rl.make_mdp(
    ...   [[[1.0], [1.0]]], x[None], discount=0.0
    ... )
    >>> follow = bj.rl.soft_value_iteration_step(process, temperature=0.5)
    >>> solver = bj.descend(follow, value=optax.sgd(1.0))
    >>> params = bj.sequences(
    ...   upper=jnp.array([1.0, 3.0]), value=jnp.zeros((1, 2))
    ... )
    >>> updates, _ = solver.update(None, solver.init(params), params)
    >>> print(updates.value)
    [[2. 6.]]
  """

  def direction(mdp, z):
    _, values = _optimal.best_response(temperature * z, temperature)
    return z - _values.backup(mdp, values) / temperature

  return _following(
    'soft_value_iteration_step', direction, process, temperature, of, at
  )


def bellman_gap(
  problem: types.BilevelProblem,
  process: Process,
  *,
  temperature: chex.Numeric,
  weights: Any = None,
  direct: bool = False,
  penalty: types.ScalarOrSchedule | None = None,
  rescale: bool = True,
) -> base.Oracle:
  r"""Gradients of an upper loss and of the Bellman penalty of a process.

  .. math::
    p(x, y) = \mathrm{E}_{s \sim \rho} [ \langle \pi_y(s), q_s(x) \rangle
      - \tau H(\pi_y(s)) ] - \min_{y'} \dots, \qquad
      q_{s, a}(x) = - \max_\pi Q^\pi_{M_\tau(x)}(s, a)

  zero where, and only where, the policy is optimal, if :math:`\rho` is positive
  in every state. With the policy :math:`\pi` of the sequence named `value` for
  the optimal one, and held fixed,

  .. math::
    \nabla_x p = - \mathrm{E}_{\rho, \pi_y} \nabla_x Q^\pi
      + \mathrm{E}_{\rho, \pi} \nabla_x Q^\pi, \qquad
    \nabla_{\pi_y(s)} p = \rho(s) [ q_s + \tau \nabla (- H)(\pi_y(s)) ]

  Args:
    problem: its upper loss; the lower one is not used.
    process: from the upper variable to an `MDP`.
    temperature: :math:`\tau > 0`.
    weights: :math:`\rho`, (states,); by default the process's initial
      probabilities.
    direct: whether the lower variable is the table of probabilities, which then
      needs the simplex as its set, and not of logits. The value sequence is of
      logits always.
    penalty: None for two rows, to be weighed by an aggregator; a weight or a
      schedule gives the fused form, as in `value_gap`.
    rescale: whether the fused form is divided by the penalty above one.

  Returns:
    An oracle for parameters with the sequences `upper`, `lower`, `value`. It
    measures `upper`, `lower`, the first part of p, and `gap`, p itself, which
    is negative while the value sequence lags.

  Raises:
    ValueError: if the temperature is not above zero or the penalty is negative;
      at init, if rho or the process is known and rho is zero in a state or has
      another shape.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> process = lambda x: bj.rl.make_mdp(
    ...   [[[1.0], [1.0]]], x[None], discount=0.0
    ... )
    >>> problem = bj.BilevelProblem(lambda x, y, batch: x.sum(), None)
    >>> oracle = bj.rl.bellman_gap(problem, process, temperature=1.0)
    >>> best = jnp.array([[0.0, 1.0]])
    >>> params = bj.sequences(upper=best[0], lower=best, value=best)
    >>> found, state = oracle.update(None, oracle.init(params), params)
    >>> print(bj.values(state)['gap'])
    0.0

  References:
    Shen, Yang and Chen, `Principled Penalty-based Methods for Bilevel
    Reinforcement Learning and RLHF <https://arxiv.org/abs/2402.06886>`_, 2024.
  """
  _require_temperature('bellman_gap', temperature)

  def height(log_policy, policy, q):
    return jnp.sum(policy * (temperature * log_policy - q), axis=-1)

  def gap(x, y, params, batch, known):
    del batch, known
    mdp = process(x)
    best = jax.nn.log_softmax(jax.lax.stop_gradient(params.value))
    q = _values.action_values(mdp, jnp.exp(best), temperature)
    rho = jnp.asarray(mdp.initial if weights is None else weights, q.dtype)
    # Of a probability that is zero, a logarithm that is finite.
    log = (
      jnp.log(jnp.maximum(y, jnp.finfo(y.dtype).tiny))
      if direct
      else jax.nn.log_softmax(y)
    )
    here = height(log, y if direct else jnp.exp(log), q)
    # One sum of small differences, not the difference of two large sums.
    difference = rho @ (here - height(best, jnp.exp(best), q))
    return difference, (rho @ here, ())

  counts = {'gradients/upper': 1, 'gradients/lower': 2}
  made = _penalised.penalised(
    problem._replace(outputs=None),
    _penalised.Penalty(gap, ('gap',), counts),
    penalty=penalty,
    rescale=rescale,
  )

  def check(params):
    mdp = _known(process, params.upper)
    rho = weights if weights is not None else mdp and mdp.initial
    if rho is None or isinstance(rho, jax.core.Tracer):
      return
    rho = np.asarray(rho)
    if mdp is not None and rho.shape != np.shape(mdp.initial):
      raise ValueError(
        'bellman_gap: rho has a weight for each state, the shape '
        f'{np.shape(mdp.initial)}, got {rho.shape}.'
      )
    if not np.all(rho > 0):
      raise ValueError(
        'bellman_gap: rho is zero in '
        f'{np.sum(~(rho > 0))} states, the first of them '
        f'{int(np.argmin(rho > 0))}: what a policy does there costs nothing, '
        'so that a penalty of zero is no optimal policy. Give weights=, all of '
        'them positive.'
      )

  return _checked(made, check)


def natural(
  oracle: Any,
  weights: Callable[[Any], Any],
  *,
  of: str = 'lower',
) -> base.Oracle:
  r"""Turns gradients in logits into natural ones, of known visits.

  .. math::
    d_{s, a} = \frac{\partial_{z_{s, a}}}{w(s) \, \pi_z(a | s)}

  which for a return with the visits w is minus the advantage. A plain gradient
  vanishes with the probability of an action, and of a state; this one does not.

  Args:
    oracle: whose gradient of the sequence is of tables of logits.
    weights: from all parameters to the visits, (states,), or to a pytree of
      them, for as many tables. Logits of a state whose visits are exactly 0, as
      `state_visits` gives them for states that cannot be reached, stay as they
      are; visits by another solver need exact zeros there too.
    of: the sequence.

  Returns:
    An oracle like the given one, but for that sequence.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp
    >>> loss = lambda p, batch: -jax.nn.softmax(p.lower)[0] @ jnp.arange(2.0)
    >>> oracle = bj.gradient(loss, of='lower')
    >>> oracle = bj.rl.natural(oracle, lambda params: jnp.ones(1))
    >>> params = bj.BilevelParams(None, jnp.array([[0.0, -9.0]]))
    >>> found, _ = oracle.update(None, oracle.init(params), params)
    >>> print(found.lower.round(2))
    [[ 0. -1.]]

  References:
    Kakade, A Natural Policy Gradient, 2001.
  """

  def update(batch, state, params=None, **extra_args):
    found, state = oracle.update(batch, state, params, **extra_args)

    def divide(visited, slope, logits):
      mass = visited[:, None] * jax.nn.softmax(logits)
      # A state without visits, or an action that no float can tell from
      # impossible, stays as it is. No threshold on the visits: how large their
      # rounding is depends on the processor, and `state_visits` has none in
      # states that cannot be reached.
      small = mass < jnp.finfo(mass.dtype).tiny
      found = jnp.where(small, 0, slope / jnp.where(small, 1, mass))
      return found.astype(slope.dtype)

    slopes = jax.tree.map(
      divide, weights(params), getattr(found, of), getattr(params, of)
    )
    return found._replace(**{of: slopes}), state

  return base.wrapped(
    oracle,
    oracle.init,
    update,
    again=lambda other: natural(other, weights, of=of),
  )


def _require_temperature(who, temperature):
  """Without entropy the best policy is no smooth function of the process."""
  _checks.within(who, 'the temperature', temperature, 0, open_low=True)


def _following(who, direction, process, temperature, of, at):
  """An oracle for a sequence of logits that follows a best policy."""
  _require_temperature(who, temperature)
  is_process = lambda node: isinstance(node, _mdp.MDP)

  def fn(params, batch, inner):
    del batch
    found = jax.tree.map(
      lambda mdp, z: direction(mdp, z).astype(z.dtype),
      process(at(params)),
      getattr(params, of),
      is_leaf=is_process,
    )
    return (), base.gradients(params, **{of: found}), inner

  def count(params):
    return {'gradients/lower': len(jax.tree.leaves(getattr(params, of)))}

  made = base.oracle(fn, (), counts=count, moves=(of,), linear=True)

  def check(params):
    known = _known(process, at(params))
    wanted = [
      jnp.shape(mdp.rewards)
      for mdp in jax.tree.leaves(known, is_leaf=is_process)
    ]
    given = [jnp.shape(z) for z in jax.tree.leaves(getattr(params, of))]
    if known is not None and given != wanted:
      raise ValueError(
        f'{who}: logits have the shape of the rewards, (states, actions), here '
        f'{", ".join(map(str, wanted))}; got {", ".join(map(str, given))} in '
        f'the sequence {of!r}, which starts at `lower` unless it is told.'
      )

  return _checked(made, check)


def _known(process, given) -> Any:
  """What a process is at given parameters, checked; None where traced."""
  if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(given)):
    return None
  is_process = lambda node: isinstance(node, _mdp.MDP)
  found = process(given)
  for mdp in jax.tree.leaves(found, is_leaf=is_process):
    _mdp.make_mdp(
      mdp.transitions, mdp.rewards, discount=mdp.discount, initial=mdp.initial
    )
  return found


def _checked(oracle, check):
  """An oracle whose init looks at the parameters first."""

  def init(params):
    if params is not None and hasattr(params, '_fields'):
      check(params)
    return oracle.init(params)

  return base.Oracle(init, oracle.update, oracle.moves, linear=oracle.linear)
