"""The methods that the experiments compare, each as one transformation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
import optax

import bilevel_jax as bj


class Method(NamedTuple):
  """An aggregator with what it needs of an oracle.

  Attributes:
    make: (objectives, key, rest) -> aggregator.
    samples: how many independent Jacobians it takes.
  """

  make: Callable[[int, chex.PRNGKey, tuple[str, ...]], Any]
  samples: int = 1


def _plain(aggregator, **given):
  return Method(lambda objectives, key, rest: aggregator(objectives, **given))


def _keyed(aggregator):
  return Method(lambda objectives, key, rest: aggregator(objectives, key=key))


def _moco(**given):
  return Method(
    lambda objectives, key, rest: bj.moco(objectives, rest=rest, **given)
  )


def decay(first: float, power: float = 0.5) -> Callable[[Any], Any]:
  """The schedule first / (count + 1) ** power."""
  return lambda count: first / (count + 1.0) ** power


METHODS = {
  'mean': _plain(bj.mean),
  'smg': _plain(bj.smg),
  'mgda': _plain(bj.mgda, normalise=True),
  'pcgrad': _keyed(bj.pcgrad),
  'grad_vac': _keyed(bj.grad_vac),
  'grad_drop': _keyed(bj.grad_drop),
  'cagrad': _plain(bj.cagrad),
  'imtl_g': _plain(bj.imtl_g),
  'nash_mtl': _plain(bj.nash_mtl, normalise=True),
  'aligned_mtl': _plain(bj.aligned_mtl),
  'upgrad': _plain(bj.upgrad),
  'dual_proj': _plain(bj.dual_proj),
  'stch': _plain(bj.stch, smoothing=0.1),
  'uncertainty': _plain(bj.uncertainty_weighting),
  'modo': Method(
    lambda objectives, key, rest: bj.modo(
      objectives, weight_step=0.1, samples=2
    ),
    samples=2,
  ),
  'sdmgrad': Method(
    lambda objectives, key, rest: bj.sdmgrad(objectives, samples=2), samples=2
  ),
  'moco': _moco(
    tracking=decay(1.0), weight_step=decay(0.1), regularisation=0.0
  ),
  'moco_exact': _moco(tracking=decay(1.0), exact=True),
}


class SideBySide(NamedTuple):
  """State of `side_by_side`: each solver's, by name."""

  parts: dict[str, Any]


def side_by_side(
  solvers: dict[str, optax.GradientTransformation],
) -> optax.GradientTransformationExtraArgs:
  """Runs solvers next to each other, each on a sequence of its own.

  Args:
    solvers: by name of a sequence; all see the same batch.

  Returns:
    A transformation on the sequences of these names.
  """

  def init_fn(params):
    return SideBySide(
      {name: s.init(getattr(params, name)) for name, s in solvers.items()}
    )

  def update_fn(batch, state, params=None, **extra_args):
    updates, parts = {}, {}
    for name, solver in solvers.items():
      updates[name], parts[name] = solver.update(
        batch, state.parts[name], getattr(params, name), **extra_args
      )
    return bj.sequences(**updates), SideBySide(parts)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def relative_change(metric: Any, baseline: Any, higher_is_better: Any) -> Any:
  """The mean relative change for the worse against single-task nets, dm %.

  Args:
    metric: (..., metrics).
    baseline: (metrics,), of the single-task nets.
    higher_is_better: bool (metrics,).

  Returns:
    (...), in percent; negative is better than single-task nets.
  """
  sign = jnp.where(jnp.asarray(higher_is_better), -1.0, 1.0)
  change = sign * (metric - baseline) / jnp.abs(baseline)
  return 100 * jnp.mean(change, axis=-1)
