"""The score function: gradients of an expectation under a policy."""

import chex
import jax
import jax.numpy as jnp


def score_function_loss(costs: chex.Array, log_probs: chex.Array) -> chex.Array:
  r"""A loss whose derivative is that of an expectation under a policy.

  .. math::
    \nabla_\theta \, \mathrm{E}_{\xi \sim \pi_\theta} [ c(\xi) ] =
    \mathrm{E} [ \nabla c(\xi) + c(\xi) \nabla \log \pi_\theta(\xi) ]
    \approx \frac{1}{n} \sum_i \nabla c_i +
    (c_i - b_i) \nabla \log \pi_\theta(\xi_i)

  The baseline :math:`b_i` is the mean of the other costs, which adds no bias
  for independent samples. Use it for an upper loss that is an expectation over
  trajectories of the lower level's policy, preferences between trajectories for
  instance.

  Args:
    costs: the cost of each sample, (samples,). They may also depend on
      parameters.
    log_probs: :math:`\log \pi_\theta(\xi_i)`, (samples,), up to a constant; for
      a trajectory, the sum over its actions.

  Returns:
    A scalar: the mean cost, with this derivative.

  Raises:
    ValueError: if costs and log_probs are not of the same shape (samples,).

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp
    >>> arms = jnp.array([0, 1, 1, 1])
    >>> def loss(logits):  # The first arm costs 1.
    ...   return bj.rl.score_function_loss(
    ...     1.0 - arms, jax.nn.log_softmax(logits)[arms])
    >>> print(jax.grad(loss)(jnp.zeros(2)))  # Lowers its probability.
    [ 0.25 -0.25]

  References:
    Williams, Simple Statistical Gradient-following Algorithms for Connectionist
    Reinforcement Learning, 1992. The leave-one-out baseline: Kool, van Hoof and
    Welling, Buy 4 REINFORCE Samples, Get a Baseline for Free!, 2019.
  """
  if jnp.ndim(costs) != 1 or jnp.shape(costs) != jnp.shape(log_probs):
    raise ValueError(
      'score_function_loss takes costs and log_probs of shape (samples,), got '
      f'{jnp.shape(costs)} and {jnp.shape(log_probs)}.'
    )
  count = len(costs)
  constant = jax.lax.stop_gradient(costs)
  baseline = (constant.sum() - constant) / max(count - 1, 1)
  # Zero, with the derivative of the logarithm.
  score = log_probs - jax.lax.stop_gradient(log_probs)
  return jnp.mean(costs) + jnp.mean((constant - baseline) * score)
