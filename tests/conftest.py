"""What has to be set before jax is imported, and how properties are drawn."""

import os

# Eight virtual devices, for the data-parallel tests.
os.environ['XLA_FLAGS'] = ' '.join(
  [
    os.environ.get('XLA_FLAGS', ''),
    '--xla_force_host_platform_device_count=8',
  ]
).strip()
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile(
  'same_every_time', deadline=None, derandomize=True, max_examples=25
)
hypothesis.settings.load_profile('same_every_time')


@pytest.fixture
def x64():
  """Double precision, for finite differences and closed forms."""
  with jax.enable_x64(True):
    yield
