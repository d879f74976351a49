"""Metrics of training batches against their definitions in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from experiments.lm import (
  decoder,
  log_probs,
  objectives,
  tables,
  training_metrics,
  tuning,
)
from experiments.xright import methods
from experiments.xright import problem as problem_lib

BETA = 0.3


@pytest.fixture(scope='module')
def problem():
  """Two buckets of demonstrations, one of comparisons; unlike the reference."""
  model, words, examples = problem_lib.made_up(24)
  examples['sft'] = [
    one._replace(answer=one.answer * (1 + 3 * (i % 2)))
    for i, one in enumerate(examples['sft'])
  ]
  tuned = tuning.Tuning(model.config, rank=2)
  sizes = problem_lib.Sizes(4, (16, 24), 4, 4, micro_batches=2)
  problem = problem_lib.prepare(model, words, tuned, examples, sizes)
  return problem._replace(shape=objectives.Shape(beta=BETA))


@pytest.fixture(scope='module')
def start(problem):
  """Adapters with an effect."""
  trained = problem.tuning.init(problem.frozen, jax.random.key(0))
  return jax.tree.map(lambda leaf: leaf + 0.05, trained)


def measure_in_numpy(problem, trained, name, rows):
  """Metrics of a batch from the logits of all positions."""
  config = problem.model.config
  params = problem.tuning.merged(trained, problem.frozen)

  def log_softmax(params, tokens):
    x = decoder.trunk(config, params, tokens)
    logits = np.asarray(decoder.logits(config, params, x), np.float64)
    return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))

  kinds = [n for n in ('tokens', 'chosen', 'rejected') if n in rows]
  totals, references, is_top = {}, {}, {}
  for kind in kinds:
    tokens = np.asarray(rows[kind])
    mask = rows['mask' if kind == 'tokens' else f'{kind}_mask']
    is_answer = np.asarray(mask)[:, 1:] > 0
    now, first = (
      log_softmax(p, tokens)[:, :-1] for p in (params, problem.frozen)
    )
    pick = lambda a, tokens=tokens: np.take_along_axis(
      a, tokens[:, 1:, None], axis=-1
    )[..., 0]
    totals[kind] = np.sum(pick(now) * is_answer, axis=1)
    references[kind] = np.sum(pick(first) * is_answer, axis=1)
    is_top[kind] = (now.argmax(-1) == tokens[:, 1:])[is_answer]
  result = {f'mean_token_accuracy/{name}': is_top[kinds[0]].mean()}
  if kinds == ['tokens'] and 'wanted' not in rows:
    return result
  where = {n: slice(None) for n in kinds}
  if 'wanted' in rows:
    wanted = np.asarray(rows['wanted']) > 0
    where = {'chosen': wanted, 'rejected': ~wanted}
    for values in (totals, references):
      values |= dict.fromkeys(where, values['tokens'])
  rewards = {}
  for n, at in where.items():
    rewards[n] = BETA * (totals[n] - references[n])[at]
    result[f'logps/{n}'] = totals[n][at].mean()
    result[f'rewards/{n}'] = rewards[n].mean()
  result['rewards/margins'] = (
    rewards['chosen'].mean() - rewards['rejected'].mean()
  )
  if 'wanted' not in rows:
    result['rewards/accuracies'] = np.mean(
      rewards['chosen'] > rewards['rejected']
    )
  return result


def solve(problem, method, *, with_metrics, micro_batches=1):
  """Makes a solver as `runs.train` does."""
  losses = problem.losses(
    problem.tables['train'],
    problem.frozen,
    jax.random.key(1),
    measure=training_metrics.sum_metrics if with_metrics else None,
  )
  oracle = methods.oracle(
    method,
    losses,
    methods.Plan(0.5, 8, micro_batches=micro_batches),
    key=jax.random.key(2),
    outputs=training_metrics.outputs(losses) if with_metrics else None,
  )
  adam = optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.01))
  if not with_metrics:
    return optax.chain(oracle, adam)
  return training_metrics.with_metrics(oracle, adam)


@pytest.mark.parametrize(
  'name',
  [
    'dpo',
    *(
      pytest.param(name, marks=pytest.mark.slow)
      for name in ('sft', 'ipo', 'kto_labelled')
    ),
  ],
)
def test_metrics_are_those_of_their_definitions(problem, start, name):
  pairs = name in objectives.COMPARISONS
  table = problem.tables['train']['dpo' if pairs else 'sft']
  rows = dict(table.parts[0])
  if name == 'kto_labelled':
    count = len(rows['tokens'])
    rows['wanted'] = (np.arange(count) % 3 > 0).astype(np.int32)
    table = objectives.reference_columns(
      problem.tuning, problem.frozen, tables.with_parts(table, [rows])
    )
    rows = dict(table.parts[0])
  answers = objectives.answers(
    name, problem.tuning, start, problem.frozen, rows, problem.shape, tops=True
  )
  sums = training_metrics.sum_metrics(name, answers, rows, problem.shape)
  # As if the oracle had these outputs.
  result = training_metrics.as_metrics({name: sums}, {name: np.array(True)})
  values = {n: value for n, (value, flag) in result.items() if flag}
  expected = measure_in_numpy(problem, start, name, rows)
  assert values.keys() == expected.keys()
  for metric, number in expected.items():
    np.testing.assert_allclose(
      values[metric], number, rtol=2e-4, atol=2e-5, err_msg=metric
    )


@pytest.mark.parametrize(
  ('method', 'micro_batches'),
  [
    ('mix', 2),
    pytest.param('maxright', 1, marks=pytest.mark.slow),
    pytest.param('mgda', 1, marks=pytest.mark.slow),
  ],
)
def test_updates_are_the_same_to_the_bit(problem, start, method, micro_batches):
  results = []
  refresh = problem.tables['refresh']
  for with_metrics in (False, True):
    solver = solve(
      problem, method, with_metrics=with_metrics, micro_batches=micro_batches
    )

    def body(carry, step, solver=solver):
      params, state = carry
      batch = methods.batch(method, step, refresh)
      updates, state = solver.update(batch, state, params)
      return (optax.apply_updates(params, updates), state), bj.values(state)

    run = jax.jit(
      lambda x, s, body=body: jax.lax.scan(body, (x, s), jnp.arange(6))
    )
    (params, state), values = run(start, solver.init(start))
    results.append((params, values))
  (plain, losses), (measured, metrics) = results
  jax.tree.map(np.testing.assert_array_equal, plain, measured)
  for name, values in losses.items():
    np.testing.assert_array_equal(metrics[name], values)
  assert np.all(metrics['grad_norm'] > 0)
  assert ('rewards/margins' in metrics) == (method != 'mgda')
  flags = bj.diagnostics.evaluated(state)
  if method == 'maxright':
    assert int(flags['rewards/margins']) == int(flags['dpo'])
    assert flags['dpo'] != flags['sft']


def test_a_step_has_the_metrics_of_its_batch(problem, start):
  name = 'dpo'
  table = problem.tables['train'][name]
  one = problem._replace(tables={'train': {name: table}})
  solver = solve(one, 'comparisons', with_metrics=True)
  _, state = solver.update({}, solver.init(start), start)
  rows = dataclasses.replace(
    table, seed=jax.random.bits(jax.random.fold_in(jax.random.key(1), 0))
  ).take(0, 0)
  expected = measure_in_numpy(problem, start, name, rows)
  values = bj.values(state)
  for metric, number in expected.items():
    np.testing.assert_allclose(values[metric], number, rtol=2e-4, atol=2e-5)
  loss = objectives.make(name, problem.tuning, problem.frozen, problem.shape)
  gradient = jax.grad(loss)(start, rows, table.max_answers[0])
  squares = [
    np.sum(np.square(leaf, dtype=float)) for leaf in jax.tree.leaves(gradient)
  ]
  np.testing.assert_allclose(
    values['grad_norm'], np.sqrt(sum(squares)), rtol=1e-4
  )


def test_metrics_that_are_not_finite_or_have_no_terms_are_left_out():
  rows = {
    'wanted': np.array([1, 1]),
    'reference_tokens_total': np.array([-1.0, -2.0], np.float32),
  }
  answers = log_probs.Answers(
    jnp.array([[-jnp.inf, -1.0], [-1.0, 0.0]]),
    jnp.array([[1, 1], [1, 0]]),
    jnp.array([[False, True], [True, True]]),
  )
  name, shape = 'kto_labelled', objectives.Shape()
  sums = training_metrics.sum_metrics(name, answers, rows, shape)
  result = training_metrics.as_metrics({name: sums}, {name: np.array(True)})
  values = {n: float(value) for n, (value, flag) in result.items() if flag}
  assert values == {f'mean_token_accuracy/{name}': pytest.approx(2 / 3)}
  assert all(np.isfinite(value) for value, _ in result.values())
