"""Two objectives of one small model, each with its data, one at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from experiments.lm import decoder, log_probs, lora
from tests.experiments.lm.decoder_test import SMALL

LENGTH, ROWS = 8, 6


def make_rows(seed):
  """Tokens of a prompt and of an answer that follows a rule of the seed."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, 50, size=(ROWS, LENGTH)).astype(np.int32)
  tokens[:, 4:] = (tokens[:, :4] + seed) % 50
  return tokens


@pytest.mark.slow
def test_fine_tuning_and_preference_of_adapters_both_get_better():
  """By the coin of ALRIGHT: frozen layers, adapters above, fixed reference."""
  config = SMALL
  params = decoder.init(config, 0)
  params = jax.tree.map(np.asarray, params)
  lower, upper = decoder.split_layers(params, 1)
  run_trunk = jax.jit(lambda tokens: decoder.trunk(config, lower, tokens))
  mask = np.tile((np.arange(LENGTH) >= 4).astype(np.int32), (ROWS, 1))
  tokens = {
    'right': make_rows(1),
    'chosen': make_rows(2),
    'rejected': make_rows(3),
  }
  data = {
    'sft': {
      'tokens': tokens['right'],
      'x': run_trunk(tokens['right']),
    },
    'dpo': {n: tokens[n] for n in ('chosen', 'rejected')}
    | {f'{n}_x': run_trunk(tokens[n]) for n in ('chosen', 'rejected')},
  }
  data['dpo'] |= {
    f'reference_{n}': log_probs.from_tokens(
      config, params, tokens[n], mask
    ).total
    for n in ('chosen', 'rejected')
  }

  def answers(adapters, x, tokens):
    top = lora.attach(upper, adapters)
    x = decoder.run_layers(config, top['layers'], x)
    return log_probs.from_hidden(config, upper, x, tokens, mask, max_answer=4)

  def sft(adapters, batch):
    result = answers(adapters, batch['x'], batch['tokens'])
    return bj.losses.sft(result.log_probs, result.mask)

  def dpo(adapters, batch):
    total = {
      n: answers(adapters, batch[f'{n}_x'], batch[n]).total
      for n in ('chosen', 'rejected')
    }
    return bj.losses.dpo(
      **total,
      reference_chosen=batch['reference_chosen'],
      reference_rejected=batch['reference_rejected'],
      beta=0.5,
    )

  solver = optax.chain(
    bj.solvers.alright(
      [sft, dpo], ('sft', 'dpo'), weights=[0.5, 0.5], key=0, even=True
    ),
    optax.adam(1e-2),
  )
  adapters = lora.init(upper, jax.random.key(1), rank=4, weights=lora.WEIGHTS)

  def run(adapters, data):
    def body(carry, _):
      adapters, state = carry
      updates, state = solver.update(data, state, adapters)
      return (optax.apply_updates(adapters, updates), state), None

    start = (adapters, solver.init(adapters))
    (adapters, state), _ = jax.lax.scan(body, start, length=120)
    return adapters, bj.values(state), bj.counts(state)

  trained, lost, counts = jax.jit(run)(adapters, data)
  first = jax.jit(lambda a: (sft(a, data['sft']), dpo(a, data['dpo'])))
  before, after = first(adapters), first(trained)
  np.testing.assert_allclose(before[1], np.log(2), rtol=1e-4)
  assert after[0] < before[0] / 2
  assert after[1] < before[1] / 2
  assert counts['gradients/sft'] + counts['gradients/dpo'] == 120
  assert abs(counts['gradients/sft'] - 60) <= 2
  assert jnp.isfinite(lost['sft'])
