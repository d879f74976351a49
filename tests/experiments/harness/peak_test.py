"""What a step of fine-tuning holds, beside one that is written by hand."""

import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj
from experiments.harness.train import compiled, program
from experiments.harness.train.context import Members, Shared

SIZE, LAYERS = 256, 12
ADAM = optax.adam(1e-3)


def loss(params, batch):
  x = batch
  for layer in params:
    x = jnp.tanh(x @ layer)
  return jnp.mean((x - 1) ** 2)


def init(context):
  del context
  return tuple(jnp.eye(SIZE) for _ in range(LAYERS))


def peak(fn, donated, *arguments):
  """Bytes that it holds at most, its arguments among them."""
  lowered = jax.jit(fn, donate_argnums=donated).lower(*arguments)
  found = lowered.compile().memory_analysis()
  assert found.alias_size_in_bytes > 0.99 * found.output_size_in_bytes
  return found.argument_size_in_bytes + found.temp_size_in_bytes


def test_one_member_takes_no_more_than_a_donated_step_by_hand():
  def by_hand(params, state, batch):
    value, slope = jax.value_and_grad(loss)(params, batch)
    updates, state = ADAM.update(slope, state)
    return optax.apply_updates(params, updates), state, value

  params = jax.eval_shape(init, None)
  state = jax.eval_shape(ADAM.init, params)
  batch = jax.ShapeDtypeStruct((8, SIZE), jnp.float32)
  hand = peak(by_hand, (0, 1), params, state, batch)

  solver = optax.chain(bj.gradient(loss), ADAM)
  ours = []
  for count in (1, 2):
    made = program.Program(solver, init, None, None, count=count)
    every = Members(jnp.arange(count, dtype=jnp.uint32), (), ())
    carry = jax.eval_shape(made.init, every, Shared())
    ours.append(peak(made.step, 0, carry, every, Shared(), batch))
  assert ours[0] <= 1.05 * hand
  # What is frozen where it became non-finite is kept until that is known.
  assert ours[1] > 1.5 * 2 * hand


def test_a_large_member_goes_step_by_step_with_the_same_result(
  train, monkeypatch
):
  whole = train(seeds=1, workdir=None, steps=20)
  monkeypatch.setattr(compiled, 'LARGE', 0)
  steps = train(seeds=1, workdir=None, steps=20)
  for one, other in zip(
    jax.tree.leaves((whole.params, whole.history)),
    jax.tree.leaves((steps.params, steps.history)),
    strict=True,
  ):
    assert jnp.allclose(one, other, 1e-6), (one, other)
