"""The benchmark of hypergradients, small: counts, memory and equality."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import hypergradients, measure
from experiments.benchmarks.peers import problems

# No layers are cheap to compile.
SIZES = hypergradients.Decoder(0, 8, 2, 32, 16, 4, 3)
CONTEXT = measure.Context(1, 0.0, None, '')


def test_operations_are_those_of_the_products():
  found = hypergradients._gradients(95, 32, 10, CONTEXT)
  # Two gradients for each product, less in the first layer.
  assert 0.7 < found['flops'] <= hypergradients.BOUND_FLOPS


def test_sizes_are_about_those_asked_for():
  for size in (1_000, 100_000):
    case = hypergradients.weighted_digits(hypergradients.choose_width(size), 2)
    leaves = jax.tree.leaves(case.params.lower)
    assert sum(z.size for z in leaves) == pytest.approx(size, rel=0.05)


def test_both_kinds_are_hypergradients_of_the_problem():
  """Against a derivative through the same steps, and through the solution."""
  case = hypergradients.weighted_digits(4, 6)
  upper, lower = case.problem[:2]
  x, y = case.params

  def through(x, steps):
    z = y
    for _ in range(steps):
      slope = jax.grad(lower, 1)(x, z, case.batch)
      z = jax.tree.map(lambda a, b: a - hypergradients.RATE * b, z, slope)
    return upper(x, z, case.batch)

  program = hypergradients.unrolled(case, 3)
  program.run(1)
  wanted = jax.jit(jax.grad(through), static_argnums=1)(x, 3)
  np.testing.assert_allclose(program.carry[-1], wanted, rtol=1e-4, atol=1e-7)
  program = hypergradients.implicit(case, 40, unroll=False)
  program.run(1)
  flat, shaped = jax.flatten_util.ravel_pytree(y)
  at = lambda loss: lambda x, z: loss(x, shaped(z), case.batch)

  @jax.jit
  def exact(x, z):
    slope = jax.grad(at(lower), 1)
    v = jnp.linalg.solve(
      jax.jacfwd(slope, 1)(x, z), jax.grad(at(upper), 1)(x, z)
    )
    return -v @ jax.jacfwd(slope)(x, z)

  # The ridge bounds the Hessian's condition: 40 products solve the system.
  np.testing.assert_allclose(
    program.carry[-1], exact(x, flat), rtol=1e-3, atol=1e-6
  )


def test_mixed_is_the_same_in_less_memory():
  found = hypergradients.compare_modes('mixed', SIZES, CONTEXT)
  assert found['temporary'] < 0.6
  assert found['difference'] <= hypergradients.BOUND_DIFFERENCE


def test_a_decoder_sees_no_later_token():
  sizes = SIZES._replace(layers=1)
  weights, losses = hypergradients.make_decoder(sizes)
  rows = hypergradients.weighted_sources(sizes).batch['train'][:1]
  rows = np.concatenate([rows, rows])
  rows[1, 20] = (rows[1, 20] + 1) % sizes.vocabulary
  one, two = np.asarray(jax.jit(losses)(weights, rows))
  differ = np.abs(one - two) > 1e-5  # The loss at t is that of token t + 1.
  assert not differ[:19].any()
  assert differ[19:].all()


@pytest.mark.parametrize('form', ['dense', 'factorised'])
def test_a_batch_of_the_quadratics_is_a_mean_over_its_own_samples(form):
  upper, lower, (x, y) = problems.quadratics(form, 3, 2)
  for loss in (upper, lower):
    values = [loss(x, y, i) for i in range(problems.BATCHES)]
    assert len({float(v) for v in values}) == problems.BATCHES
    slope = jax.grad(loss, 1)
    # A quadratic: the slope is affine in y.
    middle = (slope(x, y, 0) + slope(x, -y, 0)) / 2
    zero = slope(x, jnp.zeros(3), 0)
    np.testing.assert_allclose(middle, zero, atol=1e-5)
