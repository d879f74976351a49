"""A row of the contract: one method and its properties."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import optax

from bilevel_jax.testing import _problem


class Row(NamedTuple):
  """One method and its properties.

  Attributes:
    name: the row's name; its first word is the public name that it covers.
    make: `make(wrap, **hyper)` returns a solver whose oracles are wrapped by
      `bj.evaluation.wrapped(solver, wrap)`, or by `wrap(oracle)` before an
      `optax.chain`. Look up public names inside it, not at import: a missing
      name then fails only this row.
    counts: evaluations per update, by the keys of `bj.counts`.
    covers: further public names that the row covers.
    params: makes parameters from a seed and a dtype.
    random_counts: keys of `bj.counts` that differ between updates, because the
      evaluation is random, periodic or decided by a tolerance. Leave these out
      of `counts`, which may be `{}`.
    hyper: the hyperparameters of `make`, which may be traced arrays. Each acts
      in the update that reads it, not only in the next one.
    schedules: the names in `hyper` that may be schedules; None for all.
    sets: the projection of each sequence that stays in a set, by name.
    spacings: how many float spacings outside the set rounding may leave them.
    same_as: the name of another row with the same updates.
    parts: what agrees between a batch and the mean over its parts: `exact` for
      gradients and losses, `gradients` for gradients only, `none` for a method
      that is not linear in its samples.
    keys: whether an evaluation depends on earlier ones through a key, a warm
      start or a memory, so that the parts of a batch are treated differently.
    wraps: whether `make` passes its oracles to `wrap`.
    devices: whether the row also runs on eight devices. Needed once for each
      oracle, wrapper or aggregator that handles arrays in its own way.
    light: whether another row runs the same code with another number or name:
      then only one program is compiled, and that row has the other checks.
  """

  name: str
  make: Callable[..., optax.GradientTransformationExtraArgs]
  counts: Mapping[str, int]
  covers: tuple[str, ...] = ()
  params: Callable[..., Any] = _problem.nested_params
  random_counts: tuple[str, ...] = ()
  hyper: Mapping[str, float] = {'rate': _problem.RATE}
  schedules: tuple[str, ...] | None = None
  sets: Mapping[str, Any] = {}
  spacings: int = 1
  same_as: str | None = None
  parts: str = 'exact'
  keys: bool = False
  wraps: bool = True
  devices: bool = False
  light: bool = False

  @property
  def method(self) -> str:
    """The public name that the row covers."""
    return re.split(r'\W', self.name, maxsplit=1)[0]
