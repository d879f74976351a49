"""MoCo in one loop over the objectives, without a Jacobian."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from bilevel_jax import _checks, _trees
from bilevel_jax.aggregators import _moco, _rows
from bilevel_jax.oracles import _objectives, base


@_checks.removed(exact='weight_step=None for weights that minimise')
def fused_moco(
  losses: _objectives.Losses,
  objectives: int | Sequence[str] | None = None,
  *,
  rest: Sequence[str] = (),
  trunk: Callable[[Any, Any], Any] | None = None,
  per_task: bool = False,
  **moco: Any,
) -> base.Oracle:
  r"""The updates of `multi_objective` and `moco`, without a Jacobian.

  A loop over the objectives evaluates one gradient at a time and updates its
  tracked row, in place if the state's buffers are donated. Besides the state it
  needs the memory of one gradient. It evaluates the whole batch at once; to
  average gradients first (`bj.evaluation.mean_over`,
  `bj.evaluation.accumulate`), chain `multi_objective` and `moco` instead.

  Args:
    losses: as in `multi_objective`.
    objectives: as in `multi_objective`.
    rest: sequences that only some losses have.
    trunk: as in `multi_objective`.
    per_task: as in `multi_objective`.
    **moco: `tracking`, `weight_step`, `regularisation`, `radius` and
      `accumulator_dtype` of `bj.aggregators.moco`.

  Returns:
    An oracle that gives one gradient; its `inner` state is a `MocoState`.

  Raises:
    TypeError: as `multi_objective` does.
    ValueError: as `multi_objective` and `moco` do.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> losses = lambda x, batch: jnp.stack([x @ x, batch @ x])
    >>> oracle = bj.oracles.fused_moco(
    ...   losses, 2, tracking=1.0, weight_step=1e-3
    ... )
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
  caller = 'fused_moco'
  several = _objectives.make_objectives(
    caller, losses, objectives, rest, trunk, per_task
  )
  count = len(several.names)
  init, update = _moco.tracker(caller, count, rest=several.rest, **moco)

  def fn(params, batch, inner):
    near = several.linearise(params, batch, caller, lean=True)

    def feed(tracked, move):
      def one(index, tracked, gradient):
        row = jax.tree.map(lambda leaf: leaf[index], tracked)
        row = move(row, gradient, index)
        return jax.tree.map(lambda y, r: y.at[index].set(r), tracked, row)

      if near.rows is None:
        row: Any = near.row
        return jax.lax.fori_loop(
          0, count, lambda i, y: one(i, y, row(i)), tracked
        )
      for i, gradient in enumerate(near.rows):
        tracked = one(i, tracked, gradient)
      return tracked

    direction, state = update(feed, inner)
    like = params
    if several.rest:
      like = params._replace(**dict.fromkeys(several.rest))
    direction = _trees.cast_like(direction, like)
    return near.values, _rows.with_rest(direction, near.rest), state

  cost = {'gradients/objectives': count}
  return base.oracle(fn, several.names, init, counts=cost)
