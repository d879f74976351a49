"""MoCo: gradients tracked over steps, so that the weights see less noise."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_jax import _sequences, _trees, types
from bilevel_jax.aggregators import _quadratic, _rows, _weighted


@_sequences.counts_updates
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


class Rule(NamedTuple):
  """The numbers of MoCo, and its formulas for whoever applies them.

  Attributes:
    objectives: the number of objectives.
    tracking: the share of a new gradient in the tracked one.
    weight_step: the step size of the weights.
    regularisation: of the weights.
    radius: the largest norm of a tracked gradient, or None.
    exact: whether the weights are solved for instead of moved.
    rest: sequences that no weight touches.
  """

  objectives: int
  tracking: types.ScalarOrSchedule
  weight_step: types.ScalarOrSchedule
  regularisation: types.ScalarOrSchedule
  radius: Any
  exact: bool
  rest: tuple[str, ...]

  def init(self, params: Any) -> MocoState:
    """The first state: nothing tracked, equal weights."""
    shared = params
    if self.rest:
      _sequences.require_sequences(params, self.rest, 'moco(rest=...)')
      shared = params._replace(**dict.fromkeys(self.rest))

    def rows(leaf):
      # By broadcasting, so that rows are sharded like the parameter.
      zeros = jnp.zeros_like(leaf)
      shape = (self.objectives, *zeros.shape)
      return jnp.array(jnp.broadcast_to(zeros, shape), copy=True)

    dtype = _trees.dtype_of(params)
    return MocoState(
      count=jnp.zeros([], jnp.int32),
      weights=jnp.full([self.objectives], 1 / self.objectives, dtype),
      tracked=jax.tree.map(rows, shared),
    )

  def share(self, count: chex.Array) -> chex.Array:
    """The tracking share of this update, at most one."""
    return jnp.minimum(_weighted.at(self.tracking, count, jnp.float32), 1)

  def track(self, tracked: Any, gradient: Any, share: chex.Array) -> Any:
    """Moves tracked rows towards gradients, before any projection."""
    return jax.tree.map(
      lambda y, g: (y + share.astype(y.dtype) * (g - y)).astype(y.dtype),
      tracked,
      gradient,
    )

  def shrink(self, row: Any, radius: chex.Array) -> Any:
    """Projects one tracked row on a ball."""
    dtype = _trees.dtype_of(row)
    squares = [
      jnp.sum(jnp.square(leaf.astype(dtype))) for leaf in jax.tree.leaves(row)
    ]
    norm = jnp.sqrt(sum(squares, jnp.zeros([], dtype)))
    scale = jnp.minimum(1, radius / jnp.where(norm > 0, norm, radius))
    return jax.tree.map(lambda leaf: leaf * scale.astype(leaf.dtype), row)

  def radii(self, dtype: Any) -> chex.Array:
    """The radius of each objective's ball."""
    return jnp.broadcast_to(jnp.asarray(self.radius, dtype), self.objectives)

  def reweigh(self, gramian: chex.Array, state: MocoState) -> chex.Array:
    """The new weights, from the Gram matrix of the tracked rows."""
    weights, dtype = state.weights, state.weights.dtype
    rho = _weighted.at(self.regularisation, state.count, dtype)
    gramian = gramian.astype(dtype)
    if self.exact:
      ridge = rho * jnp.eye(self.objectives, dtype=dtype)
      return _quadratic.min_norm_weights(gramian + ridge)
    step = _weighted.at(self.weight_step, state.count, dtype)
    moved = weights - step * (gramian @ weights + rho * weights)
    return optax.projections.projection_simplex(moved)


def make_rule(
  who: str,
  objectives: int,
  *,
  tracking: types.ScalarOrSchedule,
  weight_step: types.ScalarOrSchedule,
  regularisation: types.ScalarOrSchedule,
  radius: Any,
  exact: bool,
  rest: tuple[str, ...],
) -> Rule:
  """Checks the numbers of MoCo; see `moco`."""
  _weighted.require_objectives(objectives, who)
  _weighted.require_positive(who, tracking=tracking, weight_step=weight_step)
  _weighted.require_positive(who, zero=True, regularisation=regularisation)
  if radius is not None:
    _weighted.require_positive(who, radius=radius)
    if np.shape(radius) not in ((), (objectives,)):
      raise ValueError(
        f'{who}: radius is a number or one for each of {objectives} '
        f'objectives, got shape {np.shape(radius)}.'
      )
  return Rule(
    objectives,
    tracking,
    weight_step,
    regularisation,
    radius,
    exact,
    tuple(rest),
  )


def moco(
  objectives: int,
  *,
  tracking: types.ScalarOrSchedule = 0.1,
  weight_step: types.ScalarOrSchedule = 0.1,
  regularisation: types.ScalarOrSchedule = 0.0,
  exact: bool = False,
  radius: Any = None,
  samples: int = 1,
  rest: tuple[str, ...] = (),
) -> optax.GradientTransformationExtraArgs:
  r"""MoCo: a multi-gradient direction whose bias vanishes along the run.

  .. math::
    Y_k &= \Pi_{\text{balls}} [ Y_{k-1} + \beta_k (G_k - Y_{k-1}) ],
      \quad Y_{-1} = 0 \\
    \lambda_k &= \Pi_{\Delta} [ \lambda_{k-1} - \gamma_k
      ( Y_k Y_k^\top + \rho I ) \lambda_{k-1} ],
      \quad \lambda_{-1} = \mathbf{1} / M \\
    d_k &= Y_k^\top \lambda_k

  Rows :math:`G` are noisy gradients. The weights of a multi-gradient direction
  depend on them, so a direction from :math:`G` alone is biased however many
  steps are taken; a running mean takes the noise out of both. No larger batch
  is needed. The direction feeds any optimiser.

  Args:
    objectives: the number of rows :math:`M`.
    tracking: :math:`\beta_k`, a share, at most 1; a constant or a schedule. For
      1, nothing is tracked.
    weight_step: :math:`\gamma_k`, in units of one over a squared gradient norm;
      a constant or a schedule.
    regularisation: :math:`\rho`, in units of a squared gradient norm; pulls
      the weights together.
    exact: whether :math:`\lambda_k` minimises
      :math:`\lambda^\top (Y_k Y_k^\top + \rho I) \lambda` instead of taking one
      step towards it.
    radius: of the balls on which tracked gradients are projected, a number or
      (objectives,), bounds on gradient norms; None for no projection.
    samples: for local tracking, the number of Jacobians that the oracle gives
      (`bj.evaluation.independent`); :math:`Y` is moved by each in turn, then the weights
      are.
    rest: names of the sequences that no weight touches, as in the oracle.

  Returns:
    A transformation from a `Jacobian` to one gradient.

  Raises:
    TypeError: if the incoming gradients are no Jacobian, or only a Gramian.
    ValueError: if they have another number of rows, or a number is out of
      range.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> losses = lambda x, batch: jnp.stack(
    ...   [jnp.sum((x - 1) ** 2), jnp.sum((x + 1) ** 2)]
    ... )
    >>> solver = optax.chain(
    ...   bj.multi_objective(losses, 2), bj.aggregators.moco(2, tracking=0.5),
    ...   optax.sgd(0.1),
    ... )
    >>> params = jnp.float32(3.0)
    >>> state, step = solver.init(params), jax.jit(solver.update)
    >>> for _ in range(200):
    ...   updates, state = step(None, state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> bool(jnp.abs(params) <= 1.001)  # Between the two minimisers.
    True

  References:
    Fernando, Shen, Liu, Chaudhury, Murugesan and Chen, `Mitigating Gradient
    Bias in Multi-objective Learning: A Provably Convergent Approach
    <https://arxiv.org/abs/2210.12624>`_, 2023.
  """
  rule = make_rule(
    'moco',
    objectives,
    tracking=tracking,
    weight_step=weight_step,
    regularisation=regularisation,
    radius=radius,
    exact=exact,
    rest=rest,
  )
  _weighted.require_objectives(samples, 'moco(samples=...)')

  def update_fn(jacobian, state, params=None, **extra_args):
    del params, extra_args
    _rows.require_jacobian(jacobian, 'moco')
    _rows.require_rows(jacobian, 'moco', objectives * samples)
    ours: Any = jax.tree.structure(state.tracked)
    theirs: Any = jax.tree.structure(jacobian.rows)
    if ours != theirs:
      raise ValueError(
        f'moco tracks {ours}, but the rows are {theirs}: give moco and the '
        'oracle the same `rest`.'
      )
    share, tracked = rule.share(state.count), state.tracked
    for i in range(samples):
      rows = _rows.part(jacobian, i, objectives)
      tracked = rule.track(tracked, rows, share)
      if rule.radius is not None:
        radii = rule.radii(state.weights.dtype)
        tracked = jax.vmap(rule.shrink)(tracked, radii)
    weights = rule.reweigh(_rows.products(tracked), state)
    gradients = _rows.with_rest(_rows.weigh(tracked, weights), jacobian)
    count = optax.safe_increment(state.count)
    return gradients, MocoState(count, weights, tracked)

  return optax.GradientTransformationExtraArgs(rule.init, update_fn)
