"""The benchmark of selecting steps, tiny: one objective a step, and no more."""

import dataclasses

import jax
import numpy as np
import pytest

import bilevel_jax as bj
from experiments import harness
from experiments.benchmarks import lm, measure

SETTINGS = dataclasses.replace(
  lm.PRESETS['smoke'], refresh=2, steps=4, rounds=1
)


@pytest.mark.slow
def test_a_step_is_that_of_the_objective_chosen_at_its_price(
  options, results, capsys, monkeypatch
):
  made = {}

  def keep(case, settings, inner=lm.programs):
    made.update(inner(case, settings))
    return made

  monkeypatch.setattr(lm, 'programs', keep)
  lm.main(options(SETTINGS, paper='benchmarks', binary='lm', preset='smoke'))
  metrics = results()['metrics']
  # The compiler counts no operation of the other objective.
  assert abs(metrics['alright/flops_ratio'] - 1) <= lm.BOUND_FLOPS
  assert metrics['mix/flops_ratio'] > 1.3
  assert metrics['dpo/flops'] > 1.5 * metrics['sft/flops']
  assert metrics['alright/temporary_bytes_ratio'] < 1.2
  assert metrics['alright/share'] == 0.5
  assert 0 < metrics['maxright/share'] < 1
  assert 'ALRIGHT / what it chose' in capsys.readouterr().out
  # Losses alone: at the first choice, and every second step.
  counts = bj.counts(made['maxright'].carry[1])
  assert counts['losses/sft'] == 1
  counts = bj.counts(made['maxright_refreshed'].carry[1])
  steps = sum(int(counts[f'gradients/{n}']) for n in lm.NAMES)
  assert counts['losses/dpo'] == -(-steps // 2)


def test_baseline_runs_what_was_chosen():
  case = lm.make_case(SETTINGS)
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


def test_what_is_wrong_is_said():
  for change, words in (
    ({'weights': 'gpt'}, '--weights=gpt'),
    ({'answer': 32}, 'shorter than its row of 32'),
    ({'steps': 5}, '--steps=5: a multiple of the 2'),
  ):
    with pytest.raises(harness.SettingsError, match=words):
      lm.check(dataclasses.replace(SETTINGS, **change))
