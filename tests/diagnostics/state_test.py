import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj

SQUARES = bj.BilevelProblem(
  upper=lambda x, y, batch: x**2 + y**2, lower=lambda x, y, batch: (x - y) ** 2
)
PARAMS = bj.BilevelParams(jnp.float32(1.0), jnp.float32(3.0))
SGD = optax.sgd(0.25)
SOLVER = bj.v_pbgd(SQUARES, penalty=1.0, upper=SGD, lower=SGD)


def test_values_are_those_of_the_last_update():
  _, state = SOLVER.update(None, SOLVER.init(PARAMS), PARAMS)
  # The value sequence moves from 3 to 2 first.
  assert bj.values(state) == {
    'value': 4.0,
    'upper': 10.0,
    'lower': 4.0,
    'gap': 3.0,
    'gap_rounding': 4 * np.finfo(np.float32).eps * 4.0,
  }


def test_values_are_zero_before():
  values = bj.values(SOLVER.init(PARAMS))
  assert set(values) == {
    'value',
    'upper',
    'lower',
    'gap',
    'gap_rounding',
  }
  assert not any(values.values())


def test_the_later_oracle_wins_a_name():
  one = bj.gradient(lambda z, b: z, name='same')
  two = bj.gradient(lambda z, b: 2 * z, name='same')
  z, states = jnp.float32(1.0), []
  for oracle in (one, two):
    states.append(oracle.update(None, oracle.init(z), z)[1])
  state = tuple(states)
  assert bj.values(state) == {'same': 2.0}
  assert bj.counts(state) == {'gradients/same': 2}


@pytest.mark.parametrize(
  'wrap',
  [
    lambda solver: solver,
    lambda solver: optax.chain(solver, optax.identity()),
    lambda solver: optax.masked(optax.chain(solver), True),
  ],
)
def test_are_found_at_any_depth(wrap):
  solver = wrap(SOLVER)
  state = solver.init(PARAMS)
  assert set(bj.values(state)) == {
    'value',
    'upper',
    'lower',
    'gap',
    'gap_rounding',
  }
  assert set(bj.counts(state)) == {'gradients/upper', 'gradients/lower'}
  assert list(bj.auxiliaries(state)) == ['value']


def test_counts_are_whole_numbers_outside_and_arrays_inside():
  state = SOLVER.init(PARAMS)
  assert all(type(n) is int for n in bj.counts(state).values())
  inside = jax.jit(bj.counts)(state)
  assert all(n.dtype == jnp.int32 for n in inside.values())


@pytest.mark.slow
def test_counts_of_several_seeds():
  params = jax.tree.map(lambda z: jnp.stack([z, z]), PARAMS)
  state = jax.vmap(SOLVER.init)(params)
  _, state = jax.vmap(SOLVER.update, (None, 0, 0))(None, state, params)
  counts = bj.counts(state)
  np.testing.assert_array_equal(counts['gradients/lower'], [3, 3])
  with pytest.raises(FloatingPointError, match='sequence lower'):
    bj.check_finite(params._replace(lower=jnp.array([1.0, jnp.nan])), state)


def test_a_link_of_ones_own_can_count():
  class Counted(tuple):
    _fields = ('counts',)
    counts = property(lambda self: self[0])

  state = (SOLVER.init(PARAMS), Counted(({'solves': jnp.int32(4)},)))
  assert bj.counts(state)['solves'] == 4


def test_nothing_to_find():
  state = optax.adam(0.1).init(PARAMS)
  assert bj.values(state) == bj.counts(state) == bj.auxiliaries(state) == {}


@pytest.mark.parametrize('bad', [jnp.nan, jnp.inf, -jnp.inf])
def test_nonfinite_names_losses_and_sequences(bad):
  state = SOLVER.init(PARAMS)
  params = PARAMS._replace(upper={'a': jnp.array([1.0, bad]), 'n': 3})
  flags = jax.jit(bj.diagnostics.nonfinite)(params, state)
  assert {name for name, flag in flags.items() if flag} == {'sequence/upper'}
  assert set(flags) == {
    'loss/value',
    'loss/upper',
    'loss/lower',
    'loss/gap',
    'loss/gap_rounding',
    'sequence/upper',
    'sequence/lower',
    'sequence/value',
  }


def test_nonfinite_sees_the_sequences_in_state():
  state = SOLVER.init(PARAMS._replace(lower=jnp.float32(jnp.nan)))
  flags = bj.diagnostics.nonfinite(PARAMS, state)
  assert [name for name, flag in flags.items() if flag] == ['sequence/value']


def test_check_finite_passes_and_says_all_that_is_wrong():
  state = SOLVER.init(PARAMS)
  bj.check_finite(PARAMS, state)
  problem = SQUARES._replace(upper=lambda x, y, batch: jnp.log(-x) + y)
  solver = bj.v_pbgd(problem, penalty=1.0, upper=SGD, lower=SGD)
  _, state = solver.update(None, solver.init(PARAMS), PARAMS)
  params = PARAMS._replace(upper=jnp.float32(jnp.inf))
  with pytest.raises(
    FloatingPointError,
    match=r'not finite: loss upper, sequence upper\. .*step.*penalty',
  ):
    bj.check_finite(params, state)


def test_params_without_names():
  oracle = bj.gradient(lambda z, b: z.sum())
  z = jnp.array([jnp.nan])
  with pytest.raises(FloatingPointError, match='sequence params'):
    bj.check_finite(z, oracle.init(z))
