"""What is set before jax is imported, and what keeps tests quick."""

import gc
import importlib.metadata
import os
import pathlib
import time

os.environ['XLA_FLAGS'] = ' '.join(
  [
    # Programs here are run a few times: compiling is most of the time.
    '--xla_backend_optimization_level=0',
    '--xla_llvm_disable_expensive_passes=true',
    # Later versions end at a flag that they do not know.
    '--xla_cpu_use_fusion_emitters=false'
    if importlib.metadata.version('jaxlib').startswith('0.10.')
    else '',
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

from experiments.harness.app import compile_cache, thunks
from tests import memory, perturbed

# The guard of the binaries, before XLA starts.
thunks.one_by_one()

# Tracing makes many short-lived objects: at Python's own threshold, collecting
# them takes a fifth of the time.
gc.set_threshold(100_000, 20, 50)

if perturbed.ACTIVE:
  perturbed.install()

# Compiled programs are kept from run to run, those of subprocesses too. They
# are keyed by code, flags, jaxlib and processor; `off` compiles all of them.
os.environ.setdefault(
  compile_cache.VARIABLE,
  str(pathlib.Path(compile_cache.default_folder()).with_name('test_programs')),
)
compile_cache.use()

STARTED = time.monotonic()

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
def _keep_programs():
  """Some tests use another folder, or none."""
  compile_cache.use()


@pytest.fixture(autouse=True)
def _release_memory():
  yield
  memory.release()


def pytest_addoption(parser):
  parser.addoption(
    '--minutes',
    type=float,
    default=float('inf'),
    help='no test starts after this many minutes; the others are skipped',
  )


def pytest_collection_finish():
  """Imported modules and collected tests stay: no collection visits them."""
  gc.collect()
  gc.freeze()


def pytest_runtest_setup(item):
  if time.monotonic() - STARTED > 60 * item.config.getoption('--minutes'):
    pytest.skip('no time left (--minutes)')


def pytest_configure(config):
  """With `-n`, a module of tests is one worker's: it shares what it compiles.

  A row of the contract is a test by itself, and so are a binary's kills.
  """
  if getattr(config.option, 'dist', 'no') == 'load':
    config.option.dist = 'loadgroup'


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
  for item in items:
    if item.get_closest_marker('nightly'):
      item.add_marker('slow')
  if not hasattr(config.option, 'dist'):
    return
  for item in items:
    if item.path.name not in ('contract_test.py', 'kills_test.py'):
      module = str(item.path.relative_to(config.rootpath))
      item.add_marker(pytest.mark.xdist_group(module))
