"""The flags of precision: one definition for all commands, and its effect."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import harness
from experiments.harness.app import settings as settings_lib
from experiments.lm import array_cache, decoder, precision, tuning
from tests.experiments.lm.decoder_test import SMALL, TOKENS

COMMANDS = (
  'xright.train',
  'xright.pareto',
  'seal.rank',
  'seal.train',
)


def words_of(settings):
  fields = settings_lib.flatten(settings)
  return {name: field.description for name, field in fields.items()}


HELP = words_of(precision.Precision())


@pytest.mark.parametrize('name', COMMANDS)
def test_commands_share_flags_their_help_and_what_is_refused(name):
  module = importlib.import_module(f'experiments.{name}')
  assert set(HELP) == {'compute', 'dtype'} and all(HELP.values())
  for settings in module.PRESETS.values():
    assert isinstance(settings, precision.Precision)
    words = words_of(settings)
    assert {n: words[n] for n in HELP} == HELP
    for field, value in (('compute', 'float64'), ('dtype', 'int8')):
      with pytest.raises(harness.SettingsError) as info:
        settings_lib.override(settings, {field: value})
      expected = f'--{field}={value}: {field} takes one of '
      assert str(info.value).startswith(expected)
      assert str(info.value).endswith('.') and '\n' not in str(info.value)


def test_frozen_layers_compute_in_the_dtype_too(tmp_path):
  """What leaves them, kept in a file, is read back in it."""
  params = dict(decoder.init(SMALL, 0))
  tokens = {'tokens': TOKENS}
  model_cache = lambda: {
    'x': decoder.embed(params, TOKENS, jnp.bfloat16),
    'y': np.ones((2, 3), np.float32),
  }
  arguments = {'names': ('x', 'y'), 'count': 2}
  first = array_cache.load_or_compute(
    tmp_path, 'trunk', '', tokens, model_cache, **arguments
  )
  again = array_cache.load_or_compute(
    tmp_path, 'trunk', '', tokens, None, **arguments
  )
  for name, array in first.items():
    assert again[name].dtype == array.dtype
    np.testing.assert_array_equal(again[name], array)


@pytest.mark.slow
@pytest.mark.parametrize(('rank', 'layers'), [(0, None), (2, 2)])
def test_narrow_weights_are_trained_in_float32(rank, layers):
  params = dict(decoder.init(SMALL, 0, jnp.bfloat16))
  result = {}
  for compute in ('float32', 'bfloat16'):
    how = tuning.Tuning(
      SMALL, rank=rank, layers=layers, dtype=jnp.dtype(compute)
    )
    below, frozen = how.split(params)
    trained = how.init(frozen, jax.random.key(0))
    assert {w.dtype for w in jax.tree.leaves(trained)} == {np.dtype('float32')}
    rows = {'tokens': TOKENS, 'mask': np.ones_like(TOKENS)}
    if below is not None:
      rows['tokens_x'] = decoder.trunk(SMALL, below, TOKENS, how.dtype)
      assert rows['tokens_x'].dtype == how.dtype

    def loss(trained, how=how, frozen=frozen, rows=rows):
      return -how.answers(trained, frozen, rows).mean.mean()

    value, slopes = jax.jit(jax.value_and_grad(loss))(trained)
    assert {w.dtype for w in jax.tree.leaves(slopes)} == {np.dtype('float32')}
    result[compute] = float(value)
  # Bfloat16 has 8 bits: far from equal, and far from wrong.
  difference = abs(result['bfloat16'] - result['float32']) / result['float32']
  assert 0 < difference < 2e-2
