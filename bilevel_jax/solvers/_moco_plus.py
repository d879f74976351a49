"""MoCo+: tracked gradients with recursive variance reduction."""

from collections.abc import Callable, Sequence
from typing import Any

from bilevel_jax import aggregators, evaluation, oracles, types


def moco_plus(
  losses: Callable[..., Any] | Sequence[Callable[..., Any]],
  objectives: int | Sequence[str] | None = None,
  *,
  decay: types.ScalarOrSchedule,
  rest: Sequence[str] = (),
  trunk: Callable[[Any, Any], Any] | None = None,
  per_task: bool = False,
  **moco: Any,
) -> oracles.Oracle:
  r"""MoCo+: `moco` on gradients with recursive variance reduction.

  .. math::
    Y_k &= G(x_k; \xi_k) + (1 - \beta_k)
      [ Y_{k-1} - G(x_{k-1}; \xi_k) ] \\
    \lambda_k &= \Pi_{\Delta} [ \lambda_{k-1} - \gamma_k
      ( Y_k Y_k^\top + \rho I ) \lambda_{k-1} ], \qquad
    d_k = Y_k^\top \lambda_k

  Both gradients use the same batch, so that the tracked gradients do not lag
  after a step, as they do in `moco`. It costs a second Jacobian. It is
  `chain(storm(multi_objective(...)), moco(tracking=1))`.

  Args:
    losses: as in `multi_objective`.
    objectives: as in `multi_objective`.
    decay: :math:`\beta_k` in [0, 1], a constant or a schedule.
    rest: sequences that only some losses have; their gradients are corrected
      as well.
    trunk: as in `multi_objective`.
    per_task: as in `multi_objective`.
    **moco: `weight_step`, `regularisation` and `radius` of
      `bj.aggregators.moco`. The projection by the radius acts on the direction,
      not on the next estimate.

  Returns:
    A transformation from a batch to one gradient; chain an optimiser to it.

  Raises:
    TypeError: as `multi_objective` does.
    ValueError: as `multi_objective` and `moco` do.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp, optax
    >>> losses = lambda x, batch: jnp.stack(
    ...   [jnp.sum((x - 1) ** 2), jnp.sum((x + 1) ** 2)]
    ... )
    >>> solver = optax.chain(
    ...   bj.solvers.moco_plus(losses, 2, decay=0.1), optax.sgd(0.1)
    ... )
    >>> params, _ = bj.testing.run(solver, jnp.float32(3.0), 200)
    >>> bool(jnp.abs(params) <= 1.001)  # Between the two minimisers.
    True

  References:
    Fernando, Shen, Liu, Chaudhury, Murugesan and Chen, `Mitigating Gradient
    Bias in Multi-objective Learning: A Provably Convergent Approach
    <https://arxiv.org/abs/2210.12624>`_, 2023.
  """
  if objectives is None and not callable(losses):
    objectives = len(losses)
  oracle = oracles.multi_objective(
    losses, objectives, rest=rest, trunk=trunk, per_task=per_task
  )
  # The oracle has checked that this is a number or a sequence of names.
  count = objectives if isinstance(objectives, int) else len(objectives or ())
  like = oracles.jacobian_like(count, rest=rest)
  return oracles.aggregated(
    evaluation.storm(oracle, decay, like=like),
    aggregators.moco(count, tracking=1.0, rest=tuple(rest), **moco),
  )
