"""What has to be set before jax is imported, and how properties are drawn."""

import os

os.environ['XLA_FLAGS'] = ' '.join(
  [
    # Programs here are run a few times: compiling is most of the time.
    '--xla_backend_optimization_level=0',
    '--xla_llvm_disable_expensive_passes=true',
    '--xla_cpu_use_fusion_emitters=false',
    '--xla_cpu_parallel_codegen_split_count=1',
    # Eight virtual devices, for the data-parallel tests.
    '--xla_force_host_platform_device_count=8',
    os.environ.get('XLA_FLAGS', ''),
  ]
).strip()
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import hypothesis
import jax
import pytest

from tests import memory, perturbed

if perturbed.ACTIVE:
  perturbed.install()

hypothesis.settings.register_profile(
  'same_every_time', deadline=None, derandomize=True, max_examples=25
)
hypothesis.settings.load_profile('same_every_time')


@pytest.fixture
def x64():
  """Double precision, for finite differences and closed forms."""
  with jax.enable_x64(True):
    yield


@pytest.fixture(autouse=True, scope='module')
def _release_memory():
  """Compiled programs of one module of tests are no use to the next."""
  yield
  memory.release()


def pytest_configure(config):
  """With `-n`, a module of tests is one worker's: it shares what it compiles.

  A row of the contract is a test by itself.
  """
  if getattr(config.option, 'dist', 'no') == 'load':
    config.option.dist = 'loadgroup'


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
  if not hasattr(config.option, 'dist'):
    return
  for item in items:
    if item.path.name != 'contract_test.py':
      item.add_marker(pytest.mark.xdist_group(item.path.name))
