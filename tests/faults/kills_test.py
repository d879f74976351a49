"""A binary ended at any moments, and started again: the same results.

By SIGKILL, or by SIGTERM, once or twice, while it is imported, compiles,
trains, saves or reports.
"""

import importlib
import json
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from experiments.harness.app import termination

ROOT = pathlib.Path(__file__).parents[2]
BINARIES = [
  '.'.join(path.relative_to(ROOT).with_suffix('').parts)
  for path in sorted((ROOT / 'experiments').rglob('*.py'))
  if "'smoke': Settings" in path.read_text()
]


def start(name, workdir, *flags):
  return subprocess.Popen(
    [
      *(sys.executable, '-m', name, '--preset=smoke', '--save_seconds=0'),
      *(f'--workdir={workdir}', *flags),
    ],
    cwd=ROOT,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(process):
  _, said = process.communicate(timeout=900)
  assert process.returncode == 0, said


def end(process, after, how):
  """Ends a process after some seconds."""
  time.sleep(after)
  for number in how:
    process.send_signal(number)
    time.sleep(0.2)
  _, said = process.communicate(timeout=300)
  # -SIGTERM: while it was imported; 0: it had just finished.
  ends = -signal.SIGKILL, -signal.SIGTERM, termination.EXIT_STATUS, 0
  assert process.returncode in ends
  assert 'Traceback' not in said, said


def results(folder):
  """The records of all runs and the metrics, without measured times."""
  found = json.loads((folder / 'results.json').read_text())['metrics']
  metrics = {k: v for k, v in found.items() if 'second' not in k}
  records = {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob('metrics.jsonl'))
  }
  return metrics, records


def compare(name, tmp_path, *flags, kills, seed):
  draw = random.Random(f'{name} {seed}')
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  since = time.monotonic()
  finish(start(name, whole, *flags))
  lasts = time.monotonic() - since
  for _ in range(kills):
    how = draw.choice(
      [[signal.SIGKILL], [signal.SIGTERM], [signal.SIGTERM] * 2]
    )
    end(start(name, killed, *flags), draw.uniform(0.3, lasts), how)
  finish(start(name, killed, *flags))
  assert results(killed) == results(whole)


@pytest.mark.slow
def test_the_example_to_copy(tmp_path):
  compare('experiments.custom_problem', tmp_path, '--seeds=1', kills=1, seed=0)


@pytest.mark.nightly
@pytest.mark.parametrize('name', BINARIES)
@pytest.mark.parametrize('seed', range(2))
def test_every_smoke(tmp_path, name, seed):
  assert 'smoke' in importlib.import_module(name).PRESETS
  compare(name, tmp_path, kills=4, seed=seed)
