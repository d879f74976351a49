"""Multi-objective methods of the comparisons."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj


class Hyperparameter(NamedTuple):
  """A method's own hyperparameter, tuned together with the learning rate.

  Attributes:
    name: name of the hyperparameter.
    values: values to try: numbers, or arguments of `share`. The first is the
      default.
  """

  name: str
  values: tuple[Any, ...]

  def label(self, index: int) -> str:
    """Name and value, for tables."""
    value = self.values[index]
    if isinstance(value, tuple):
      first, power = value
      value = f'{first:g} / (k + 1)^{power:g}' if power else first
    return f'{self.name} {value}'


class Method(NamedTuple):
  """An aggregator and its requirements.

  Attributes:
    make: (objectives, key, rest, value of the hyperparameter or None) ->
      aggregator.
    samples: number of independent Jacobians per step.
    own: own hyperparameter, or None.
  """

  make: Callable[[int, chex.PRNGKey, tuple[str, ...], Any], Any]
  samples: int = 1
  own: Hyperparameter | None = None


def decay(first: Any, power: Any = 0.5) -> Callable[[Any], Any]:
  """Makes the schedule first / (count + 1)^power."""
  return lambda count: first / (count + 1.0) ** power


def share(first: Any, power: Any = 0.5) -> Callable[[Any], Any]:
  """Makes the schedule of `decay`, clipped at one."""
  return lambda count: jnp.minimum(decay(first, power)(count), 1.0)


def _plain(aggregator, **settings):
  return Method(
    lambda objectives, key, rest, own: aggregator(objectives, **settings)
  )


def _keyed(aggregator):
  return Method(
    lambda objectives, key, rest, own: aggregator(objectives, key=key)
  )


def _tuned(aggregator, name, values, samples=1, keyed=False, **settings):
  def make(objectives, key, rest, own):
    keywords = {name: own, **settings}
    if keyed:
      keywords['key'] = key
    if samples > 1:
      keywords['samples'] = samples
    return aggregator(objectives, **keywords)

  hyperparameter = Hyperparameter(name.replace('_', ' '), values)
  return Method(make, samples, hyperparameter)


# Share of the new gradient in the tracked one: as in the paper's theorem, as in
# the authors' code, and constant, for short runs.
SHARES = ((1.0, 0.5), (5.0, 0.5), (0.8, 0.0))


def _moco(**settings):
  return Method(
    lambda objectives, key, rest, own: bj.aggregators.moco(
      objectives, tracking=share(*own), rest=rest, **settings
    ),
    own=Hyperparameter('share', SHARES),
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


# Methods that are not aggregators, with their own hyperparameters.
SOLVERS = {
  'famo': Hyperparameter('weight rate', (0.025, 0.005, 0.1)),
  'moco_plus': Hyperparameter('share', SHARES),
}
EVERY = (*METHODS, *SOLVERS)
# Names that are not those of the library.
MEANINGS = {
  'smg': 'stochastic multi-gradient: MGDA on a single batch.',
  'uncertainty': 'uncertainty weighting: learns a variance for each objective.',
  'moco_exact': 'moco whose weights solve the subproblem in each step.',
  'moco_no_memory': 'control: weight steps of moco on single batches.',
  'moco_exact_published': 'moco_exact with the published tracking share.',
}


def hyperparameter(name: str) -> Hyperparameter | None:
  """The own hyperparameter of a method, or None."""
  return SOLVERS[name] if name in SOLVERS else METHODS[name].own


def hyperparameter_value(name: str, index: Any) -> Any:
  """A value of a method's own hyperparameter; the index may be traced."""
  own = hyperparameter(name)
  if own is None:
    return None
  value = jnp.asarray(own.values)[index]
  return tuple(value) if value.ndim else value


class SideBySide(NamedTuple):
  """State of `side_by_side`.

  Attributes:
    parts: states of the solvers, by name.
    stopped: whether a solver became non-finite, by name.
  """

  parts: dict[str, Any]
  stopped: dict[str, chex.Array]


def side_by_side(
  solvers: dict[str, optax.GradientTransformation],
) -> optax.GradientTransformationExtraArgs:
  """Runs independent solvers on separate sequences with the same batches.

  A solver that becomes non-finite stays at its last finite step.

  Args:
    solvers: solvers by name of their sequence.

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
  """Mean relative loss against single-task networks, dm %.

  Args:
    metric: (..., metrics).
    baseline: metrics of the single-task networks, (metrics,).
    higher_is_better: bool, or bool (metrics,).

  Returns:
    (...), in percent; negative if better than single-task networks.
  """
  sign = jnp.where(jnp.asarray(higher_is_better), -1.0, 1.0)
  change = sign * (metric - baseline) / jnp.abs(baseline)
  return 100 * jnp.mean(change, axis=-1)
