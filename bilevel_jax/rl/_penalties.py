"""Penalties for nested problems whose lower level is a decision process.

The value penalty is `bj.value_gap` of a problem whose lower loss is
`follower_loss`, minus the regularised return. Its value sequence follows the
best policy by `policy_mirror_descent` or `soft_value_iteration_step`. The
Bellman penalty is `bellman_gap` with the same sequence.
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

# Maps the upper variable to the lower level's process.
Process = Callable[[Any], _mdp.MDP]


def _is_process(node):
  return isinstance(node, _mdp.MDP)


def follower_loss(process: Process, *, temperature: chex.Numeric) -> types.Loss:
  r"""Minus the follower's regularised return, as a lower loss.

  .. math::
    g(x, y) = - V^{\pi_y}_{M_\tau(x)}(\rho), \qquad
    V^\pi = E \sum_t \gamma^t [ r_x(s_t, a_t) + \tau H(\pi(s_t)) ]

  with :math:`\pi_y` the softmax of y.

  Args:
    process: maps the upper variable to an `MDP`; rewards, transitions or both
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
  r"""Moves logits towards the best policy by policy mirror descent.

  .. math::
    d = \log \pi_z - Q^{\pi_z} / \tau, \qquad \pi_z = \mathrm{softmax}(z)

  A step :math:`z - \eta d` is mirror descent in the Kullback-Leibler
  divergence; for :math:`\eta = 1` it is soft policy iteration, which converges
  quadratically. It solves a linear system over the states.

  Args:
    process: maps the upper variable to an `MDP`, or to a pytree of them for a
      pytree of logits.
    temperature: :math:`\tau > 0`.
    of: the sequence of logits.
    at: maps all parameters to the argument of `process`; both levels, for
      instance, if a process depends on other players' policies.

  Returns:
    An oracle without losses; each process counts as a gradient of the lower
    loss.

  Raises:
    ValueError: if the temperature is not above zero; at init, if a process has
      invalid probabilities or the logits do not have the shape of its rewards.

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
  r"""Moves logits towards the best policy by soft value iteration.

  .. math::
    d = z - [ r + \gamma P \, \tau \log \textstyle\sum_a \exp z ] / \tau

  The logits represent :math:`Q / \tau`. A step of size 1 is one backup, a
  contraction by :math:`\gamma`, and costs one product with the transitions.

  Args:
    process: as in `policy_mirror_descent`.
    temperature: :math:`\tau > 0`.
    of: the sequence of logits.
    at: as in `policy_mirror_descent`.

  Returns:
    An oracle without losses.

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

  which is zero exactly for optimal policies if :math:`\rho` is positive in
  every state. With the policy :math:`\pi` of the sequence `value` as the
  optimal policy, constant in derivatives,

  .. math::
    \nabla_x p = - \mathrm{E}_{\rho, \pi_y} \nabla_x Q^\pi
      + \mathrm{E}_{\rho, \pi} \nabla_x Q^\pi, \qquad
    \nabla_{\pi_y(s)} p = \rho(s) [ q_s + \tau \nabla (- H)(\pi_y(s)) ]

  Args:
    problem: provides the upper loss; its lower loss is not used.
    process: maps the upper variable to an `MDP`.
    temperature: :math:`\tau > 0`.
    weights: :math:`\rho`, (states,); by default the process's initial
      probabilities.
    direct: whether the lower variable is a table of probabilities, whose set
      must then be the simplex, instead of logits. The value sequence always has
      logits.
    penalty: None for two rows, to be weighed by an aggregator; a weight or a
      schedule gives the fused form, as in `value_gap`.
    rescale: whether the fused form is divided by a penalty above one.

  Returns:
    An oracle for parameters with the sequences `upper`, `lower`, `value`. It
    measures `upper`, `lower` (the first part of p) and `gap` (p itself, which
    is negative while the value sequence lags).

  Raises:
    ValueError: if the temperature is not above zero or the penalty is negative;
      at init, if rho is zero in a state or has another shape.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> process = lambda x: bj.rl.make_mdp(
    ...   [[[1.0], [1.0]]], x[None], discount=0.0
    ... )
    >>> problem = bj.BilevelProblem(lambda x, y, batch: x.sum(), None)
    >>> oracle = bj.rl.bellman_gap(problem, process, temperature=1.0)
    >>> best = jnp.array([[0.0, 1.0]])
    >>> params = bj.sequences(upper=best[0], lower=best, value=best)
    >>> gradients, state = oracle.update(None, oracle.init(params), params)
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
    # Keeps the logarithm of a zero probability finite.
    log = (
      jnp.log(jnp.maximum(y, jnp.finfo(y.dtype).tiny))
      if direct
      else jax.nn.log_softmax(y)
    )
    here = height(log, y if direct else jnp.exp(log), q)
    # A sum of small differences, instead of a difference of large sums.
    difference = rho @ (here - height(best, jnp.exp(best), q))
    return difference, (rho @ here, ())

  counts = {'gradients/upper': 1, 'gradients/lower': 2}
  oracle = _penalised.penalised(
    problem._replace(outputs=None),
    _penalised.Penalty(gap, ('gap',), counts),
    penalty=penalty,
    rescale=rescale,
  )

  def check(params):
    mdp = _checked_process(process, params.upper)
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
        f'{int(np.argmin(rho > 0))}: the penalty ignores the policy there, so '
        'a penalty of zero does not imply an optimal policy. Pass positive '
        'weights=.'
      )

  return _with_check(oracle, check)


def _require_temperature(name, temperature):
  """Without entropy, the best policy is not smooth in the process."""
  _checks.within(name, 'the temperature', temperature, 0, open_low=True)


def _following(name, direction, process, temperature, of, at):
  """An oracle for a sequence of logits that follows a best policy."""
  _require_temperature(name, temperature)

  def fn(params, batch, inner):
    del batch
    directions = jax.tree.map(
      lambda mdp, z: direction(mdp, z).astype(z.dtype),
      process(at(params)),
      getattr(params, of),
      is_leaf=_is_process,
    )
    return (), base.gradients(params, **{of: directions}), inner

  def count(params):
    return {'gradients/lower': len(jax.tree.leaves(getattr(params, of)))}

  oracle = base.oracle(fn, (), counts=count, moves=(of,), linear=True)

  def check(params):
    mdps = _checked_process(process, at(params))
    if mdps is None:
      return
    mdps = jax.tree.leaves(mdps, is_leaf=_is_process)
    expected = [jnp.shape(mdp.rewards) for mdp in mdps]
    actual = [jnp.shape(z) for z in jax.tree.leaves(getattr(params, of))]
    if actual != expected:
      raise ValueError(
        f'{name}: logits have the shape of the rewards, (states, actions), '
        f'here {", ".join(map(str, expected))}; got '
        f'{", ".join(map(str, actual))} in the sequence {of!r}, whose default '
        'start is `lower`.'
      )

  return _with_check(oracle, check)


def _checked_process(process, arguments) -> Any:
  """The checked process for concrete arguments; None for traced ones."""
  if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(arguments)):
    return None
  mdps = process(arguments)
  for mdp in jax.tree.leaves(mdps, is_leaf=_is_process):
    _mdp.make_mdp(
      mdp.transitions, mdp.rewards, discount=mdp.discount, initial=mdp.initial
    )
  return mdps


def _with_check(oracle, check):
  """An oracle whose init checks the parameters first."""

  def init(params):
    if params is not None and hasattr(params, '_fields'):
      check(params)
    return oracle.init(params)

  return base.Oracle(init, oracle.update, oracle.moves, linear=oracle.linear)
