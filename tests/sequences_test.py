import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from bilevel_jax import _sequences, types

PARAMS = bj.BilevelParams({'a': jnp.ones(2)}, jnp.zeros([]))


def test_apply_updates_leaves_none_alone():
  updates = bj.BilevelParams({'a': jnp.array([1.0, 2.0])}, None)
  moved = bj.apply_updates(PARAMS, updates)
  np.testing.assert_array_equal(moved.upper['a'], [2.0, 3.0])
  assert moved.lower is PARAMS.lower


def test_apply_updates_is_optax_s_on_other_trees():
  params, updates = {'a': jnp.ones(2)}, {'a': jnp.arange(2.0)}
  chex.assert_trees_all_equal(
    bj.apply_updates(params, updates), optax.apply_updates(params, updates)
  )


def test_apply_updates_keeps_the_type_of_params():
  params = bj.sequences(a=jnp.ones(2, jnp.bfloat16))
  moved = bj.apply_updates(params, bj.sequences(a=jnp.ones(2, jnp.float32)))
  assert moved.a.dtype == jnp.bfloat16


def test_only_gives_none_elsewhere():
  assert _sequences.only(PARAMS, upper=3) == bj.BilevelParams(3, None)
  with pytest.raises(TypeError, match='middle'):
    _sequences.only(PARAMS, middle=3)


def test_counters_stop_at_their_largest_value():
  most = np.iinfo(np.int32).max
  counts = types.Named(('a', 'b'), jnp.array([most - 1, 4], jnp.int32))
  counts = bj.states.add_counts(counts, {'a': 1})
  assert dict(counts) == {'a': most, 'b': 4}
  # Also where a number is traced, and where nothing is spent of a name.
  add = jax.jit(lambda n: bj.states.add_counts(counts, {'a': n, 'b': 2}))
  assert dict(add(3)) == {'a': most, 'b': 6}
  assert add(3).array.dtype == jnp.int32


def test_missing_params_are_named():
  with pytest.raises(TypeError, match=r'who needs the parameters.*state, par'):
    _sequences.require_sequences(None, ('upper',), 'who')


@pytest.mark.parametrize('params', [{'upper': 1.0}, bj.sequences(a=1.0)])
def test_missing_sequences_are_named(params):
  with pytest.raises(TypeError, match=r'who works on the sequences upper'):
    _sequences.require_sequences(params, ('upper',), 'who')


@pytest.mark.parametrize(
  ('gradients', 'error', 'message'),
  [
    (bj.Jacobian(PARAMS), TypeError, 'who.*Jacobian.*scale_by_penalty'),
    ({'upper': 1.0}, TypeError, 'who.*dict.*oracle'),
    (bj.sequences(a=1.0), TypeError, r"who.*\('a',\)"),
    (PARAMS._replace(upper=jnp.ones(2)), ValueError, 'who.*sequence upper'),
    (
      PARAMS._replace(upper={'a': jnp.ones(3)}),
      ValueError,
      r'sequence upper has shape \(2,\).*\(3,\)',
    ),
    (PARAMS._replace(lower=jnp.ones(1)), ValueError, 'sequence lower'),
  ],
)
def test_gradients_of_another_kind_are_named(gradients, error, message):
  with pytest.raises(error, match=message):
    _sequences.require_gradients(gradients, PARAMS, 'who')


def test_none_is_a_gradient_of_any_sequence():
  _sequences.require_gradients(bj.BilevelParams(None, None), PARAMS, 'who')
  _sequences.require_gradients(PARAMS, PARAMS, 'who')


def test_no_axis_varies_outside_a_shard_map():
  assert _sequences.varying_axes(jnp.ones(2)) == frozenset()
  seen = []

  def look(x):
    seen.append(_sequences.varying_axes(x))
    return x

  jax.vmap(look, axis_name='data')(jnp.ones(2))
  assert seen == [frozenset()]


def test_vary_names_the_axes_in_a_shard_map():
  mesh = jax.make_mesh(
    (4,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  spec = jax.sharding.PartitionSpec

  def look(shared, own):
    assert _sequences.varying_axes(shared) == frozenset()
    assert _sequences.varying_axes(own) == {'data'}
    shape = jax.eval_shape(lambda: own + shared)
    assert _sequences.varying_axes(shape) == {'data'}
    mine = _sequences.vary(shared, frozenset({'data'}))
    assert _sequences.varying_axes(mine) == {'data'}
    assert _sequences.vary(own, frozenset({'data'})) is own
    return mine[None] + own

  out = jax.shard_map(
    look, mesh=mesh, in_specs=(spec(), spec('data')), out_specs=spec('data')
  )(jnp.float32(1.0), jnp.arange(4.0))
  np.testing.assert_array_equal(out, [1.0, 2.0, 3.0, 4.0])
