"""Several demonstrations in a row against each in a row of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from experiments import harness
from experiments.lm import batches, decoder, log_probs
from tests.experiments.lm.decoder_test import CONFIGS
from tests.tiers import first

SIZES = (9, 4, 7, 3, 8, 3, 2, 12)
LENGTH = 16


def encoded(sizes=SIZES, seed=0):
  """Random tokens with answers; the second one has no prompt."""
  rng = np.random.default_rng(seed)
  items = []
  for place, size in enumerate(sizes):
    first = 0 if place == 1 else rng.integers(1, size)
    items.append(
      {
        'tokens': rng.integers(0, 50, size=size).astype(np.int32),
        'mask': (np.arange(size) >= first).astype(np.int32),
        'index': np.int32(place),
      }
    )
  return batches.Encoded(
    np.arange(len(sizes)), items, np.array(sizes), too_long=0
  )


def test_rows_are_full_and_every_demonstration_is_whole():
  packed_rows = encoded()
  rows = batches.packed(packed_rows, LENGTH)
  assert rows['tokens'].shape == (3, LENGTH)  # 48 tokens: none is padding.
  for place, item in enumerate(packed_rows.items):
    at = rows['segments'] == place + 1
    assert at.any(axis=1).sum() == 1
    np.testing.assert_array_equal(rows['tokens'][at], item['tokens'])
    np.testing.assert_array_equal(rows['positions'][at], np.arange(at.sum()))
    np.testing.assert_array_equal(rows['mask'][at][1:], item['mask'][1:])
    assert rows['mask'][at][0] == 0
  again = batches.packed(encoded(), LENGTH)
  jax.tree.map(np.testing.assert_array_equal, rows, again)
  many = encoded(tuple(np.random.default_rng(1).integers(2, 16, size=500)))
  full = batches.packed(many, 32)
  assert np.mean(full['segments'] > 0) > 0.97
  with pytest.raises(harness.UserError, match=r'12 tokens .* of 11: pack'):
    batches.packed(packed_rows, 11)
  pairs = packed_rows._replace(items=[{'chosen': 1, 'rejected': 2}])
  with pytest.raises(harness.UserError, match='comparisons are not packed'):
    batches.packed(pairs, LENGTH)


@pytest.mark.parametrize('name', first(['llama', 'qwen3']))
def test_log_probabilities_are_those_of_rows_alone(name):
  config = CONFIGS[name]
  params = decoder.init(config, 0)
  packed_rows = encoded()
  separate, rows = (
    batches.stacked(packed_rows, LENGTH),
    batches.packed(packed_rows, LENGTH),
  )
  names = ('tokens', 'mask', 'segments', 'positions')

  def run(params, separate, rows):
    of = lambda packed_rows, names, **how: log_probs.from_tokens(
      config,
      params,
      *(packed_rows[n] for n in names[:2]),
      **{n: packed_rows[n] for n in names[2:]},
      **how,
    )
    loss = lambda result: bj.losses.sft(result.log_probs, result.mask)
    return {
      'alone': of(separate, names[:2]),
      'packed': of(rows, names),
      'few': of(rows, names, max_answer=14),
      'without positions': of(rows, names[:3]),
      'leak': of(rows, names[:2]),
      'losses': [
        jax.value_and_grad(
          lambda p, g, n: loss(
            log_probs.from_tokens(
              config, p, g['tokens'], g['mask'], **{k: g[k] for k in n}
            )
          )
        )(params, g, n)
        for g, n in ((separate, ()), (rows, names[2:]))
      ],
    }

  result = jax.jit(run)(params, separate, rows)
  expected = np.asarray(result['alone'].total)
  # By the number of the segment; where few are kept, in order.
  after = rows['segments'][:, 1:]
  of_few = [s[m > 0] for s, m in zip(after, rows['mask'][:, 1:])]
  sums = lambda numbers, where: np.bincount(
    where.ravel(), numbers.ravel(), len(SIZES) + 1
  )[1:]
  for kind in ('packed', 'without positions', 'leak'):
    numbers = np.asarray(result[kind].log_probs * result[kind].mask)
    got = sums(numbers, after)
    if kind == 'leak':
      assert np.abs(got - expected).max() > 1e-2
      # The first of each row sees nothing else.
      first = rows['segments'][:, 0] - 1
      np.testing.assert_allclose(got[first], expected[first], atol=1e-5)
    else:
      np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)
  few = np.concatenate(
    [n[m > 0] for n, m in zip(result['few'].log_probs, result['few'].mask)]
  )
  got = sums(few, np.concatenate(of_few))
  np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)
  # The mean over tokens and its derivatives too.
  one, two = result['losses']
  np.testing.assert_allclose(two[0], one[0], rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-6),
    one[1],
    two[1],
  )


def test_segments_alone_say_positions():
  segments = jnp.array([[3, 3, 3, 1, 1, 0, 0, 0], [2] * 8])
  np.testing.assert_array_equal(
    decoder.segment_positions(segments),
    [[0, 1, 2, 0, 1, 0, 1, 2], list(range(8))],
  )
