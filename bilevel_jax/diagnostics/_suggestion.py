"""The result of `suggest`: settings of `v_pbgd`."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from bilevel_jax import projections, types


@dataclasses.dataclass(frozen=True, repr=False)
class Suggestion:
  """Settings of `v_pbgd` and the measurements behind them, from `suggest`.

  It is a pytree of arrays; `upper_set` is not a leaf.

  Attributes:
    params: the start of a run: the given upper variable, with the lower problem
      solved.
    penalty: the last weight of the penalty, dimensionless.
    first_penalty: the weight of the penalty until `ramp_begin`.
    ramp_begin: the update at which the weight starts to grow linearly.
    ramp: the number of updates in which it grows.
    updates: the number of updates of a run.
    upper: step size of the upper variable, with `rescale` on.
    lower: step size of the lower variable, with `rescale` on.
    value: step size of the value sequence.
    momentum: momentum of the lower variable and of the value sequence.
    gap: the expected value gap at the end, in units of the lower loss.
    loss: the expected upper loss at the lower minimiser at the end.
    hypergradient_curvature: the largest curvature of the upper loss at the
      lower minimiser, as a function of the upper variable.
    upper_curvature: the largest curvature of the upper loss in y.
    lower_curvature: the largest curvature of the lower loss in y.
    lag: the number of updates by which the lower variable lags its minimiser.
    arrived: whether the walk has converged, bool: the last quarter of its
      points decreases the upper loss by at most a hundredth of what all points
      do, or by at most the `accuracy`. If not, or with one point, the settings
      go beyond what was measured: see `words`.
    upper_set: the projection on the set of the upper variable.
  """

  params: types.BilevelParams
  penalty: chex.Array
  first_penalty: chex.Array
  ramp_begin: chex.Array
  ramp: chex.Array
  updates: chex.Array
  upper: chex.Array
  lower: chex.Array
  value: chex.Array
  momentum: chex.Array
  gap: chex.Array
  loss: chex.Array
  hypergradient_curvature: chex.Array
  upper_curvature: chex.Array
  lower_curvature: chex.Array
  lag: chex.Array
  arrived: chex.Array
  upper_set: projections.Projection | None = None

  def __repr__(self) -> str:
    """All fields but the parameters, which may be large."""
    names = [field.name for field in dataclasses.fields(self)]
    fields = [f'{n}={getattr(self, n)}' for n in names if n != 'params']
    return f'Suggestion({", ".join(fields)})'

  def __str__(self) -> str:
    """The fields, and what they are worth."""
    return f'{self!r}\n{self.words}'

  @property
  def words(self) -> str:
    """Whether the walk supports the settings, and what to do if not.

    For concrete numbers, not inside a compiled function.
    """
    cheaper = (
      'Adam often needs far fewer updates: keep params and penalty, and give '
      'v_pbgd optax.adam(0.03) for upper and lower'
    )
    if not self.arrived:
      return (
        'beyond the walk: it ended before it converged, so that step sizes, '
        'penalty and updates hold for the path so far, and the upper loss may '
        'fall further. Take more points, walk=bj.diagnostics.WalkSettings('
        f'points=40), and check the run with bj.diagnose. {cheaper}.'
      )
    if self.updates > 10_000:
      return (
        f'measured to the end of the walk, but {self.updates} updates of '
        f'gradient descent are many: the lower variable lags by '
        f'{self.lag:.0f} updates. {cheaper}, and check with bj.diagnose.'
      )
    return 'measured to the end of the walk.'

  def schedule(self, count: chex.Numeric) -> chex.Array:
    """The weight of the penalty after this number of updates."""
    share = (count - self.ramp_begin) / jnp.maximum(self.ramp, 1)
    share = jnp.clip(share, 0, 1)
    return self.first_penalty + share * (self.penalty - self.first_penalty)

  def settings(self) -> dict[str, Any]:
    """The arguments of `bj.v_pbgd`: `bj.v_pbgd(problem, **s.settings())`."""
    with_momentum = lambda step: optax.sgd(step, momentum=self.momentum)
    # One inner step and equal step sizes: see `suggest`.
    return {
      'penalty': self.schedule,
      'upper': types.Sequence(optax.sgd(self.upper), set=self.upper_set),
      'lower': with_momentum(self.lower),
      'value': with_momentum(self.value),
    }


jax.tree_util.register_dataclass(
  Suggestion,
  data_fields=[
    field.name
    for field in dataclasses.fields(Suggestion)
    if field.name != 'upper_set'
  ],
  meta_fields=['upper_set'],
)
