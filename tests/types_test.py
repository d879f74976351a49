import jax
import jax.numpy as jnp
import optax
import pytest

import bilevel_jax as bj
from bilevel_jax import types


def test_same_names_give_the_same_type():
  one, two = bj.sequences(a=1.0, b=2.0), bj.sequences(a=3.0, b=None)
  assert type(one) is type(two)
  assert jax.tree.structure(one) == jax.tree.structure(one._replace(a=0.0))


def test_the_order_of_names_matters():
  assert type(bj.sequences(a=1, b=2)) is not type(bj.sequences(b=2, a=1))


def test_sequences_may_be_carried_by_a_scan():
  def body(carry, _):
    return bj.sequences(a=carry.a + carry.b, b=carry.b), None

  start = bj.sequences(a=jnp.zeros([]), b=jnp.ones([]))
  end, _ = jax.lax.scan(body, start, length=3)
  assert end == bj.sequences(a=3.0, b=1.0)


def test_names_are_those_of_fields():
  for name in ('_hidden', 'not a name', 'def'):
    with pytest.raises(ValueError, match=name):
      bj.sequences(**{name: 1.0})


def test_named_numbers_are_a_mapping_over_one_array():
  named = types.Named(('a', 'b'), jnp.array([1.0, 2.0]))
  assert dict(named) == {'a': 1.0, 'b': 2.0} and len(named) == 2
  assert len(jax.tree.leaves(named)) == 1
  with pytest.raises(KeyError, match='c'):
    named['c']
  seeds = jax.vmap(lambda x: types.Named(('a', 'b'), x))(jnp.ones((3, 2)))
  assert seeds['b'].shape == (3,)
  # Without numbers there is no node: an empty array is no use to anybody.
  assert types.named((), jnp.zeros(0)) is None
  moved = jax.tree.map(lambda x: x + 1, named)
  assert dict(moved) == {'a': 2.0, 'b': 3.0}


def test_an_optimiser_stands_for_a_record_of_it():
  sgd = optax.sgd(0.1)
  assert types.as_sequence(sgd, 'z') == bj.Sequence(sgd, steps=1, restart=False)
  given = bj.Sequence(sgd, steps=3)
  found = types.as_sequence(given, 'z', steps=5, restart=True)
  assert found == bj.Sequence(sgd, steps=3, restart=True)


def test_what_a_record_says_is_kept_also_where_it_is_the_usual():
  given = bj.Sequence(optax.sgd(0.1), steps=1, restart=False)
  assert types.as_sequence(given, 'z', steps=5, restart=True) == given


def test_a_jacobian_holds_no_rest_unless_given():
  jacobian = bj.Jacobian(rows=jnp.ones((2, 3)))
  assert jacobian.rest is None and len(jax.tree.leaves(jacobian)) == 1
  other = bj.Jacobian(rows=None, rest={'head': jnp.ones(3)})
  assert len(jax.tree.leaves(other)) == 1
