"""The benchmark of language models, tiny: one objective a step, and no more."""

import jax
import numpy as np
import pytest

import bilevel_jax as bj
from experiments.benchmarks import lm, measure, seal

SIZES = lm.SMALL
CONTEXT = measure.Context(1, 0.0, None, '')
SMALL = lm.Sizes(1, 4, 8, 4, 8, lm.TINY | {'vocab_size': 32})


@pytest.mark.slow
def test_a_step_is_that_of_the_objective_chosen_at_its_price(monkeypatch):
  monkeypatch.setattr(lm, 'STEPS', 4)
  monkeypatch.setattr(lm, 'REFRESH', 2)
  made = []
  inner = lm.program
  monkeypatch.setattr(
    lm, 'program', lambda *a: made.append(inner(*a)) or made[-1]
  )
  alright = lm._selecting('alright', SIZES, CONTEXT)
  # The compiler counts no operation of the other objective.
  assert abs(alright['flops'] - 1) <= lm.BOUND_FLOPS - 1
  assert alright['temporary'] < 1.2
  assert alright['share'] == 0.5
  sft, dpo = made[:2]
  assert dpo.flops > 1.5 * sft.flops
  assert 0 < lm._selecting('maxright_refreshed', SIZES, CONTEXT)['share'] < 1
  # Losses alone: at the first choice, and every second step.
  counts = bj.counts(made[-1].carry[1])
  steps = sum(int(counts[f'gradients/{n}']) for n in lm.NAMES)
  assert counts['losses/dpo'] == -(-steps // 2)


@pytest.mark.slow
def test_both_objectives_cost_more_than_one():
  case = lm.make_case(SIZES)
  every = lm.oracles(case)
  mix, one = (lm.program(case, every[n]) for n in ('mix', 'dpo'))
  assert mix.flops > 1.3 * one.flops
  # What runs in a process of its own is that objective alone.
  alone = lm.make_case(SIZES, ('sft',))
  assert set(alone.batch['rows']) == {'sft'}
  lm.serve('sft', list(SIZES))(1)


def test_baseline_runs_what_was_chosen():
  case = lm.make_case(SIZES)
  start = jax.tree.map(np.asarray, case.params)
  losses = [
    jax.jit(case.losses[n])(
      start, {'frozen': case.batch['frozen'], 'rows': case.batch['rows'][n]}
    )
    for n in lm.NAMES
  ]
  np.testing.assert_allclose(losses[1], np.log(2), rtol=1e-3)
  count = lambda: measure.Program(lambda c, b: c + 1, np.int32(0), ())
  alone = {name: count() for name in lm.NAMES}

  class Selecting:
    """Takes comparisons in every fourth step."""

    taken = 0

    @property
    def carry(self):
      state = bj.gradient(lambda x, b: x, name='none').init(np.float32(0))
      return None, (state, self.taken)

    def run(self, steps):
      self.taken += steps

  selecting = Selecting()
  chosen = lm.Chosen(selecting, alone)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      bj,
      'counts',
      lambda state: {
        'gradients/sft': state[1] - state[1] // 4,
        'gradients/dpo': state[1] // 4,
      },
    )
    chosen.select(8)
    chosen.same(8)
    chosen.select(4)
    chosen.same(4)
  assert (int(alone['sft'].carry), int(alone['dpo'].carry)) == (9, 3)
  assert chosen.rounds == [{'sft': 6, 'dpo': 2}, {'sft': 3, 'dpo': 1}]


@pytest.mark.slow
def test_a_step_of_seal_costs_what_fine_tuning_of_the_same_rows_does():
  made = seal.step_programs(SMALL)
  base = made['sft']
  assert made['seal'].flops <= 1.1 * base.flops
  assert made['seal_full'].flops >= 1.2 * base.flops
  for one in made.values():
    before = jax.tree.map(np.asarray, one.carry[0])
    one.run(2)
    moved = jax.tree.map(
      lambda a, b: bool(np.any(np.asarray(a) != b)), one.carry[0], before
    )
    assert all(jax.tree.leaves(moved))


def test_scores_among_many_rows_touch_no_more_memory_beside_their_table():
  few, many = (seal.selector(n, 8, dense=False) for n in (100, 10_000))
  # What is held beyond the table, which is reused.
  assert many.temporary - few.temporary <= 1.1 * 4 * 9_900
  dense = seal.selector(10_000, 8, dense=True)
  assert dense.memory > many.memory
