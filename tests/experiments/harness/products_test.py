"""Thin products: values and derivatives of the plain product."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.harness.train import products

# Thin, so that the order of the product differs, and not thin.
SHAPES = ((7, 12, 3), (2, 5, 8, 2), (6, 4, 4), (12, 3))


def draw(shape, dtype):
  """Rows, weights, a direction in weights and cotangents."""
  *rows, features, columns = shape
  rng = np.random.default_rng(0)
  shapes = (
    (*rows, features),
    (features, columns),
    (features, columns),
    (*rows, columns),
  )
  return tuple(jnp.asarray(rng.normal(size=s), dtype) for s in shapes)


def derivatives(product, x, w, v, g):
  """Value, gradient, JVP and HVP of a nonlinear loss."""
  loss = lambda x, w: jnp.sum(jnp.tanh(product(x, w)) * g)
  slopes = jax.grad(loss, (0, 1))
  value, forward = jax.jvp(lambda w: product(x, w), (w,), (v,))
  hessian = jax.jvp(lambda w: slopes(x, w), (w,), (v,))[1]
  reverse = jax.grad(lambda w: jnp.vdot(slopes(x, w)[1], v))(w)
  return value, forward, slopes(x, w), hessian, reverse


@pytest.mark.parametrize('dtype', ['float64', 'float32', 'bfloat16'])
def test_is_the_product_with_all_derivatives(dtype):
  with jax.enable_x64(dtype == 'float64'):
    for shape in SHAPES:
      args = draw(shape, dtype)

      @jax.jit
      def both(*args):
        return [
          derivatives(product, *args)
          for product in (products.thin_product, jnp.matmul)
        ]

      thin, plain = both(*args)
      # Sums of at most 80 products, and second derivatives of these.
      tolerance = 200 * float(jnp.finfo(dtype).eps)
      for one, other in zip(
        jax.tree.leaves(thin), jax.tree.leaves(plain), strict=True
      ):
        assert one.dtype == other.dtype == dtype and one.shape == other.shape
        wide = [np.asarray(a, np.float64) for a in (one, other)]
        size = np.abs(wide[1]).max()
        np.testing.assert_allclose(*wide, atol=tolerance * size, rtol=0)


def test_maps_over_rows_weights_and_both():
  x, w, _, g = draw((7, 12, 3), jnp.float32)
  xs, ws = jnp.stack([x, 2 * x]), jnp.stack([w, -w])

  def slope(product):
    return jax.grad(lambda x, w: jnp.sum(product(x, w) ** 2 * g), (0, 1))

  for axes in ((0, None), (None, 0), (0, 0)):
    args = [
      many if axis == 0 else one
      for axis, one, many in zip(axes, (x, w), (xs, ws))
    ]
    thin, plain = (
      jax.jit(jax.vmap(slope(p), axes))(*args)
      for p in (products.thin_product, jnp.matmul)
    )
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
      thin,
      plain,
    )


def test_promotes_like_the_product():
  rows = np.arange(24, dtype=np.uint8).reshape(2, 12)
  weights = jnp.ones((12, 3), jnp.bfloat16)
  thin, plain = products.thin_product(rows, weights), rows @ weights
  assert thin.dtype == plain.dtype
  np.testing.assert_array_equal(thin, plain)


def test_the_large_factor_is_not_packed_in_the_slow_order():
  x, w, _, g = draw((64, 40, 3), jnp.float32)

  def compiled(product):
    slope = jax.grad(lambda w: jnp.sum(jnp.tanh(product(x, w)) * g))
    text = jax.jit(slope).lower(w).compile().as_text()
    shapes = re.findall(r'= f32\[(\d+),(\d+)\]\S* dot\(', text)
    return {tuple(map(int, shape)) for shape in shapes}

  assert (40, 3) in compiled(jnp.matmul)
  thin = compiled(products.thin_product)
  assert (3, 40) in thin and (40, 3) not in thin


def test_is_what_a_linear_layer_of_flax_takes():
  layers = [
    nnx.Linear(12, 3, dot_general=dot_general, rngs=nnx.Rngs(0))
    for dot_general in (jax.lax.dot_general, products.thin_dot_general)
  ]
  x = draw((7, 12, 3), jnp.float32)[0]
  np.testing.assert_allclose(layers[0](x), layers[1](x), rtol=1e-5, atol=1e-6)


def test_refuses_other_products():
  x, w, _, _ = draw((7, 12, 3), jnp.float32)
  with pytest.raises(ValueError, match='use vmap'):
    products.thin_product(x, w[None])
  with pytest.raises(ValueError, match=r'use jax\.lax\.dot_general'):
    products.thin_dot_general(x.T, w, (((0,), (0,)), ((), ())))
  with pytest.raises(ValueError, match='the options precision'):
    products.thin_dot_general(
      x, w, (((1,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST
    )
