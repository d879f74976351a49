"""What every solver, oracle, aggregator and wrapper promises, row by row.

`pytest tests/contract_test.py -m '' -k '[v_pbgd]'` checks all promises of one
row; without `-m ''` those that are quick. The promises are
`bilevel_jax.testing`'s; checkpoints are those of the experiments.
"""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import bilevel_jax as bj
from bilevel_jax import testing
from bilevel_jax.testing import _case, _compare, _devices, _promises
from tests import contract, named_solvers

FOUND = contract.collect()
# Rows of which all promises are checked by default: a penalty method, one with
# a hypergradient, an aggregator with a state, a wrapper with a key.
REPRESENTATIVES = ('v_pbgd', 'stocbio', 'moco', 'delayed, at random')


def broken_promises(row, promises, folder=None):
  """By promise, what is wrong."""
  unknown = [
    name
    for name in (row.method, *row.covers)
    if not any(name in names for names in contract.public_names().values())
  ]
  if unknown:
    return {'is public': f'{unknown} is no public name'}

  def restore(state, like):
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(folder / 'step', state)
      checkpointer.wait_until_finished()
      return checkpointer.restore(folder / 'step', like)

  return testing.broken_promises(
    row, promises, others=FOUND.rows, restore=restore
  )


def report(row, promises, folder):
  found = broken_promises(row, promises, folder)
  if found:
    pytest.fail(testing.report(row, found), pytrace=False)


each = lambda rows: pytest.mark.parametrize('name', [row.name for row in rows])


def quick_checks(row):
  """Of the first row of a method more than of its others and of variants."""
  if row.name in REPRESENTATIVES:
    return testing.FULL + testing.DEVICES
  same_method = [r for r in FOUND.rows.values() if r.method == row.method]
  variant = row is not same_method[0] or row.method in named_solvers.VARIANTS
  light = row.light or variant
  return testing.LIGHT if light else testing.QUICK


@each(FOUND.rows.values())
def test_contract(name, tmp_path):
  row = FOUND.rows[name]
  report(row, quick_checks(row), tmp_path)


@pytest.mark.slow
@each(row for row in FOUND.rows.values() if row.name not in REPRESENTATIVES)
def test_contract_in_full(name, tmp_path):
  row = FOUND.rows[name]
  promises = testing.LIGHT if row.light else testing.FULL
  report(row, promises + testing.DEVICES * row.devices, tmp_path)


# Of rows whose devices no other test looks at.
NOT_ON_DEVICES = {
  # An assertion of jax.lax.pmean alone, without the library.
  'mean_over': 'jax has no pmean over an axis of vmap in a checked shard_map',
}


@pytest.mark.slow
@each(row for row in FOUND.rows.values() if not row.devices)
def test_contract_on_devices(name):
  """The other rows, which treat devices as one of those above does."""
  if name in NOT_ON_DEVICES:
    pytest.xfail(NOT_ON_DEVICES[name])
  report(FOUND.rows[name], testing.DEVICES, None)


@pytest.mark.slow
@each(map(FOUND.rows.get, ('v_pbgd', 'moco')))
def test_without_jit(name):
  case = _case.Case(FOUND.rows[name])
  step, start = case.make()
  now = step(*start, _case.cached_batch(0))
  _compare.require_same('without jit', now, case.points[0])


# Methods with one fault each: what the contract says of them.


def _flat(link=None, wrap=_case.identity, loss=contract.flat_loss):
  oracle = wrap(bj.gradient(loss))
  return optax.chain(oracle, link or optax.identity(), optax.sgd(0.1))


def _link(init, update=lambda updates, state, params: (updates, state)):
  """A link with a state of its own."""
  return optax.GradientTransformationExtraArgs(
    init,
    lambda updates, state, params=None, **_: update(updates, state, params),
  )


def _row(make, counts=None, **flags):
  flags = {'params': contract.flat_params, 'hyper': {}} | flags
  cost = {'gradients/loss': 1} if counts is None else counts
  return contract.Row('gradient, with a fault', make, cost, **flags)


def _counts_steps(wrap, rate):
  """A schedule whose count no mark holds in inner steps."""
  steps = _link(
    lambda params: {'steps': jnp.zeros([], jnp.int32)},
    lambda updates, state, params: (
      optax.tree.scale(rate(state['steps']), updates)
      if callable(rate)
      else optax.tree.scale(rate, updates),
      {'steps': state['steps'] + 1},
    ),
  )
  record = bj.Sequence(optax.chain(steps, optax.scale(-1.0)), steps=2)
  return bj.descend(wrap(bj.lower_gradient(contract.PROBLEM)), lower=record)


def _square(params, batch):
  return contract.flat_loss(params, batch) ** 2


_OUTSIDE = np.random.default_rng(0)


def _noise():
  return _link(
    lambda params: (),
    lambda updates, state, params: (
      jax.tree.map(lambda u: u * _OUTSIDE.uniform(), updates),
      state,
    ),
  )


TYPES = _promises.keeps_types_of_parameters
ONCE = _promises.compiles_once_and_keeps_types
LANES = _promises.scan_vmap_schedules_and_accumulate
FAULTS = {
  'a missing method': (
    lambda: _row(lambda wrap: bj.solvers.unheard_of()),
    ONCE,
    "has no attribute 'unheard_of'",
  ),
  'a count that is a plain number': (
    lambda: _row(lambda wrap: _flat(_link(lambda params: 0))),
    ONCE,
    'is int 0, not an array',
  ),
  'a number without a dtype': (
    lambda: _row(
      lambda wrap: _flat(
        _link(
          lambda params: jnp.asarray(0.0),
          lambda updates, state, params: (updates, state + jnp.float32(1)),
        )
      )
    ),
    ONCE,
    'compiled 2 programs. .*float32.* weak became float32',
  ),
  'a state that is the parameters': (
    lambda: _row(lambda wrap: _flat(_link(lambda params: params))),
    ONCE,
    'share a buffer',
  ),
  'a state as wide as floats are': (
    lambda: _row(
      lambda wrap: _flat(
        _link(
          lambda p: jnp.zeros(3, jnp.float32),
          lambda u, s, p: (u, s + np.ones(3)),
        )
      )
    ),
    TYPES,
    'float32[3] became float64[3]',
  ),
  'numbers from outside': (
    lambda: _row(lambda wrap: _flat(_noise())),
    LANES,
    'scan and vmap: update 0',
  ),
  'another count than it says': (
    lambda: _row(lambda wrap: _flat(), {'gradients/loss': 2}),
    _promises.counts_evaluations,
    "bj.counts is {'gradients/loss': 1}, expected {'gradients/loss': 2}",
  ),
  'no wrapper': (
    lambda: _row(lambda wrap: _flat()),
    _promises.passes_oracles_to_wrap,
    'wrap got 0 oracles',
  ),
  'not linear in its samples': (
    lambda: _row(lambda wrap: _flat(wrap=wrap, loss=_square)),
    LANES,
    "set parts='none'",
  ),
  'a schedule that counts steps': (
    lambda: _row(
      _counts_steps,
      {'gradients/lower': 2},
      params=contract.nested_params,
      hyper={'rate': 0.1},
    ),
    LANES,
    'schedules: with a schedule that halves rate .* gets a count other than 0',
  ),
  'a number of no effect': (
    lambda: _row(lambda wrap, rate: _flat(), hyper={'rate': 0.1}),
    _promises.accepts_injected_hyperparameters,
    'halving rate does not change the second update',
  ),
  'outside of its set': (
    lambda: _row(
      lambda wrap: bj.descend(
        bj.lower_gradient(contract.PROBLEM), lower=optax.sgd(0.1)
      ),
      {'gradients/lower': 1},
      params=contract.nested_params,
      sets={'lower': contract.Y_SET},
    ),
    _promises.stays_in_its_sets,
    'lower is .* float spacings outside its set',
  ),
  'the updates of another row': (
    lambda: _row(
      lambda wrap: optax.chain(bj.gradient(contract.flat_loss), optax.sgd(0.2)),
      same_as='gradient, sgd',
    ),
    _promises.matches_another_row,
    r"\['params'\]\['z'\]: .* instead of .* at \[",
  ),
  'a state on one device': (
    lambda: _row(
      lambda wrap: _flat(_link(lambda params: jnp.zeros(contract.COORDINATES)))
    ),
    _devices.sharded_parameters_and_batch,
    'init, .* of shape .* A last axis of length 10 counts as coordinates',
  ),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_a_fault_is_found_and_said(fault):
  make, check, words = FAULTS[fault]
  said = '\n'.join(broken_promises(make(), (check,)).values())
  if '.*' not in words:
    words = re.escape(words)
  assert re.search(words, said, re.DOTALL), said


def test_one_module_that_cannot_be_read_hides_no_other(tmp_path, monkeypatch):
  folder = tmp_path / 'some_tests'
  folder.mkdir()
  head = 'from tests.contract import Row\n'
  for name, text in {
    'good': "ROWS = (Row('a', None, {}),)",
    'bad': 'import bilevel_jax as bj\nROWS = (bj.solvers.unheard_of,)',
    'twice': "ROWS = (Row('a', None, {}),)",
    'none': 'rows = 1',
  }.items():
    (folder / f'{name}_test.py').write_text(head + text)
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.setattr(contract, 'TESTS', folder)
  found = contract.collect()
  assert list(found.rows) == ['a']
  assert 'unheard_of' in found.broken['some_tests.bad_test']
  assert "two rows have the name 'a'" in found.broken['some_tests.twice_test']
  assert len(found.broken) == 2


# The table.


def test_every_module_of_rows_is_read():
  assert not FOUND.broken, FOUND.broken


def test_every_public_method_has_a_row():
  lacking = contract.missing(contract.public_names(), FOUND.rows.values())
  assert not lacking, (
    f'public, but without a row beside its test: {lacking}. Add a Row to ROWS '
    'there, or the name to contract.HELPERS if it solves nothing.'
  )
  public = set(itertools.chain.from_iterable(contract.public_names().values()))
  assert public >= contract.HELPERS, contract.HELPERS - public


def test_a_method_without_a_row_is_found():
  public = {'solvers': ('v_pbgd', 'unheard_of'), 'evaluation': ('split_batch',)}
  rows = FOUND.rows.values()
  assert contract.missing(public, rows) == ['solvers.unheard_of']


def test_rows_that_are_the_same_exist():
  for row in FOUND.rows.values():
    assert row.same_as is None or row.same_as in FOUND.rows, row.name
    assert row.parts in ('exact', 'gradients', 'none'), row.name
