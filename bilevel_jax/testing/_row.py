"""A row of the contract: one method, and what is true of it."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import optax

from bilevel_jax.testing import _problem


class Row(NamedTuple):
  """One method, and what is true of it.

  Attributes:
    name: of the row; its first word is the public name that the row is for.
    make: `make(wrap, **hyper)` gives a solver. `wrap` goes round its oracles:
      `bj.evaluation.wrapped(solver, wrap)`, or before an `optax.chain`
      `wrap(oracle)`.
      Look public names up inside it, not at import: a missing name then
      fails this row alone.
    counts: evaluations in one update, by the keys of `bj.counts`.
    covers: further public names that the row is for.
    params: gives parameters from a seed and a dtype.
    random_counts: keys of `bj.counts` whose number differs between updates: of
      what is drawn at random, decided by a tolerance or done every period.
      Leave these out of `counts`, which may be `{}`.
    hyper: the numbers that `make` takes, also as arrays that are traced. Each
      acts in the update that reads it, not only in the next one.
    schedules: those of them that may be schedules; None if all may.
    sets: the sequences that stay in a set, by name.
    spacings: how many spacings of floats they can be outside by rounding.
    same_as: the name of another row with the same updates.
    parts: what is equal on a whole batch and on the mean over parts of it:
      `exact` if gradients and losses are, `gradients` if they alone are, `none`
      for a method that is not linear in its samples.
    keys: whether what an evaluation sees depends on the ones before it, by a
      key, a warm start or a memory: then parts of a batch see other things.
    wraps: whether `make` gives `wrap` its oracles.
    devices: whether the row is run on eight devices too. One row for each
      oracle, wrapper or aggregator that treats its arrays in a way of its own.
    light: whether another row has the same code but for a number or a name:
      then one program is compiled, and what needs more is left to that row.
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
    """The public name that the row is for."""
    return re.split(r'\W', self.name, maxsplit=1)[0]
