"""What is trained, and the losses of it, against plain numpy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import harness
from experiments.lm import (
  batches,
  decoder,
  log_probs,
  objectives,
  tables,
  tuning,
)
from experiments.xright import problem as problem_lib
from tests.experiments.lm.decoder_test import SMALL

LENGTH = 8


def pairs(count=5):
  rng = np.random.default_rng(0)
  part = {'index': np.arange(count, dtype=np.int32)}
  for name in objectives.PAIR:
    tokens = rng.integers(1, 50, size=(count, LENGTH)).astype(np.int32)
    starts = rng.integers(2, 5, size=(count, 1))
    ends = rng.integers(6, LENGTH + 1, size=(count, 1))
    at = np.arange(LENGTH)
    part[name] = tokens * (at < ends)
    part[f'{name}_mask'] = ((at >= starts) & (at < ends)).astype(np.int32)
  return tables.Table((part,), np.uint32(0), 2, (6,))


# One program for each shape, not one for each operation.
forward = jax.jit(decoder.forward, static_argnums=0)


def plain_totals(config, params, part, name):
  """Sums and means over the answers, by whole logits."""
  logits = np.asarray(forward(config, params, part[name]), np.float64)
  logits -= logits.max(-1, keepdims=True)
  log_probs_ = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  totals, means = [], []
  masks = part[batches.mask_name(name)]
  for row, tokens, mask in zip(log_probs_, part[name], masks):
    at = np.flatnonzero(mask)
    own = [row[t - 1, tokens[t]] for t in at]
    totals.append(sum(own))
    means.append(np.mean(own))
  return np.array(totals), np.array(means)


@functools.cache
def model():
  return jax.tree.map(np.asarray, dict(decoder.init(SMALL, 0)))


def changed(tuned, frozen):
  """Adapters, or weights, that are not those of the start."""
  trained = jax.jit(tuned.init)(frozen, jax.random.key(1))
  rng = np.random.default_rng(2)
  return jax.tree.map(
    lambda leaf: leaf + np.float32(0.1 * rng.normal(size=leaf.shape)),
    jax.tree.map(np.asarray, trained),
  )


@pytest.mark.parametrize('rank', [3, 0])
def test_a_cached_trunk_and_merged_weights_say_what_the_whole_model_does(rank):
  table = pairs()
  (part,) = table.parts
  tuned = tuning.Tuning(SMALL, rank=rank, weights=('q', 'down'), layers=1)
  below, frozen = tuned.split(model())
  trained = changed(tuned, frozen)
  merged = tuned.merged(trained, model())
  expected = np.concatenate(
    [plain_totals(SMALL, merged, part, n)[0] for n in objectives.PAIR]
  )
  with_trunk = tuning.cache(SMALL, below, table, rows=2)
  assert with_trunk.parts[0]['chosen_x'].shape == (5, LENGTH, SMALL.width)
  result = jax.jit(
    lambda trained, part: (
      tuned.answers(trained, frozen, part, objectives.PAIR, max_answer=6).total
    )
  )(trained, with_trunk.parts[0])
  np.testing.assert_allclose(result, expected, rtol=1e-4)
  with pytest.raises(ValueError, match='no chosen_x: call'):
    tuned.answers(trained, frozen, part, objectives.PAIR)
  # All of the layers trained, with the same weights, need no trunk.
  full = tuning.Tuning(SMALL, rank=0)
  again = jax.jit(
    lambda merged: full.answers(merged, merged, part, objectives.PAIR).total
  )(merged)
  np.testing.assert_allclose(again, expected, rtol=1e-4)
  # At the start, the model is unchanged.
  start = tuned.merged(tuned.init(frozen, jax.random.key(5)), model())
  jax.tree.map(np.testing.assert_array_equal, start, model())


def test_losses_of_comparisons_are_those_of_plain_numpy():
  table = pairs()
  tuned = tuning.Tuning(SMALL, rank=2, weights=('v',))
  _, frozen = tuned.split(model())
  table = objectives.reference_columns(tuned, frozen, table, rows=2)
  (part,) = table.parts
  before = {n: plain_totals(SMALL, model(), part, n) for n in objectives.PAIR}
  for name, (total, mean) in before.items():
    np.testing.assert_allclose(
      part[f'reference_{name}_total'], total, rtol=1e-4
    )
    np.testing.assert_allclose(part[f'reference_{name}_mean'], mean, rtol=1e-4)
  trained = changed(tuned, frozen)
  merged = tuned.merged(trained, model())
  now = {n: plain_totals(SMALL, merged, part, n) for n in objectives.PAIR}
  sigmoid = lambda x: 1 / (1 + np.exp(-x))
  gains = [now[n][0] - before[n][0] for n in objectives.PAIR]
  of_means = [now[n][1] - before[n][1] for n in objectives.PAIR]
  margin = gains[0] - gains[1]
  point = max(np.concatenate(gains).mean(), 0)
  odds = [now[n][1] - np.log1p(-np.exp(now[n][1])) for n in objectives.PAIR]
  expected = {
    'dpo': np.mean(
      -0.9 * np.log(sigmoid(0.3 * margin))
      - 0.1 * np.log(sigmoid(-0.3 * margin))
    ),
    'ipo': np.mean((of_means[0] - of_means[1] - 1 / 0.6) ** 2),
    'kto': np.mean(
      [
        1 - sigmoid(0.3 * (gains[0] - point)),
        1 - sigmoid(0.3 * (point - gains[1])),
      ]
    ),
    'orpo': -np.mean(
      now['chosen'][1] + 0.7 * np.log(sigmoid(odds[0] - odds[1]))
    ),
  }
  expected['uft_pairs'] = np.mean(
    [(sigmoid(0.3 * gains[0]) - 1) ** 2, sigmoid(0.3 * gains[1]) ** 2]
  )
  shape = objectives.Shape(beta=0.3, smoothing=0.1, weight=0.7)

  def run(trained, part):
    result = tuned.answers(trained, frozen, part, objectives.PAIR, max_answer=6)
    both = (objectives.loss, objectives.row_losses)
    return {
      n: [f(n, result, part, shape) for f in both]
      for n in objectives.COMPARISONS
    }

  result = jax.jit(run)(trained, part)
  assert set(result) == set(expected)
  for name, value in expected.items():
    loss, rows = result[name]
    np.testing.assert_allclose(loss, value, rtol=2e-4, err_msg=name)
    # Each row by itself; but kto compares with the others.
    assert rows.shape == (5,)
    if name != 'kto':
      np.testing.assert_allclose(rows.mean(), loss, rtol=1e-5, err_msg=name)
  margins = -np.log(sigmoid(0.3 * margin)) * 0.9
  margins -= np.log(sigmoid(-0.3 * margin)) * 0.1
  np.testing.assert_allclose(result['dpo'][1], margins, rtol=2e-4)


def test_the_loss_of_labelled_answers_is_that_of_plain_numpy():
  """Single answers, three wanted and two not; the baseline is their mean."""
  wanted = np.array([1, 0, 1, 1, 0], np.int32)
  table = tables.make(demonstrations(), 5, columns={'wanted': wanted})
  tuned = tuning.Tuning(SMALL, rank=2, weights=('v',))
  _, frozen = tuned.split(model())
  (part,) = objectives.reference_columns(tuned, frozen, table).parts
  trained = changed(tuned, frozen)
  before, now = (
    plain_totals(SMALL, params, part, 'tokens')[0]
    for params in (model(), tuned.merged(trained, model()))
  )
  gains = now - before
  point = max(gains.mean(), 0)
  signs = 2 * wanted - 1
  expected = np.mean(1 - 1 / (1 + np.exp(-0.3 * signs * (gains - point))))
  shape = objectives.Shape(beta=0.3)

  def run(trained, part):
    name = 'kto_labelled'
    result = objectives.answers(name, tuned, trained, frozen, part, shape)
    return objectives.loss(name, result, part, shape)

  np.testing.assert_allclose(jax.jit(run)(trained, part), expected, rtol=2e-4)


def demonstrations(count=5):
  """Those of `pairs` that were chosen, each with its length."""
  (part,) = pairs(count).parts
  items = []
  for tokens, mask in zip(part['chosen'], part['chosen_mask']):
    size = int(np.flatnonzero(mask)[-1]) + 1
    items.append({'tokens': tokens[:size], 'mask': mask[:size]})
  lengths = np.array([len(item['tokens']) for item in items])
  rows = [
    item | {'index': np.int32(i), 'mask': item['mask'].astype(np.int32)}
    for i, item in enumerate(items)
  ]
  return batches.Encoded(np.arange(count), rows, lengths, 0)


@pytest.mark.slow
def test_distillation_and_rewards_of_demonstrations_packed_or_not():
  """Against plain numpy; above a cached trunk, also side by side in rows."""
  encoded = demonstrations()
  table = tables.make(encoded, 5, buckets=(LENGTH,))
  side = tables.packed(encoded, 2, length=2 * LENGTH)
  tuned = tuning.Tuning(SMALL, rank=2, weights=('v',), layers=1)
  below, frozen = tuned.split(model())
  teacher = dataclasses.replace(SMALL, layers=2, width=16, hidden=24)
  teacher_params = dict(decoder.init(teacher, 3))
  shape = objectives.Shape(0.3, teacher=teacher)
  trained = changed(tuned, frozen)
  table, side = (tuning.cache(SMALL, below, t, rows=2) for t in (table, side))
  table = objectives.reference_columns(tuned, frozen, table, rows=2)
  names = ('sft', 'chord', 'distillation', 'uft')

  def run(trained, frozen, table, side):
    of = lambda t, names: {
      n: objectives.make(n, tuned, frozen, shape)(
        trained, tables.all_rows(t), t.max_answers[0]
      )
      for n in names
    }
    rows = tables.all_rows(table)
    back = shape._replace(divergence='reverse')
    lost = {}
    for one in (shape, back):
      each = objectives.answers(
        names[2], tuned, trained, frozen, rows, one, max_answer=6
      )
      lost[one.divergence] = objectives.row_losses(names[2], each, rows, one)
    return of(table, names), of(side, names[:3]), lost

  result, packed, each = jax.jit(run)(
    trained, {**frozen, 'teacher': teacher_params}, table, side
  )
  assert side.parts[0]['tokens'].shape[0] < 5
  for name, value in packed.items():
    np.testing.assert_allclose(value, result[name], rtol=1e-4, err_msg=name)

  def all_logs(config, params):
    logits = forward(config, params, table.parts[0]['tokens'])
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

  (part,) = table.parts
  student_logs = all_logs(SMALL, tuned.merged(trained, model()))
  other = all_logs(teacher, teacher_params)
  mask = part['mask'][:, 1:] > 0
  for name, (first, second) in (
    ('reverse', (student_logs, other)),
    ('forward', (other, student_logs)),
  ):
    tokens = np.sum(np.exp(first) * (first - second), axis=-1)[:, :-1]
    rows = [
      line[answer_log_probs].mean()
      for line, answer_log_probs in zip(tokens, mask)
    ]
    np.testing.assert_allclose(each[name], rows, rtol=1e-3)
  np.testing.assert_allclose(
    result['distillation'], tokens[mask].mean(), rtol=1e-3
  )
  part = part | {'tokens_mask': part['mask']}
  now, before = (
    plain_totals(SMALL, m, part, 'tokens')[0]
    for m in (tuned.merged(trained, model()), model())
  )
  np.testing.assert_allclose(
    result['uft'],
    np.mean((1 / (1 + np.exp(-0.3 * (now - before))) - 1) ** 2),
    rtol=1e-3,
  )


def test_rows_too_few_to_be_packed_are_said():
  match = r'5 demonstrations are packed into 2 rows of 24 tokens, fewer'
  with pytest.raises(harness.SettingsError, match=match):
    tables.packed(demonstrations(), 3, length=24)


def test_losses_of_demonstrations_and_unknown_ones():
  rng = np.random.default_rng(0)
  result = log_probs.Answers(
    jnp.asarray(-rng.uniform(0.1, 3, size=(3, 4))),
    jnp.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]]),
  )
  answer_log_probs = np.asarray(result.log_probs)[np.asarray(result.mask) > 0]
  shape = objectives.Shape()
  np.testing.assert_allclose(
    objectives.loss('sft', result, {}, shape),
    -answer_log_probs.mean(),
    rtol=1e-6,
  )
  weighted = (
    np.exp(answer_log_probs) * (1 - np.exp(answer_log_probs)) * answer_log_probs
  )
  np.testing.assert_allclose(
    objectives.loss('chord', result, {}, shape),
    -weighted.mean(),
    rtol=1e-6,
  )
  with pytest.raises(harness.SettingsError, match="'rlhf'; known: sft, chord"):
    objectives.make('rlhf', tuning.Tuning(SMALL), {}, shape)


def test_what_is_held_out_is_measured_some_at_a_time():
  random_model, words, examples = problem_lib.made_up(24)
  tuned = tuning.Tuning(random_model.config, rank=2)
  problem = problem_lib.prepare(
    random_model, words, tuned, examples, problem_lib.Sizes(4, (16,), 7, 3)
  )
  trained = changed(tuned, problem.frozen)
  shape = objectives.Shape()
  result = jax.jit(
    lambda trained, frozen, batch: problem_lib.measure(
      problem, trained, frozen, batch, rows=4
    )
  )(trained, problem.frozen, problem.tables['held_out'])
  full = {
    n: jax.jit(
      objectives.make(n, tuned, problem.frozen, shape), static_argnums=2
    )(trained, tables.all_rows(table), 16)
    for n, table in problem.tables['held_out'].items()
  }
  for name, value in full.items():
    np.testing.assert_allclose(result[name], value, rtol=1e-5)
  part = tables.all_rows(problem.tables['held_out']['dpo'])
  merged = tuned.merged(trained, random_model.params)
  gains = [
    plain_totals(random_model.config, m, part, n)[0] * sign
    for n, sign in (('chosen', 1), ('rejected', -1))
    for m in (merged,)
  ]
  gains += [
    -plain_totals(random_model.config, random_model.params, part, n)[0] * sign
    for n, sign in (('chosen', 1), ('rejected', -1))
  ]
  np.testing.assert_allclose(result['accuracy'], np.mean(sum(gains) > 0))
  # No row is in two parts, and rows too few say what is needed.
  for name in problem.names:
    index = [
      np.concatenate(
        [p['tokens' if name == 'sft' else 'chosen'] for p in t.parts]
      )
      for t in (problem.tables[p][name] for p in problem_lib.SPLITS)
    ]
    assert sum(map(len, index)) == 24
  assert len(problem.prompts) == 7
  with pytest.raises(harness.SettingsError, match=r'24 rows fit .* 25 are ne'):
    problem_lib.prepare(
      random_model, words, tuned, examples, problem_lib.Sizes(4, (16,), 14, 7)
    )


def test_no_more_layers_are_trained_than_there_are():
  """A negative cut would be a slice from the other end, without a word."""
  too_many = tuning.Tuning(SMALL, layers=SMALL.layers + 1)
  with pytest.raises(harness.SettingsError, match='but the model has'):
    too_many.split({})
  assert tuning.Tuning(SMALL, layers=SMALL.layers).cut == 0
