import jax
import jax.numpy as jnp
import pytest

import bilevel_jax as bj


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


@pytest.mark.parametrize('name', ['_hidden', 'not a name', 'def'])
def test_names_are_those_of_fields(name):
  with pytest.raises(ValueError, match=name):
    bj.sequences(**{name: 1.0})


def test_a_jacobian_holds_no_rest_unless_given():
  jacobian = bj.Jacobian(rows=jnp.ones((2, 3)))
  assert jacobian.rest == {} and len(jax.tree.leaves(jacobian)) == 1
  other = bj.Jacobian(rows=None, rest={'head': jnp.ones(3)})
  assert len(jax.tree.leaves(other)) == 1
