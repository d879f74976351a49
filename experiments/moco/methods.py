"""The methods that the experiments compare, each as one transformation."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj


class Own(NamedTuple):
  """A method's own hyperparameter, which is tuned beside the learning rate.

  Attributes:
    name: of the hyperparameter.
    values: what is tried; numbers, or the arguments of `share`. The first is
      taken where nothing is tuned.
  """

  name: str
  values: tuple[Any, ...]

  def label(self, index: int) -> str:
    """The hyperparameter and a value in words."""
    value = self.values[index]
    if isinstance(value, tuple):
      first, power = value
      value = f'{first:g} / (k + 1)^{power:g}' if power else first
    return f'{self.name} {value}'


class Method(NamedTuple):
  """An aggregator with what it needs of an oracle.

  Attributes:
    make: (objectives, key, rest, value of its own hyperparameter, None for a
      method that has none) -> aggregator.
    samples: how many independent Jacobians it takes.
    own: its own hyperparameter, or None.
  """

  make: Callable[[int, chex.PRNGKey, tuple[str, ...], Any], Any]
  samples: int = 1
  own: Own | None = None

  def first(self, objectives: int, key: chex.PRNGKey, own: Any = None) -> Any:
    """The aggregator where all parameters are shared and nothing else is tuned.

    Args:
      objectives: their number.
      key: of random methods.
      own: the method's own hyperparameter; by default the first of its values.

    Returns:
      The aggregator.
    """
    if own is None and self.own is not None:
      own = self.own.values[0]
    return self.make(objectives, key, (), own)


def decay(first: Any, power: Any = 0.5) -> Callable[[Any], Any]:
  """The schedule first / (count + 1) ** power."""
  return lambda count: first / (count + 1.0) ** power


def share(first: Any, power: Any = 0.5) -> Callable[[Any], Any]:
  """The same, at most one."""
  return lambda count: jnp.minimum(decay(first, power)(count), 1.0)


def _plain(aggregator, **given):
  return Method(
    lambda objectives, key, rest, own: aggregator(objectives, **given)
  )


def _keyed(aggregator):
  return Method(
    lambda objectives, key, rest, own: aggregator(objectives, key=key)
  )


def _tuned(aggregator, name, values, samples=1, keyed=False, **given):
  def make(objectives, key, rest, own):
    keywords = {name: own, **given}
    if keyed:
      keywords['key'] = key
    if samples > 1:
      keywords['samples'] = samples
    return aggregator(objectives, **keywords)

  return Method(make, samples, Own(name.replace('_', ' '), values))


# Of a new gradient in what is tracked: decaying as in the paper's theorem, as
# the authors' code has it, and one that hardly lags in a short run.
SHARES = ((1.0, 0.5), (5.0, 0.5), (0.8, 0.0))


def _moco(**given):
  return Method(
    lambda objectives, key, rest, own: bj.aggregators.moco(
      objectives, tracking=share(*own), rest=rest, **given
    ),
    own=Own('share', SHARES),
  )


METHODS = {
  'mean': _plain(bj.aggregators.mean),
  'smg': _plain(bj.aggregators.smg),
  'mgda': _plain(bj.aggregators.mgda, normalise=True),
  'pcgrad': _keyed(bj.aggregators.pcgrad),
  'grad_vac': _tuned(
    bj.aggregators.grad_vac, 'rate', (0.5, 0.1, 0.01), keyed=True
  ),
  'grad_drop': _keyed(bj.aggregators.grad_drop),
  'cagrad': _tuned(bj.aggregators.cagrad, 'radius', (0.4, 0.2, 0.8)),
  'imtl_g': _plain(bj.aggregators.imtl_g),
  'nash_mtl': _plain(bj.aggregators.nash_mtl, normalise=True),
  'aligned_mtl': _plain(bj.aggregators.aligned_mtl),
  'upgrad': _plain(bj.aggregators.upgrad),
  'dual_proj': _plain(bj.aggregators.dual_proj),
  'stch': _tuned(bj.aggregators.stch, 'smoothing', (0.1, 0.3, 1.0)),
  'uncertainty': _tuned(
    bj.aggregators.uncertainty_weighting, 'rate', (0.025, 0.005, 0.1)
  ),
  'modo': _tuned(
    bj.aggregators.modo, 'weight_step', (0.1, 0.01, 1.0), samples=2
  ),
  'sdmgrad': _tuned(bj.aggregators.sdmgrad, 'pull', (0.3, 0.1, 1.0), samples=2),
  'moco': _moco(weight_step=decay(0.1), regularisation=0.0),
  'moco_exact': _moco(weight_step=None),
  # A control: the weight steps of `moco` on single batches.
  'moco_no_memory': Method(
    lambda objectives, key, rest, own: bj.aggregators.moco(
      objectives,
      tracking=1.0,
      rest=rest,
      weight_step=decay(0.1),
      regularisation=0.0,
    )
  ),
}


# Whole solvers beside them, with their own hyperparameters.
SOLVERS = {
  'famo': Own('weight rate', (0.025, 0.005, 0.1)),
  'moco_plus': Own('share', SHARES),
}
EVERY = (*METHODS, *SOLVERS)


def own(name: str) -> Own | None:
  """A method's own hyperparameter, or None."""
  return SOLVERS[name] if name in SOLVERS else METHODS[name].own


def own_value(name: str, index: Any) -> Any:
  """The value of a method's own hyperparameter; the index may be traced."""
  tried = own(name)
  if tried is None:
    return None
  value = jnp.asarray(tried.values)[index]
  return tuple(value) if value.ndim else value


class SideBySide(NamedTuple):
  """State of `side_by_side`.

  Attributes:
    parts: each solver's state, by name.
    stopped: by name, whether it became non-finite; it stays where it was.
  """

  parts: dict[str, Any]
  stopped: dict[str, chex.Array]


def side_by_side(
  solvers: dict[str, optax.GradientTransformation],
) -> optax.GradientTransformationExtraArgs:
  """Runs solvers next to each other, each on a sequence of its own.

  One that becomes non-finite is held at its last finite step; the others go on.

  Args:
    solvers: by name of a sequence; all see the same batch.

  Returns:
    A transformation on the sequences of these names.
  """

  def init_fn(params):
    return SideBySide(
      {name: s.init(getattr(params, name)) for name, s in solvers.items()},
      {name: jnp.array(False) for name in solvers},
    )

  def update_fn(batch, state, params=None, **extra_args):
    updates, parts, stopped = {}, {}, {}
    for name, solver in solvers.items():
      before = state.parts[name]
      moves, after = solver.update(
        batch, before, getattr(params, name), **extra_args
      )
      bad = bj.diagnostics.nonfinite(
        optax.apply_updates(getattr(params, name), moves), after
      ).values()
      stopped[name] = state.stopped[name] | jnp.any(jnp.stack(list(bad)))
      keep = functools.partial(jnp.where, stopped[name])
      updates[name] = jax.tree.map(lambda x, k=keep: k(0, x), moves)
      parts[name] = jax.tree.map(keep, before, after)
    return bj.sequences(**updates), SideBySide(parts, stopped)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def relative_change(metric: Any, baseline: Any, higher_is_better: Any) -> Any:
  """The mean relative change for the worse against single-task nets, dm %.

  Args:
    metric: (..., metrics).
    baseline: (metrics,), of the single-task nets.
    higher_is_better: bool, or bool (metrics,).

  Returns:
    (...), in percent; negative is better than single-task nets.
  """
  sign = jnp.where(jnp.asarray(higher_is_better), -1.0, 1.0)
  change = sign * (metric - baseline) / jnp.abs(baseline)
  return 100 * jnp.mean(change, axis=-1)
