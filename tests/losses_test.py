"""Losses of log-probabilities against plain loops, and extreme inputs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj

ROWS, LENGTH, WORDS = 5, 7, 6
_RNG = np.random.default_rng(7)
TOKENS = -_RNG.exponential(1.5, size=(ROWS, LENGTH))
MASK = (_RNG.uniform(size=(ROWS, LENGTH)) < 0.6).astype(np.int32)
MASK[2] = 0  # A row with a truncated response.
LOGITS = _RNG.normal(size=(2, ROWS, LENGTH, WORDS))
MODEL, TEACHER = (a - np.log(np.exp(a).sum(-1, keepdims=True)) for a in LOGITS)
SUMS = -_RNG.exponential(8.0, size=(4, ROWS))  # Log-probabilities of responses.
MEANS = -_RNG.exponential(1.0, size=(2, ROWS))
WANTED = np.array([True, False, False, True, True])
SCORES = np.array([1.0, 0.3, 0.0, 0.8, 1.0])
OTHERS = _RNG.normal(size=3) + 0.4


def sigmoid(x):
  return 1 / (1 + math.exp(-x))


# Plain loops over rows and tokens, from the papers.


def plain_sft(log_probs, weights=None, over='tokens'):
  total, number, means = 0.0, 0, []
  for i in range(ROWS):
    terms = []
    for t in range(LENGTH):
      if MASK[i, t]:
        weight = 1 if weights is None else weights[i, t]
        terms.append(-weight * log_probs[i, t])
    total, number = total + sum(terms), number + len(terms)
    if terms:
      means.append(sum(terms) / len(terms))
  return total / number if over == 'tokens' else sum(means) / len(means)


def plain_chord(log_probs, fixed=None):
  p = np.exp(log_probs if fixed is None else fixed)
  return plain_sft(log_probs, weights=p * (1 - p))


def plain_distillation(log_probs, direction):
  results = []
  for i in range(ROWS):
    for t in range(LENGTH):
      if MASK[i, t]:
        p, q = np.exp(TEACHER[i, t]), np.exp(log_probs[i, t])
        if direction == 'reverse':
          p, q = q, p
        results.append(sum(a * math.log(a / b) for a, b in zip(p, q)))
  return sum(results) / len(results)


def plain_pairs(one):
  """The mean over pairs of a function of the margin."""

  def loss(chosen, rejected):
    ratios = [
      (won - SUMS[2, i]) - (lost - SUMS[3, i])
      for i, (won, lost) in enumerate(zip(chosen, rejected))
    ]
    return sum(map(one, ratios)) / ROWS

  return loss


def plain_kto(log_probs):
  point, total = max(0.0, float(np.mean(OTHERS))), 0.0
  for lp, ref, wanted in zip(log_probs, SUMS[2], WANTED):
    r = lp - ref
    if wanted:
      total += 1.3 * (1 - sigmoid(0.2 * (r - point)))
    else:
      total += 0.7 * (1 - sigmoid(0.2 * (point - r)))
  return total / ROWS


def plain_orpo(chosen, rejected):
  total = 0.0
  for won, lost in zip(chosen, rejected):
    odds = lambda lp: math.exp(lp) / (1 - math.exp(lp))
    ahead = math.log(odds(won) / odds(lost))
    total += -won - 0.4 * math.log(sigmoid(ahead))
  return total / ROWS


def plain_uft(log_probs, cross):
  total = 0.0
  for lp, ref, score in zip(log_probs, SUMS[2], SCORES):
    q = sigmoid(0.2 * (lp - ref))
    if cross:
      total -= score * math.log(q) + (1 - score) * math.log(1 - q)
    else:
      total += (q - score) ** 2
  return total / ROWS


def _cast(dtype, *arrays):
  return [jnp.asarray(a, dtype) for a in arrays]


def cases(dtype):
  """By name: the loss, its reference, and the differentiable arguments."""
  mask, wanted = jnp.asarray(MASK), jnp.asarray(WANTED)
  _, _, c, r = _cast(dtype, *SUMS)
  teacher, others, scores = _cast(dtype, TEACHER, OTHERS, SCORES)
  weights = np.exp(TOKENS / 3)
  (cast,) = _cast(dtype, weights)
  losses = bj.losses
  smooth = lambda h: (
    -0.9 * math.log(sigmoid(0.2 * h)) - 0.1 * math.log(sigmoid(-0.2 * h))
  )
  return {
    'sft': (lambda a: losses.sft(a, mask), plain_sft, [TOKENS]),
    'sft, rows, weights': (
      lambda a: losses.sft(a, mask, weights=cast, over='rows'),
      lambda a: plain_sft(a, weights, 'rows'),
      [TOKENS],
    ),
    'sft, chord': (
      lambda a: losses.sft(a, mask, weights=losses.chord_weights(a)),
      lambda a: plain_chord(a, TOKENS),  # Constant in derivatives.
      [TOKENS],
    ),
    'distillation': (
      lambda a: losses.distillation(a, teacher, mask),
      lambda a: plain_distillation(a, 'forward'),
      [MODEL],
    ),
    'distillation, reverse': (
      lambda a: losses.distillation(a, teacher, mask, divergence='reverse'),
      lambda a: plain_distillation(a, 'reverse'),
      [MODEL],
    ),
    'dpo': (
      lambda a, b: losses.dpo(a, b, c, r, beta=0.2),
      plain_pairs(lambda h: -math.log(sigmoid(0.2 * h))),
      SUMS[:2],
    ),
    'dpo, smoothed': (
      lambda a, b: losses.dpo(a, b, c, r, beta=0.2, smoothing=0.1),
      plain_pairs(smooth),
      SUMS[:2],
    ),
    'ipo': (
      lambda a, b: losses.ipo(a, b, c, r, beta=0.2),
      plain_pairs(lambda h: (h - 2.5) ** 2),
      SUMS[:2],
    ),
    'kto': (
      lambda a: losses.kto(
        a, c, wanted, others, beta=0.2, wanted_weight=1.3, unwanted_weight=0.7
      ),
      plain_kto,
      SUMS[:1],
    ),
    'orpo': (
      lambda a, b: losses.orpo(a, b, weight=0.4),
      plain_orpo,
      MEANS,
    ),
    'uft': (
      lambda a: losses.uft(a, c, scores, beta=0.2),
      lambda a: plain_uft(a, False),
      SUMS[:1],
    ),
    'uft, cross-entropy': (
      lambda a: losses.uft(a, c, scores, beta=0.2, distance='cross_entropy'),
      lambda a: plain_uft(a, True),
      SUMS[:1],
    ),
  }


def test_values_and_derivatives_match_plain_loops():
  """All losses, in one program per precision."""
  results = {}
  for dtype in (np.float64, np.float32):
    with jax.enable_x64(dtype == np.float64):
      by_name = cases(dtype)

      def every(by_name=by_name, dtype=dtype):
        return {
          name: jax.value_and_grad(lambda arrays, f=function: f(*arrays))(
            _cast(dtype, *at)
          )
          for name, (function, _, at) in by_name.items()
        }

      results[dtype] = jax.tree.map(np.asarray, jax.jit(every)())
  for name, (_, plain, at) in cases(np.float32).items():
    value, slopes = results[np.float64][name]
    assert value.dtype == np.float64
    assert value == pytest.approx(plain(*at), rel=1e-12), name
    for k, slope in enumerate(slopes):
      for place in np.ndindex(slope.shape):
        moved = []
        for step in (1e-5, -1e-5):
          point = [np.array(a) for a in at]
          point[k][place] += step
          moved.append(plain(*point))
        expected = (moved[0] - moved[1]) / 2e-5
        assert slope[place] == pytest.approx(expected, rel=1e-7, abs=2e-9), (
          name,
          place,
        )
    value32, slopes32 = results[np.float32][name]
    assert value32.dtype == np.float32
    assert value32 == pytest.approx(value, rel=2e-5), name
    for one, two in zip(slopes32, slopes):
      np.testing.assert_allclose(one, two, rtol=2e-4, atol=2e-6, err_msg=name)


def test_extreme_log_probabilities_give_no_nan():
  """For the policy, the reference and both, in the whole float32 range."""
  ends = np.array([0.0, -1e-30, -80.0, -200.0, -1e30, -np.inf], np.float32)
  grid = jnp.asarray(np.stack(np.meshgrid(*[ends] * 4), -1).reshape(-1, 4).T)
  losses, wanted = bj.losses, jnp.array([True, False])
  scores = jnp.array([0.0, 0.5, 1.0])

  def each(a, b, c, d):
    two = lambda x: jnp.stack([x, x])
    # A masked token may have any value.
    row, mask = (
      jnp.stack([a, b, jnp.float32(jnp.nan)])[None],
      jnp.array([[1, 1, 0]]),
    )
    spread = lambda x, y: jnp.stack([x, jnp.float32(-0.1), y])[None, None]
    return {
      'sft': losses.sft(row, mask),
      'chord': losses.sft(row, mask, weights=losses.chord_weights(row)),
      'forward': losses.distillation(
        spread(a, b), spread(c, d), jnp.ones((1, 1))
      ),
      'reverse': losses.distillation(
        spread(a, b), spread(c, d), jnp.ones((1, 1)), divergence='reverse'
      ),
      'dpo': losses.dpo(a, b, c, d, smoothing=0.1),
      'ipo': losses.ipo(a, b, c, d),
      'kto': losses.kto(two(a), two(b), wanted, c),
      'orpo': losses.orpo(a, b),
      'uft': losses.uft(jnp.full(3, a), jnp.full(3, b), scores),
      'uft, cross': losses.uft(
        jnp.full(3, a), jnp.full(3, b), scores, distance='cross_entropy'
      ),
    }

  results = jax.jit(jax.vmap(each))(*grid)
  slopes = jax.jit(
    jax.vmap(jax.jacrev(lambda a, b, c, d: each(a, b, c, d), (0, 1)))
  )(*grid)
  for name in results:
    lost = np.asarray(results[name])
    assert np.isfinite(lost).all(), (name, grid[:, ~np.isfinite(lost)][:, 0])
    for one in slopes[name]:
      assert np.isfinite(np.asarray(one)).all(), name


def test_the_loss_without_tokens_is_zero():
  row, none = jnp.full((2, 3), -jnp.inf), jnp.zeros((2, 3))
  for over in ('tokens', 'rows'):
    lost, slope = jax.value_and_grad(
      lambda a, over=over: bj.losses.sft(a, none, over=over)
    )(row)
    assert lost == 0 and not slope.any()


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_the_loss_without_rows_is_zero(dtype):
  none, losses = jnp.zeros(0, dtype), bj.losses
  for lost in (
    losses.dpo(none, none, none, none),
    losses.ipo(none, none, none, none),
    losses.orpo(none, none),
    losses.uft(none, none, none),
    losses.uft(none, none, none, distance='cross_entropy'),
    losses.kto(none, none, none > 0, none),
  ):
    assert lost == 0


def test_an_empty_baseline_gives_a_reference_point_of_zero():
  gained, reference = jnp.array([-3.0, -4.0]), jnp.array([-4.0, -2.0])
  wanted = jnp.array([True, False])
  empty, zeros = (
    bj.losses.kto(gained, reference, wanted, jnp.zeros(n)) for n in (0, 3)
  )
  assert empty == zeros and jnp.isfinite(empty)


def test_labels_of_minus_one_mean_unwanted_also_when_traced():
  gained, reference = jnp.array([-3.0, -4.0]), jnp.array([-4.0, -2.0])
  loss = lambda wanted: bj.losses.kto(gained, reference, wanted, jnp.zeros(1))
  expected = loss(jnp.array([True, False]))
  for labels in ([1, 0], [1, -1], [1.0, -1.0]):
    assert loss(jnp.array(labels)) == expected
    assert jax.jit(loss)(jnp.array(labels)) == expected


def test_traced_scores_are_clipped():
  """For scores above 1 the cross-entropy has no minimum."""
  fixed = jnp.array([-4.0, -2.0])
  loss = lambda scores: bj.losses.uft(
    fixed + 1, fixed, scores, distance='cross_entropy'
  )
  expected = loss(jnp.array([1.0, 0.5]))
  np.testing.assert_array_equal(jax.jit(loss)(jnp.array([1.5, 0.5])), expected)


@pytest.mark.parametrize('dtype', [jnp.float16, jnp.bfloat16])
def test_sums_over_tokens_use_float32(dtype):
  """1,000 tokens of -100 leave the range of float16; 301 need 9 bits."""
  numbers, mask = jnp.full((2, 1000), -100, dtype), jnp.ones((2, 1000))
  mask = mask.at[1, 301:].set(0)
  total = bj.losses.masked_sum(numbers, mask)
  mean = bj.losses.masked_mean(numbers, mask)
  assert total.dtype == mean.dtype == jnp.float32
  np.testing.assert_array_equal(total, [-100_000.0, -30_100.0])
  np.testing.assert_array_equal(mean, [-100.0, -100.0])
  slope = jax.grad(lambda a: bj.losses.masked_sum(a, mask).sum())(numbers)
  assert slope.dtype == dtype


def test_token_log_probs_match_numpy():
  tokens = _RNG.integers(0, WORDS, size=(ROWS, LENGTH))
  results = bj.losses.token_log_probs(
    jnp.asarray(LOGITS[0], jnp.float32), jnp.asarray(tokens)
  )
  expected = np.take_along_axis(MODEL, tokens[..., None], -1)[..., 0]
  np.testing.assert_allclose(results, expected, rtol=1e-5, atol=1e-6)
  # bfloat16 logits are summed in float32; a padding of -1 is to be masked.
  low = bj.losses.token_log_probs(
    jnp.zeros((1, 4096), jnp.bfloat16), -jnp.ones(1, int)
  )
  assert low.dtype == jnp.float32
  np.testing.assert_allclose(low, -math.log(4096), rtol=1e-6)


def test_the_reference_and_the_teacher_are_constant():
  c = jnp.array([-3.0, -4.0])
  loss = bj.losses
  for f in (
    lambda r: loss.dpo(c, c, r, 2 * r),
    lambda r: loss.kto(c, r, c < -3.5, r),
    lambda r: loss.uft(c, r, c < -3.5),
    lambda r: loss.distillation(c[None, None], r[None, None], jnp.ones((1, 1))),
  ):
    assert not jax.grad(f)(c - 1).any()


def test_errors():
  zero = jnp.zeros(2)
  for call, words in (
    (lambda: bj.losses.dpo(zero, zero, zero, zero, beta=0.0), 'beta is'),
    (
      lambda: bj.losses.dpo(zero, zero, zero, zero, smoothing=0.7),
      r'smoothing is in \[0, 0.5\]',
    ),
    (lambda: bj.losses.dpo(zero[:, None], *[zero] * 3), 'one number per'),
    (lambda: bj.losses.ipo(*[zero] * 3, zero[:, None]), 'one number per'),
    (lambda: bj.losses.orpo(zero, zero[:, None]), 'one number per'),
    (lambda: bj.losses.kto(zero, zero, zero[:, None], zero), 'one number per'),
    (lambda: bj.losses.uft(zero, zero, zero[:, None]), 'one number per'),
    (lambda: bj.losses.orpo(zero, zero, weight=-1.0), 'the weight'),
    (lambda: bj.losses.kto(zero, zero, zero, zero, wanted_weight=-1), 'wanted'),
    (lambda: bj.losses.uft(zero, zero, zero, distance='l1'), 'cross_entropy'),
    (lambda: bj.losses.uft(zero, zero, zero - 0.1), 'each of the scores'),
    (lambda: bj.losses.uft(zero, zero, zero + 1.1), 'each of the scores'),
    (lambda: bj.losses.kto(zero, zero, zero + 2, zero), 'has the label 2.0'),
    (lambda: bj.losses.kto(zero, zero, zero * jnp.nan, zero), 'label nan'),
    (lambda: bj.losses.sft(zero, zero, over='batch'), "'tokens' or 'rows'"),
    (lambda: bj.losses.sft(zero, jnp.ones(3)), 'a mask of'),
    (
      lambda: bj.losses.distillation(
        zero[None], zero[None], zero, divergence='js'
      ),
      "'forward' or 'reverse'",
    ),
    (
      lambda: bj.losses.distillation(zero[None], jnp.ones((1, 3)), zero),
      'the teacher have',
    ),
  ):
    with pytest.raises(ValueError, match=words):
      call()
