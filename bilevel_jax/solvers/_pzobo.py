"""PZOBO: a hypergradient from inner loops at perturbed upper variables."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from bilevel_jax import (
  _checks,
  _keys,
  _sequences,
  _trees,
  descent,
  states,
  types,
)
from bilevel_jax.oracles import base


def pzobo(
  problem: types.BilevelProblem,
  *,
  upper: types.SequenceLike,
  lower: types.SequenceLike,
  smoothing: float = 1e-2,
  directions: int = 1,
  key: Any,
) -> descent.Solver:
  r"""PZOBO: first-order, with inner loops at perturbed upper variables.

  .. math::
    d = \nabla_x f + \frac{1}{Q} \sum_{q=1}^{Q} \left\langle
      \frac{y^T(x + \mu u_q) - y^T(x)}{\mu}, \nabla_y f \right\rangle u_q

  with :math:`y^T(x)` the end of an inner loop of gradient descent from the
  current lower variable. The directions :math:`u_q` are orthogonal and of
  length :math:`\sqrt{d}`. With as many directions as x has numbers the response
  is exact; with fewer, noise grows with the dimension.

  Args:
    problem: the upper and the lower loss.
    upper: how the upper variable moves, an optax optimiser or a `Sequence`.
    lower: the optimiser of the inner loop, in a record with :math:`T` `steps`;
      its moments restart in each loop.
    smoothing: :math:`\mu`, in units of x.
    directions: :math:`Q`, at most the dimension of x.
    key: PRNG key of the directions, or a whole number.

  Returns:
    A solver for `BilevelParams`.

  Raises:
    ValueError: if a number is too small, or the lower record has a set or a
      start.

  Example:
    >>> import bilevel_jax as bj, optax
    >>> toy = bj.testing.toy_problem()
    >>> solver = bj.solvers.pzobo(
    ...   toy.problem, key=0,
    ...   upper=optax.sgd(0.1), lower=bj.Sequence(optax.sgd(0.1), steps=10),
    ... )

  References:
    Sow, Ji and Liang, `On the Convergence Theory for Hessian-Free Bilevel
    Algorithms <https://arxiv.org/abs/2110.07004>`_, 2022.
  """
  _checks.whole_number('pzobo', 'directions', directions)
  _checks.within('pzobo', 'smoothing', smoothing, 0, open_low=True)
  low = types.as_sequence(lower, 'lower')
  if low.set is not None or low.start is not None or low.restart:
    raise ValueError(
      'pzobo starts its inner loop at the lower variable and has no lower set: '
      'leave set, start and restart out of the record of lower.'
    )
  above, below = base.checked_losses(problem)
  pick = low.batch_at or (lambda batch, t: batch)
  wanted = base.outputs_only(problem, 'lower') or (lambda params: {})
  optimiser = optax.with_extra_args_support(low.optimiser)

  def fn(params, batch, inner):
    updates, key = inner
    key, now = jax.random.split(key)
    x, y = params.upper, params.lower
    announced = wanted(params)
    flat, unravel = ravel_pytree(x)
    shape = (flat.size, min(directions, flat.size))
    draw = jax.random.normal(now, shape, _trees.wide(flat.dtype))
    basis = jnp.linalg.qr(draw)[0].T.astype(flat.dtype) * flat.size**0.5
    # A new optimiser whose schedules are at the number of updates.
    fresh = states.at_update(optimiser.init(y), updates.count)

    def loop(x):
      def step(carry, t):
        y, optimiser_state, _ = carry
        slope, aux = jax.grad(
          lambda y: below.full(x, y, pick(batch, t)), has_aux=True
        )(y)
        outputs = {'lower': aux} if announced else {}
        move, after = optimiser.update(slope, optimiser_state, y)
        y = optax.apply_updates(y, move)
        after = states.hold_updates(after, optimiser_state)
        return (y, after, base.as_announced(outputs, announced)), None

      times = jnp.arange(low.steps, dtype=jnp.int32)
      (end, _, outputs), _ = jax.lax.scan(step, (y, fresh, announced), times)
      return end, outputs

    end, lower_outputs = loop(x)
    (value, aux), (f_x, f_y) = above.with_slopes(0, 1)(x, end, batch)

    def weight(u):
      moved, _ = loop(unravel(flat + smoothing * u))
      return optax.tree.vdot(optax.tree.sub(moved, end), f_y) / smoothing

    weights = jax.vmap(weight)(basis).astype(flat.dtype)
    response = unravel(weights @ basis / basis.shape[0])
    gradients = _sequences.only(
      params, upper=optax.tree.add(f_x, response), lower=optax.tree.sub(y, end)
    )
    more = base.requested_outputs(problem, upper=aux, **lower_outputs)
    return (value,), gradients, (updates.next(), key), *more

  oracle = base.oracle(
    fn,
    ('upper',),
    lambda params: (states.no_updates(), _keys.as_key(key, 'pzobo')),
    counts={
      'gradients/upper': 1,
      'gradients/lower': low.steps * (1 + directions),
    },
    moves=('upper', 'lower'),
    outputs=problem.outputs,
  )
  # The gradient of the lower variable is its displacement.
  return descent.descend(oracle, upper=upper, lower=optax.sgd(1.0))
