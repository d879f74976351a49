"""MoCo: gradients tracked over steps, so that the weights have less noise."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_jax import _checks, _trees, states, types
from bilevel_jax.aggregators import _by_weights, _quadratic, _rows


@states.counts_updates
class MocoState(NamedTuple):
  """State of `moco`.

  Attributes:
    count: updates so far, an int32 scalar.
    weights: the weights of the last update, (objectives,).
    tracked: the tracked gradients, leaves with a leading axis of objectives.
  """

  count: chex.Array
  weights: chex.Array
  tracked: Any


# Maps (tracked row, gradient, index of the objective) to the next tracked row.
Move = Callable[[Any, Any, chex.Numeric], Any]


class Tracker(NamedTuple):
  """MoCo for gradients that come all at once or one by one.

  Attributes:
    init: maps the parameters to the initial state, with zero tracked rows.
    update: maps (feed, state) to the direction and the next state, where
      `feed(tracked, move)` applies a `Move` to each tracked row.
  """

  init: Callable[[Any], MocoState]
  update: Callable[
    [Callable[[Any, Move], Any], MocoState], tuple[Any, MocoState]
  ]


def tracker(
  name: str,
  objectives: int,
  *,
  tracking: types.ScalarOrSchedule = 0.1,
  weight_step: types.ScalarOrSchedule | None = 0.1,
  regularisation: types.ScalarOrSchedule = 0.0,
  radius: Any = None,
  rest: tuple[str, ...] = (),
  accumulator_dtype: Any = jnp.float32,
) -> Tracker:
  """Checks the hyperparameters of MoCo and makes its functions; see `moco`."""
  _checks.within(name, 'tracking', tracking, 0, 1, open_low=True)
  if weight_step is not None:
    _checks.within(name, 'weight_step', weight_step, 0, open_low=True)
  _checks.within(name, 'regularisation', regularisation, 0)
  if radius is not None:
    _checks.within(name, 'radius', radius, 0, open_low=True)
    if np.shape(radius) not in ((), (objectives,)):
      raise ValueError(
        f'{name}: radius is a number or one for each of {objectives} '
        f'objectives, got shape {np.shape(radius)}.'
      )
  initial = _by_weights.init(name, objectives)

  def init(params):
    tracked = _rows.tracked(name, objectives, params, rest, accumulator_dtype)
    count, weights, _ = initial(params)
    return MocoState(count, weights, tracked)

  def extended(lengths, root):
    """Lengths of rows extended by their own coordinate, the root of rho."""
    longer = jnp.hypot(lengths, root)
    return longer, _trees.ratio(lengths, longer)

  def min_norm(tracked, root):
    """The shortest direction and its weights."""
    jacobian = types.Jacobian(tracked)
    gram = _rows.gramian(jacobian)
    dtype = root.dtype
    lengths, share = extended(gram.lengths.astype(dtype), root)
    cosines = share[:, None] * gram.cosines.astype(dtype) * share
    cosines = cosines + jnp.diag(1 - share**2)
    longer = gram._replace(lengths=lengths, cosines=cosines)
    weights = _quadratic.min_norm_weights(longer)
    weights = _rows.in_range(longer, weights)

    def choose_exactly(factor):
      lengths, share = extended(factor.lengths, root)
      last = _trees.ratio(root, lengths)
      columns = _quadratic.full_rank(share[:, None] * factor.lower, last)
      image, weights = _quadratic.min_norm(lengths, columns)
      return image[:objectives], weights

    accurate = _quadratic.separate(cosines)
    fast = (_rows.weigh(jacobian, weights), weights)
    return _by_weights.unless(
      accurate, fast, choose_exactly, jacobian, gram.lengths.astype(dtype)
    )

  def reweigh(tracked, state):
    """The direction and the next weights."""
    weights, dtype = state.weights, state.weights.dtype
    rho = _by_weights.current(regularisation, state)
    if weight_step is None:
      return min_norm(tracked, jnp.sqrt(rho))
    step = _by_weights.current(weight_step, state)
    slope = _rows.products(tracked).astype(dtype) @ weights + rho * weights
    weights = _quadratic.onto_simplex(weights - step * slope)
    return _rows.weigh(types.Jacobian(tracked), weights), weights

  def update(feed, state):
    dtype = state.weights.dtype
    share = jnp.minimum(_by_weights.current(tracking, state), 1)

    def move(row, gradient, index):
      row = jax.tree.map(
        lambda y, g: y + share.astype(y.dtype) * (g.astype(y.dtype) - y),
        row,
        gradient,
      )
      if radius is None:
        return row
      bound = jnp.broadcast_to(jnp.asarray(radius, dtype), objectives)[index]
      # Divides by the largest entry first so that no square overflows.
      largest = optax.tree.norm(row, ord=jnp.inf).astype(dtype)
      unit = _trees.scaled(_trees.ratio(1, largest), row)
      norm = largest * jnp.sqrt(_trees.dot(unit, unit))
      return _trees.scaled(bound / jnp.maximum(norm, bound), row)

    tracked = feed(state.tracked, move)
    direction, weights = reweigh(tracked, state)
    count = optax.safe_increment(state.count)
    return direction, MocoState(count, weights, tracked)

  return Tracker(init, update)


@_checks.removed(exact='weight_step=None for weights that minimise')
def moco(
  objectives: int,
  *,
  tracking: types.ScalarOrSchedule = 0.1,
  weight_step: types.ScalarOrSchedule | None = 0.1,
  regularisation: types.ScalarOrSchedule = 0.0,
  radius: Any = None,
  samples: int = 1,
  rest: tuple[str, ...] = (),
  accumulator_dtype: Any = jnp.float32,
) -> optax.GradientTransformationExtraArgs:
  r"""MoCo: a multi-gradient direction whose bias vanishes during the run.

  .. math::
    Y_k &= \Pi_{\text{balls}} [ Y_{k-1} + \beta_k (G_k - Y_{k-1}) ],
      \quad Y_{-1} = 0 \\
    \lambda_k &= \Pi_{\Delta} [ \lambda_{k-1} - \gamma_k
      ( Y_k Y_k^\top + \rho I ) \lambda_{k-1} ],
      \quad \lambda_{-1} = \mathbf{1} / M \\
    d_k &= Y_k^\top \lambda_k

  Rows :math:`G` are noisy gradients. The weights of a multi-gradient direction
  depend on the same noise, so a direction from :math:`G` alone stays biased
  after any number of steps. A running mean removes the noise from both, without
  larger batches.

  Args:
    objectives: the number of rows :math:`M`.
    tracking: :math:`\beta_k` in (0, 1], a constant or a schedule, whose values
      above 1 count as 1. With 1, there is no running mean.
    weight_step: :math:`\gamma_k`, in units of one over a squared gradient norm;
      a constant or a schedule. The weights are NaN if that square leaves the
      range of floats. With None, :math:`\lambda_k` minimises
      :math:`\lambda^\top (Y_k Y_k^\top + \rho I) \lambda` instead of taking one
      step towards it.
    regularisation: :math:`\rho`, in units of a squared gradient norm; makes the
      weights more equal.
    radius: radius of the balls onto which tracked gradients are projected, in
      units of gradient norms, a number or (objectives,); None for no
      projection.
    samples: for local tracking, the number of Jacobians from the oracle
      (`bj.evaluation.independent`); :math:`Y` moves by each in turn, then the
      weights move.
    rest: names of the sequences outside the weighting, as in the oracle.
    accumulator_dtype: smallest dtype of the tracked gradients: in bfloat16, a
      thousandth of a new gradient is lost to rounding. The direction has the
      dtypes of the gradients.

  Returns:
    A transformation from a `Jacobian` to one gradient.

  Raises:
    TypeError: if the incoming gradients are not a `Jacobian`.
    ValueError: if they have another number of rows, or a number is out of
      range.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> losses = lambda x, batch: jnp.stack(
    ...   [jnp.sum((x - 1) ** 2), jnp.sum((x + 1) ** 2)]
    ... )
    >>> solver = optax.chain(
    ...   bj.multi_objective(losses, 2),
    ...   bj.aggregators.moco(2, tracking=0.5), optax.sgd(0.1),
    ... )
    >>> params = jnp.float32(3.0)
    >>> state, step = solver.init(params), jax.jit(solver.update)
    >>> for _ in range(200):
    ...   updates, state = step(None, state, params)
    ...   params = bj.apply_updates(params, updates)
    >>> bool(jnp.abs(params) <= 1.001)  # Between the two minimisers.
    True

  References:
    Fernando, Shen, Liu, Chaudhury, Murugesan and Chen, `Mitigating Gradient
    Bias in Multi-objective Learning: A Provably Convergent Approach
    <https://arxiv.org/abs/2210.12624>`_, 2023.
  """
  _checks.whole_number('moco', 'samples', samples)
  init_fn, update = tracker(
    'moco',
    objectives,
    tracking=tracking,
    weight_step=weight_step,
    regularisation=regularisation,
    radius=radius,
    rest=tuple(rest),
    accumulator_dtype=accumulator_dtype,
  )

  def update_fn(jacobian, state, params=None, **extra_args):
    del params, extra_args
    _rows.require(jacobian, 'moco', objectives * samples, rows=True)
    _rows.require_tracked('moco', state.tracked, jacobian)

    def feed(tracked, move):
      for i in range(samples):
        rows = _rows.part(jacobian, i, objectives)
        tracked = jax.vmap(move)(tracked, rows, jnp.arange(objectives))
      return tracked

    direction, state = update(feed, state)
    direction = _trees.cast_like(direction, jacobian.rows)
    return _rows.with_rest(direction, jacobian.rest), state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
