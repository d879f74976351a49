"""Rows that pull apart, fronts and their area, and equal gradients."""

import itertools
import os
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from experiments.lm import (
  batches,
  byte_tokenizer,
  decoder,
  tables,
  tuning,
  weights,
)
from experiments.lm import config as config_lib
from experiments.lm import data as data_lib
from experiments.xright import (
  conflict,
  conflict_data,
  fronts,
  methods,
  model_measures,
)
from experiments.xright import problem as problem_lib

ANSWER = (
  'The first sentence is long enough. 1. The second one follows. The third '
  'one ends it. The fourth is cut'
)


def example(i, answer=ANSWER):
  return data_lib.Example(i, f'Question {i}? ', answer)


def text_examples(kind):
  """Made-up rows whose prompts are texts, for a tokeniser of bytes."""
  made = conflict_data.made_up(kind, longest=120).examples
  return {
    name: [e._replace(prompt=f'{e.prompt[0]["content"]}: ') for e in rows]
    for name, rows in made.items()
  }


def test_short_and_long_answers_end_with_a_sentence_of_one_prompt():
  rows = [example(0), example(1, 'Only one sentence here.'), example(0)]
  rows += [example(2, 'No. A part that is as short as this one counts not.')]
  made = conflict_data.by_length(rows, longest=90)
  (demonstration,), (comparison,) = made['sft'], made['dpo']
  assert comparison.answer == 'The first sentence is long enough.'
  assert comparison.rejected == demonstration.answer
  assert demonstration.answer.endswith('The third one ends it.')
  assert comparison.prompt == demonstration.prompt == 'Question 0? '
  short = conflict_data.by_length([example(0)], longest=64)['sft'][0]
  assert len(short.answer) <= 64 and short.answer.endswith('follows.')


def test_rejected_answers_of_style_are_no_demonstrations():
  instructions = [
    example(i, f'Instruction {i} says {"so " * (i % 7)}it.') for i in range(40)
  ]
  dialogues = [
    data_lib.Example(
      i, f'Talk {i}', f'Well, I think it is {"ha" * i} so.', 'No.'
    )
    for i in range(15)
  ]
  long = data_lib.Example(99, 'word ' * 99, 'Well, I think that is long.', 'x')
  made, others = conflict_data.by_style(
    instructions, [*dialogues, long], longest=120
  )
  assert others == [long]
  rejected = [row.rejected for row in made['dpo']]
  assert len(rejected) == len(set(rejected)) == 15
  assert not set(rejected) & {row.answer for row in made['sft']}
  assert [row.answer for row in made['dpo']] == [d.answer for d in dialogues]


@pytest.mark.parametrize(
  'kind', [pytest.param('length', marks=pytest.mark.slow), 'style']
)
def test_no_held_out_prompt_or_answer_is_in_training(kind):
  made = text_examples(kind)
  tokenizer = byte_tokenizer.make()
  config = config_lib.tiny(8)
  model = weights.Model(config, dict(decoder.init(config, 0)), None)
  problem = problem_lib.prepare(
    model,
    tokenizer,
    tuning.Tuning(config, rank=0),
    made,
    problem_lib.Sizes(buckets=(256,), held_out=8, refresh=8),
  )
  texts = {}
  for split, by_name in problem.tables.items():
    texts[split] = set()
    for name, table in by_name.items():
      part = tables.all_rows(table)
      keys = ('tokens',) if name == 'sft' else ('chosen', 'rejected')
      for key in keys:
        mask = np.asarray(part[batches.mask_name(key)]).astype(bool)
        for row, inside in zip(np.asarray(part[key]), mask, strict=True):
          first = int(np.argmax(inside))
          texts[split].add(bytes(row[:first].tolist()))
          texts[split].add(bytes(t for t in row[inside].tolist() if t < 256))
  for one, other in itertools.combinations(texts.values(), 2):
    assert one and not one & other


@pytest.mark.parametrize(
  ('kind', 'counts'), [('style', (1740, 646)), ('length', (607, 607))]
)
def test_rows_of_the_real_files(kind, counts):
  folder = os.environ.get('BILEVEL_JAX_DATA')
  if not folder:
    pytest.skip(
      'set BILEVEL_JAX_DATA to a folder with llm/ of '
      f'{conflict_data.DIALOGUES} and its other files'
    )
  longest = conflict.PRESETS['quick'].longest
  made = conflict_data.load(folder, kind, longest=longest)
  assert tuple(map(len, made.examples.values())) == counts
  for row in made.examples['dpo']:
    assert max(len(row.answer), len(row.rejected)) <= longest


def test_cosine_of_opposite_and_equal_gradients():
  problem = types.SimpleNamespace(
    names=('sft', 'dpo'),
    frozen={},
    tables={'refresh': {'sft': jnp.float32(1), 'dpo': jnp.float32(-2)}},
    tuning=types.SimpleNamespace(init=lambda frozen, key: {'a': jnp.zeros(3)}),
  )

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      problem_lib,
      'measure',
      lambda problem, trained, frozen, part: {
        n: scale * jnp.sum(trained['a'] + scale * trained['a'] ** 2)
        for n, scale in part.items()
      },
    )
    cosines = model_measures.cosines(problem, {'end': {'a': np.ones((2, 3))}})
  # Gradients: s + 2 s^2 a with s = 1 and -2, in every coordinate.
  assert list(cosines) == ['start', 'end']
  np.testing.assert_allclose(cosines['start'], [-1], rtol=1e-6)
  np.testing.assert_allclose(cosines['end'], [1, 1], rtol=1e-6)


def test_area_of_a_front_is_the_count_of_cells():
  rng = np.random.default_rng(0)
  reference = (8, 9)
  cells = np.stack(np.meshgrid(np.arange(12), np.arange(12)), -1).reshape(-1, 2)
  inside = (cells < reference).all(axis=1)
  for size in (1, 2, 5, 9):
    points = rng.integers(0, 11, size=(size, 2))
    dominated = (cells[:, None] >= points).all(axis=2).any(axis=1)
    expected = np.sum(dominated & inside)
    assert fronts.hypervolume(points, reference) == expected
  assert fronts.hypervolume([[9.0, 0.0], [0.0, 10.0]], reference) == 0


@pytest.mark.parametrize('method', conflict.COMPARED)
def test_methods_take_equal_numbers_of_gradients_at_traced_ratios(method):
  settings = conflict.Settings(steps=20)
  losses = {
    'sft': lambda x, rows: jnp.sum((x - 1) ** 2),
    'dpo': lambda x, rows: jnp.sum((x + 1) ** 2),
  }
  steps = fronts.updates(settings, method)

  @jax.jit
  def run(ratio):
    plan = methods.Plan(mixing_ratio=ratio, steps=steps, optima=(0.0, 0.0))
    oracle = methods.oracle(method, losses, plan, key=jax.random.key(0))

    def body(carry, step):
      x, state = carry
      batch = methods.batch(method, step, {'sft': 0, 'dpo': 0})
      gradient, state = oracle.update(batch, state, x)
      gradient = jnp.reshape(gradient, x.shape)
      return (x - 0.1 * gradient, state), gradient

    x = jnp.zeros(2)
    (_, state), _ = jax.lax.scan(body, (x, oracle.init(x)), jnp.arange(steps))
    return {
      n: c for n, c in bj.counts(state).items() if n.startswith('gradients/')
    }

  counts = {n: int(c) for n, c in run(jnp.float32(0.3)).items()}
  assert sum(counts.values()) == 20
  expected = {
    'sequential': 6,
    'reversed': 6,
    'replay': pytest.approx(5.4, abs=1),
    'alright': pytest.approx(6, abs=1),
  }
  if method in expected:
    assert counts['gradients/dpo'] == expected[method]
