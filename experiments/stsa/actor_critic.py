"""A tabular actor and its TD(0) critic as two coupled sequences."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

import bilevel_jax as bj
from experiments.stsa import chains


class Process(NamedTuple):
  """A small Markov decision process with closed-form values.

  The policy is a softmax of the logits x per state. The last logit is zero, so
  that each policy has a unique x. Rewards include an entropy bonus, which keeps
  the optimal policy random.

  Attributes:
    moves: transition probabilities, (states, actions, states).
    rewards: (states, actions).
    restart: initial distribution, (states,).
    discount: in (0, 1).
    price: weight of the entropy bonus.
  """

  moves: chex.Array
  rewards: chex.Array
  restart: chex.Array
  discount: float
  price: float

  def log_policy(self, x: chex.Array) -> chex.Array:
    """Log probabilities of actions, (states, actions)."""
    free = x.reshape(len(self.restart), -1)
    return jax.nn.log_softmax(jnp.pad(free, ((0, 0), (0, 1))))

  def under(self, x: chex.Array) -> tuple[chex.Array, chex.Array]:
    """Transition matrix and mean rewards under the policy."""
    log = self.log_policy(x)
    policy = jnp.exp(log)
    moves = jnp.einsum('sa,sat->st', policy, self.moves)
    return moves, jnp.sum(policy * (self.rewards - self.price * log), axis=1)

  def values(self, x: chex.Array) -> chex.Array:
    """The values of the states, (states,)."""
    moves, rewards = self.under(x)
    eye = jnp.eye(len(rewards), dtype=rewards.dtype)
    return jnp.linalg.solve(eye - self.discount * moves, rewards)

  def visits(self, x: chex.Array) -> chex.Array:
    """The normalised discounted visitation of the states, (states,)."""
    moves, rewards = self.under(x)
    eye = jnp.eye(len(rewards), dtype=rewards.dtype)
    chain = (eye - self.discount * moves).T
    return (1 - self.discount) * jnp.linalg.solve(chain, self.restart)

  def objective(self, x: chex.Array) -> chex.Array:
    """The actor's objective: (1 - discount) times the mean initial value."""
    return (1 - self.discount) * self.restart @ self.values(x)


def make_process() -> Process:
  """Draws random transitions and rewards in [0, 1], with uniform restarts."""
  states, actions, draw = 4, 3, np.random.default_rng(0)
  moves = draw.dirichlet(np.ones(states), size=(states, actions))
  rewards = draw.uniform(size=(states, actions))
  as_array = lambda z: jnp.asarray(z, jnp.float32)
  restart = np.full(states, 1 / states)
  return Process(
    *map(as_array, (moves, rewards, restart)), discount=0.5, price=1.0
  )


def check_critic(process: Process, *, policies: int = 200) -> float:
  r"""Raises unless the critic's increment is strongly monotone.

  Args:
    process: process in which every policy has to visit every state.
    policies: number of random policies to check.

  Returns:
    The smallest eigenvalue of the symmetric part of :math:`D (I - \gamma P)`
    over these policies; D is the diagonal matrix of the visits.

  Raises:
    chains.AssumptionError: if it is not positive.
  """
  states, actions = process.rewards.shape
  keys = jax.random.split(jax.random.key(0), policies)

  def smallest_eigenvalue(key):
    x = 3 * jax.random.normal(key, (states * (actions - 1),))
    moves, _ = process.under(x)
    eye = jnp.eye(states)
    matrix = process.visits(x)[:, None] * (eye - process.discount * moves)
    return jnp.linalg.eigvalsh((matrix + matrix.T) / 2)[0]

  smallest = float(jax.vmap(smallest_eigenvalue)(keys).min())
  if not smallest > 0:
    raise chains.AssumptionError(
      'the critic is not strongly monotone: an eigenvalue of the symmetric '
      f'part of D (I - gamma P) is {smallest:.3g}. Restart in every state.'
    )
  return smallest


def actor_critic_chain(process: Process | None = None) -> chains.Chain:
  r"""Makes the chain of actor x and critic y, with one sample for both.

  .. math::
    \delta = r(s, a) - \tau \log \pi_x(a | s) + \gamma y(s') - y(s), \qquad
    v = \delta \, \nabla_x \log \pi_x(a | s), \qquad h = \delta \, e_s

  with s drawn from the discounted visits of the policy, so that the noise is
  a martingale, as the theorem assumes.

  Args:
    process: defaults to a random one with 4 states and 3 actions.

  Returns:
    A `chains.Chain` whose batches are PRNG keys of samples. Its errors are
    `main`, the squared gradient norm of the objective, and `inner`, the squared
    distance of the critic to the values.

  Raises:
    chains.AssumptionError: from `check_critic`.
  """
  process = process or make_process()
  check_critic(process)
  states, actions = process.rewards.shape

  def sample(z, key):
    x, y = z.x, z.y1
    log = process.log_policy(x)
    keys = jax.random.split(key, 3)
    s = jax.random.categorical(keys[0], jnp.log(process.visits(x)))
    a = jax.random.categorical(keys[1], log[s])
    after = jax.random.categorical(keys[2], jnp.log(process.moves[s, a]))
    reward = process.rewards[s, a] - process.price * log[s, a]
    return s, a, reward + process.discount * y[after] - y[s], jnp.exp(log[s])

  def actor(z, key):
    s, a, delta, policy = sample(z, key)
    score = jax.nn.one_hot(a, actions) - policy
    rows = jnp.zeros((states, actions - 1)).at[s].set(delta * score[:-1])
    return rows.ravel()

  def critic(z, key):
    s, _, delta, _ = sample(z, key)
    return jnp.zeros(states).at[s].set(delta)

  def errors(z):
    slope = jax.grad(process.objective)(z.x)
    lag = z.y1 - process.values(z.x)
    return {'main': jnp.vdot(slope, slope), 'inner': jnp.vdot(lag, lag)}

  def start(key):
    # The critic starts at its fixed point, against a transient of the actor.
    x = jax.random.normal(key, (states * (actions - 1),))
    return bj.sequences(x=x, y1=process.values(x))

  return chains.Chain(
    names=('x', 'y1'),
    increments={'x': actor, 'y1': critic},
    start=start,
    errors=errors,
    jacobian=_jacobian(process),
    sizes=(states * (actions - 1), states),
    draw=lambda key: key,
  )


def mean_increments(
  process: Process, x: chex.Array, y: chex.Array
) -> tuple[chex.Array, chex.Array]:
  """Expected increments of actor and critic."""
  log = process.log_policy(x)
  policy = jnp.exp(log)
  after = process.discount * process.moves @ y
  delta = process.rewards - process.price * log + after - y[:, None]
  weighted = process.visits(x)[:, None] * policy * delta
  total = weighted.sum(axis=1)
  actor = weighted - policy * total[:, None]
  return actor[:, :-1].ravel(), total


def _jacobian(process: Process) -> np.ndarray:
  """Minus the derivative of the mean increments at the optimal policy."""
  with jax.enable_x64(True):
    exact = process._replace(
      **{
        name: jnp.asarray(np.asarray(getattr(process, name)), jnp.float64)
        for name in ('moves', 'rewards', 'restart')
      }
    )
    states, actions = process.rewards.shape
    size = states * (actions - 1)
    best = chains.minimise(lambda x: -exact.objective(x), np.zeros(size))

    def increments(z):
      return -jnp.concatenate(mean_increments(exact, z[:size], z[size:]))

    at = jnp.concatenate([best, exact.values(best)])
    return np.asarray(jax.jacobian(increments)(at))
