"""A binary ended at any moments, and started again: the same results.

By SIGKILL or by SIGTERM, while it compiles, trains, saves or reports. It starts
in a workdir where an earlier run's files became crafted ones: no code in them
runs.
"""

import itertools
import json
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from experiments.harness.app import termination
from tests.faults import binaries, crafted, summary

# All but the one that measures times, for minutes, and one without presets.
NAMES = sorted(
  set(binaries.NAMES)
  - {'experiments.benchmarks.suite', 'experiments.lm.compare'}
)
# Parts of names of measured times.
MEASURED = ('second', 'ms/', 'time_ratio')
# Their threads update in the order in which they come.
UNORDERED = ('experiments.a3c.atari',)
KILLS = 4
SIGNALS = ([signal.SIGKILL], [signal.SIGTERM], [signal.SIGTERM] * 2)
# SIGTERM: before the binary handles it; 0: it had just finished.
ENDS = (-signal.SIGKILL, -signal.SIGTERM, termination.EXIT_STATUS, 0)
# Modes that read what a run has saved.
MODES = {
  'experiments.a3c.atari': ('evaluate',),
  'experiments.a3c.gymnax': ('evaluate', 'render'),
  'experiments.custom_problem': ('evaluate',),
}


def results(folder):
  """The records of all runs and the metrics, without measured times."""
  found = json.loads((folder / 'results.json').read_text())['metrics']
  metrics = {
    k: v for k, v in found.items() if not any(part in k for part in MEASURED)
  }
  records = {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob('metrics.jsonl'))
    if 'damaged' not in path.parts
  }
  return metrics, records


def end(process, after, how):
  """Ends a process after some seconds; returns its exit status."""
  process.join(after)
  for number in how:
    if process.is_alive():
      (process.kill if number == signal.SIGKILL else process.terminate)()
      process.join(0.2)
  process.join(300)
  process.kill()
  return process.exitcode


def killed(name, folder, seconds):
  """Kills a binary some times; what is wrong with each of its ends."""
  draw, faults = random.Random(name), []
  for how in itertools.islice(itertools.cycle(SIGNALS), KILLS):
    after = draw.uniform(0.1, seconds)
    status = end(binaries.start(name, folder), after, how)
    said = binaries.log(folder).read_text(errors='replace')
    wrong = [] if status in ENDS else [f'status {status} after {after:.1f} s']
    faults.append(wrong + [said] * ('Traceback' in said))
  return faults


def crafted_copy(whole, folder, marker):
  """Copies a workdir, and replaces all of its files by crafted ones."""
  shutil.copytree(whole, folder)
  for path in sorted(folder.rglob('*')):
    if path.is_file():
      crafted.replace(path, marker)


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_crafted_and_killed(tmp_path, name):
  whole, folder = tmp_path / 'whole', tmp_path / 'killed'
  marker = tmp_path / 'marker'
  status, said, seconds = binaries.finish(name, whole)
  assert status == 0, said
  crafted_copy(whole, folder, marker)
  code = []
  for mode in MODES.get(name, ()):
    status, said, _ = binaries.finish(name, folder, mode)
    refused = status == 1 and 'Traceback' not in said
    code.append([] if refused else [f'{mode}: status {status}: {said}'])

  faults = killed(name, folder, seconds)
  status, said, _ = binaries.finish(name, folder)
  if status:
    faults[-1].append(f'run again: {said}')
  elif name not in UNORDERED and results(folder) != results(whole):
    faults[-1].append('other results')
  code.append(['its code ran'] * marker.exists())
  summary.record('Files of a workdir hold code', name, code)
  summary.record('SIGKILL or SIGTERM at a random moment', name, faults)


@pytest.mark.slow
def test_the_command_of_the_example_to_copy(tmp_path):
  """By its command, not forked: it is killed while it is imported, too."""
  name, draw = 'experiments.custom_problem', random.Random(0)

  def start(workdir):
    command = [sys.executable, '-m', name, '--preset=smoke', '--seeds=1']
    return subprocess.Popen(
      [*command, '--save_seconds=0', f'--workdir={workdir}'],
      cwd=binaries.ROOT,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    )

  def finish(process):
    _, said = process.communicate(timeout=900)
    return process.returncode, said

  since = time.monotonic()
  assert finish(start(tmp_path / 'whole'))[0] == 0
  seconds = time.monotonic() - since
  process = start(tmp_path / 'killed')
  time.sleep(draw.uniform(0.3, seconds))
  process.send_signal(draw.choice(SIGNALS)[0])
  status, said = finish(process)
  assert status in ENDS and 'Traceback' not in said
  status, said = finish(start(tmp_path / 'killed'))
  assert status == 0, said
  assert results(tmp_path / 'killed') == results(tmp_path / 'whole')
