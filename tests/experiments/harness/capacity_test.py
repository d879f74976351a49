"""Arrays that exceed the memory are refused before they are made."""

import jax.numpy as jnp
import optax
import pytest

import bilevel_jax as bj
from experiments import harness
from experiments.harness.app import capacity


def test_arrays_are_compared_with_the_memory():
  limit = capacity.capacity()
  assert 2**28 < limit < 2**45
  harness.require_memory(limit, 'rows')
  with pytest.raises(harness.SettingsError, match=r'^rows need .* memory'):
    harness.require_memory(limit + 1, 'rows')


@pytest.mark.parametrize(
  ('size', 'rows', 'message'),
  [
    (2**39, 1, 'params and states of a run need 20,480 GiB'),
    (3, 2**31 - 1, r'array of shape \(2147483647, 2147483647\)'),
  ],
)
def test_sizes_for_which_xla_ends_the_process(size, rows, message, tmp_path):
  """Their bytes exceed 63 bits, or the memory."""

  def loss(p, batch):
    return jnp.sum(jnp.ones((rows, rows)) * p[0]) + jnp.sum(p)

  solver = optax.chain(bj.gradient(loss), optax.trace(0.9))
  with pytest.raises(harness.SettingsError, match=message):
    harness.train(
      solver,
      harness.Task(lambda context: jnp.zeros(size)),
      harness.Training(1, chunk=1, seeds=5, workdir=tmp_path),
    )
