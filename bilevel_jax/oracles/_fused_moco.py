"""MoCo in one loop: each gradient goes into its tracked row as it is made."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from bilevel_jax import types
from bilevel_jax.aggregators import _moco, _rows
from bilevel_jax.oracles import _multi_objective, base


def fused_moco(
  losses: _multi_objective.Losses,
  objectives: int | Sequence[str] | None = None,
  *,
  tracking: types.ScalarOrSchedule = 0.1,
  weight_step: types.ScalarOrSchedule = 0.1,
  regularisation: types.ScalarOrSchedule = 0.0,
  exact: bool = False,
  radius: Any = None,
  rest: Sequence[str] = (),
  trunk: Callable[[Any, Any], Any] | None = None,
  per_task: bool = False,
) -> optax.GradientTransformationExtraArgs:
  r"""The updates of `multi_objective` and `moco`, without a Jacobian.

  A loop over the objectives makes one gradient after another and moves the
  tracked row at once, in place where the state's buffers are donated: beside
  the state, the memory of one gradient is enough. It sees the whole batch:
  where gradients must first be averaged (`mean_over`, `accumulate`), chain the
  two parts instead.

  Args:
    losses: as in `multi_objective`.
    objectives: likewise.
    tracking: as in `moco`.
    weight_step: likewise.
    regularisation: likewise.
    exact: likewise.
    radius: likewise.
    rest: sequences that only some losses have.
    trunk: as in `multi_objective`.
    per_task: likewise.

  Returns:
    An oracle to one gradient; its `inner` state is a `MocoState`.

  Raises:
    TypeError: as `multi_objective` does.
    ValueError: as `multi_objective` and `moco` do.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> losses = lambda x, batch: jnp.stack([x @ x, batch @ x])
    >>> oracle = bj.oracles.fused_moco(losses, 2, tracking=1.0, weight_step=1e-3)
    >>> params = jnp.array([1.0, 2.0])
    >>> direction, state = oracle.update(
    ...   jnp.ones(2), oracle.init(params), params
    ... )
    >>> print(direction.round(2), state.inner.weights.round(2))
    [1.5  2.49] [0.5 0.5]

  References:
    Fernando, Shen, Liu, Chaudhury, Murugesan and Chen, `Mitigating Gradient
    Bias in Multi-objective Learning: A Provably Convergent Approach
    <https://arxiv.org/abs/2210.12624>`_, 2023.
  """
  who = 'fused_moco'
  given = _multi_objective.make_objectives(
    who, losses, objectives, rest, trunk, per_task
  )
  count = len(given.names)
  rule = _moco.make_rule(
    who,
    count,
    tracking=tracking,
    weight_step=weight_step,
    regularisation=regularisation,
    radius=radius,
    exact=exact,
    rest=given.rest,
  )

  def fn(params, batch, inner):
    near = given.linearise(params, batch, who, lean=True)
    share = rule.share(inner.count)

    def move(tracked, index, gradient):
      row = jax.tree.map(lambda leaf: leaf[index], tracked)
      row = rule.track(row, gradient, share)
      if rule.radius is not None:
        row = rule.shrink(row, rule.radii(inner.weights.dtype)[index])
      return jax.tree.map(lambda y, r: y.at[index].set(r), tracked, row)

    tracked = inner.tracked
    if near.rows is not None:
      for i, gradient in enumerate(near.rows):
        tracked = move(tracked, i, gradient)
    else:
      row: Any = near.row
      tracked = jax.lax.fori_loop(
        0, count, lambda i, y: move(y, i, row(i)), tracked
      )
    weights = rule.reweigh(_rows.products(tracked), inner)
    gradients = _rows.weigh(tracked, weights)
    if near.rest:
      gradients = gradients._replace(**near.rest)
    taken = optax.safe_increment(inner.count)
    return near.values, gradients, _moco.MocoState(taken, weights, tracked)

  cost = {'gradients/objectives': count}
  return base.oracle(fn, given.names, rule.init, counts=cost)
