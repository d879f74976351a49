"""The benchmark of the unrolled hypergradient, small: memory and equality."""

import dataclasses

import jax
import numpy as np

from experiments import harness
from experiments.benchmarks import measure, unrolled

SETTINGS = unrolled.Settings(
  modes=('mixed',),
  layers=0,  # Cheap to compile.
  width=8,
  heads=2,
  length=32,
  vocabulary=16,
  rows=4,
  steps=3,
  rounds=1,
)


def test_mixed_is_the_same_in_less_memory(tmp_path, capsys):
  options = harness.Options(
    'benchmarks', 'unrolled', 'paper', SETTINGS, str(tmp_path), None, (0,)
  )
  metrics = unrolled.main(options)
  assert metrics['mixed/memory'] < 0.6
  assert metrics['mixed/difference'] <= unrolled.BOUND_DIFFERENCE
  assert 'memory <= 0.2: ' in capsys.readouterr().out


def test_a_decoder_sees_no_later_token():
  settings = dataclasses.replace(SETTINGS, layers=1)
  weights, losses = unrolled.make_decoder(settings)
  rows = unrolled.weighted_sources(settings).batch['train'][:1]
  rows = np.concatenate([rows, rows])
  rows[1, 20] = (rows[1, 20] + 1) % settings.vocabulary
  one, two = np.asarray(jax.jit(losses)(weights, rows))
  differ = np.abs(one - two) > 1e-5  # The loss at t is that of token t + 1.
  assert not differ[:19].any()
  assert differ[19:].all()


def test_bounds_are_those_of_mixed():
  ratio = measure.Ratio(0.9, 0.8, 1.0, 0.9, 0.01, 0.02)
  line = unrolled.Line('mixed', 12.0, 0.15, ratio, 1e-7)
  assert unrolled.as_row(line)['bound'] == (
    'memory <= 0.2: holds, wall <= 0.8: EXCEEDED, difference <= 1e-05: holds'
  )
  assert not unrolled.as_row(line._replace(mode='forward'))['bound']
