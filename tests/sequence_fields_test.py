"""Each field of a record changes what its sequence does, or is refused."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests import named_solvers, tiers


def _box(z):
  return jax.tree.map(lambda a: jnp.clip(a, -1e-4, 1e-4), z)


def _other_batch(batch, t):
  return batch | {'c': batch['c'] - 0.5 - t, 'd': batch['d'] + 0.25}


class _Fields:
  """Compares the iterates of a case that differ in one field of a record.

  Args:
    case: the case.
    usual: its records, by name, with an optimiser only where that is possible.
  """

  def __init__(self, case: named_solvers.Case, usual: dict[str, Any]):
    self.case, self.usual, self.ignored = case, usual, []
    self.known: dict[Any, Any] = {}
    self.looped = {n: r._replace(steps=3) for n, r in usual.items()}
    self.added = bj.auxiliaries(case.make(**usual).init(case.params))

  def start(self, name):
    """A point other than the default one, as a record's start."""
    own = getattr(self.case.params, name, self.case.params)
    point = self.added.get(name, own)
    return lambda params: jax.tree.map(lambda a: jnp.asarray(a) + 0.3, point)

  def iterates(self, records, updates):
    """The parameters and the added sequences after some updates."""
    key = (updates, *map(id, records.values()))
    if key in self.known:
      return self.known[key][0]
    solver, params = self.case.make(**records), self.case.params

    @jax.jit  # Half the time of single operations, whose derivatives are slow.
    def move(params, state):
      moved, state = solver.update(named_solvers.BATCH, state, params)
      return bj.apply_updates(params, moved), state

    state = solver.init(params)
    for _ in range(updates):
      params, state = move(params, state)
    found = params, bj.auxiliaries(state)
    self.known[key] = found, records  # Holds the records, and so their ids.
    return found

  def compare(self, what, one, two, updates=None):
    """Notes a field that changes nothing; an error has to name a sequence."""
    updates = updates or self.case.updates
    try:
      found = [self.iterates(records, updates) for records in (one, two)]
    except (ValueError, TypeError) as error:
      assert any(name in str(error) for name in self.usual), (what, error)
      return
    pairs = zip(*map(jax.tree.leaves, found), strict=True)
    # Programs that differ may round differently.
    if all(np.allclose(a, b, rtol=1e-5) for a, b in pairs):
      self.ignored.append(what)

  def check(self, name):
    """Each field of one record, first alone, then beside inner loops."""
    one = self.usual[name]._replace

    def alone(what, **fields):
      changed = self.usual | {name: one(**fields)}
      self.compare(f'{what} of {name}', self.usual, changed)

    begin = {'start': self.start(name)}
    alone('optimiser', optimiser=optax.sgd(0.05))
    alone('set', set=_box)
    alone('steps', steps=3)
    alone('batch_at', batch_at=_other_batch)
    alone('start', **begin)
    if name in self.added:
      never, always = (
        self.usual | {name: one(**begin, restart=again)}
        for again in (False, True)
      )
      self.compare(f'restart of {name}', never, always, 2)
    else:
      alone('restart', **begin, restart=True)
    once = self.looped | {name: one(steps=1)}
    other = self.looped | {name: one(steps=1, batch_at=_other_batch)}
    self.compare(f'one step of {name} beside three', self.looped, once)
    self.compare(f'batch_at of {name} beside three steps', once, other)

  def check_together(self):
    """A `batch_at` that all sequences share."""
    change = {
      n: r._replace(batch_at=_other_batch) for n, r in self.usual.items()
    }
    self.compare('batch_at of all', self.usual, change)


@pytest.mark.parametrize(
  'solver',
  tiers.slow_where(named_solvers.SOLVERS, named_solvers.VARIANTS.__contains__),
)
def test_each_field_changes_the_iterates_or_is_refused(solver):
  case = named_solvers.make_case(solver)
  usual = named_solvers.make_records(solver)
  fields = _Fields(case, usual)
  for name in usual:
    fields.check(name)
  fields.check_together()
  assert not fields.ignored
