"""STABLE: running estimates of the second derivatives of the lower loss.

It forms matrices, for lower variables of at most some thousand numbers.
"""

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from bilevel_jax import _checks, _sequences, descent, evaluation, types
from bilevel_jax.oracles import base


def _zeros(params):
  x, y = (ravel_pytree(z)[0] for z in params)
  ones = jnp.ones(y.size, y.dtype)
  # Each row is sharded like the variable.
  rows = lambda z: jnp.zeros_like(jnp.outer(ones, z).astype(y.dtype))
  return {'cross': rows(x), 'hessian': rows(y)}


def _curvature(problem):
  """Second derivatives of the lower loss, a row for each lower coordinate."""
  _, lower = base.checked_losses(problem)

  def fn(params, batch, inner):
    (x, unravel_x), (y, unravel_y) = (ravel_pytree(z) for z in params)

    # Forward over y: as many products as y has numbers, for both matrices.
    both = lambda x, y: jax.grad(
      lambda x, y: lower(unravel_x(x), unravel_y(y), batch), (0, 1)
    )(x, y)
    cross, hessian = jax.vmap(
      lambda v: jax.jvp(lambda y: both(x, y), (y,), (v,))[1]
    )(jnp.eye(y.size, dtype=y.dtype))
    return (), {'cross': cross, 'hessian': hessian}, inner

  return base.oracle(fn, (), counts={'hessians/lower': 1}, linear=True)


def _slopes(problem):
  upper, lower = base.checked_losses(problem)

  def fn(params, batch, inner):
    x, y = params
    (f, one), (f_x, f_y) = upper.with_slopes(0, 1)(x, y, batch)
    (g, two), (g_y,) = lower.with_slopes(1)(x, y, batch)
    slopes = {'f_x': f_x, 'f_y': f_y, 'g_y': g_y}
    more = base.requested_outputs(problem, upper=one, lower=two)
    return (f, g), slopes, inner, *more

  return base.oracle(
    fn,
    ('upper', 'lower'),
    counts={'gradients/upper': 1, 'gradients/lower': 1},
    outputs=problem.outputs,
    linear=True,
  )


def stable(
  problem: types.BilevelProblem,
  *,
  upper: types.SequenceLike,
  lower: types.SequenceLike,
  decay: types.ScalarOrSchedule,
  least_curvature: float,
) -> descent.Solver:
  r"""STABLE: one loop whose lower step anticipates the upper step.

  .. math::
    x_{k+1} &= x_k - \alpha (\nabla_x f
      - \hat H_{xy} \hat H_{yy}^{-1} \nabla_y f) \\
    y_{k+1} &= y_k - \beta \nabla_y g
      - \hat H_{yy}^{-1} \hat H_{yx} (x_{k+1} - x_k)

  with running estimates of the second derivatives, corrected by `storm`. It has
  neither a truncated series nor a lag, but it factors a matrix in each step.
  The eigenvalues of the estimated Hessian are bounded below before it is
  inverted; the authors project it within the recursion.

  Args:
    problem: the upper and the lower loss; the lower loss is strongly convex.
    upper: how the upper variable moves, an optax optimiser or a `Sequence`.
    lower: how the lower variable moves, an optax optimiser or a `Sequence`.
    decay: decay of the estimates, in [0, 1].
    least_curvature: the lower bound of the eigenvalues of the estimated
      Hessian, which is singular if a batch has fewer samples than y has
      numbers.

  Returns:
    A solver for `BilevelParams`; `bj.counts` counts Hessians as
    `hessians/lower`.

  Raises:
    ValueError: if a record has more than one step or a `batch_at`, or the lower
      record a set; if a constant decay is not in [0, 1] or the curvature is not
      positive.

  Example:
    >>> import bilevel_jax as bj, optax
    >>> toy = bj.testing.toy_problem()
    >>> solver = bj.solvers.stable(
    ...   toy.problem, decay=0.1, least_curvature=0.1,
    ...   upper=optax.sgd(0.1), lower=optax.sgd(0.1),
    ... )

  References:
    Chen, Sun, Xiao and Yin, `A Single-Timescale Method for Stochastic Bilevel
    Optimization <https://arxiv.org/abs/2102.04671>`_, 2021.
  """
  _checks.within('stable', 'least_curvature', least_curvature, 0, open_low=True)
  low = types.as_sequence(lower, 'lower')
  high = types.as_sequence(upper, 'upper')
  if max(low.steps, high.steps) > 1 or low.batch_at or high.batch_at:
    raise ValueError(
      'stable takes one step of each sequence per update, on the whole batch: '
      'leave steps and batch_at out of the records of upper and lower.'
    )
  if low.set is not None:
    raise ValueError(
      'stable takes no lower set, because its correction leaves the set: leave '
      'out the set of lower, or use another solver, for instance v_pbgd.'
    )
  # An oracle whose batch is the gradients.
  identity = base.Oracle(
    lambda params: (),
    lambda batch, state, params=None, **extra_args: (*batch, state),
    ('upper', 'lower'),
  )
  move = descent.descend(identity, upper=upper, lower=lower)

  def build(curvature, slopes):
    def init_fn(params):
      _sequences.require_sequences(params, ('upper', 'lower'), 'stable')
      return curvature.init(params), slopes.init(params), move.init(params)

    def update_fn(batch, state, params=None, **extra_args):
      base.require_batch(batch, params)
      matrices, one = curvature.update(batch, state[0], params, **extra_args)
      slope, two = slopes.update(batch, state[1], params, **extra_args)
      flat, unravel = ravel_pytree(slope['f_y'])
      _, unravel_x = ravel_pytree(slope['f_x'])
      wide = jnp.promote_types(flat.dtype, jnp.float32)
      hessian = matrices['hessian'].astype(wide)
      values, vectors = jnp.linalg.eigh((hessian + hessian.T) / 2)
      values = jnp.maximum(values, least_curvature)

      def solve(right):
        right = right.astype(wide)
        return (vectors @ ((vectors.T @ right) / values)).astype(flat.dtype)

      cross = matrices['cross']
      implicit = unravel_x((solve(flat) @ cross).astype(cross.dtype))
      gradients = _sequences.only(
        params, upper=optax.tree.sub(slope['f_x'], implicit), lower=slope['g_y']
      )
      updates, three = move.update((gradients,), state[2], params, **extra_args)
      anticipated = unravel(solve(cross @ ravel_pytree(updates.upper)[0]))
      lower_update = optax.tree.sub(updates.lower, anticipated)
      return updates._replace(lower=lower_update), (one, two, three)

    both = (curvature, slopes)
    return descent.Solver(init_fn, update_fn, both, move.sequences, build)

  curvature = evaluation.storm(_curvature(problem), decay, like=_zeros)
  return build(curvature, _slopes(problem))
