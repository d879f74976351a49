"""Full disks, pauses, clocks that jump, and other runs in the same workdir."""

import random
import resource
import signal
import subprocess
import time

import pytest

from tests.experiments.harness import distributed_test, processes
from tests.faults import lab as lab_lib
from tests.faults import summary, syscalls

pytestmark = pytest.mark.slow


def mount(*arguments):
  command = ['mount', '-t', 'tmpfs', *arguments]
  return subprocess.run(command, capture_output=True, check=False).returncode


@pytest.mark.parametrize(('limit', 'unit'), [('size', 4096), ('nr_inodes', 1)])
def test_a_full_disk(lab, limit, unit):
  """A small file system, of more and more blocks, or files."""
  lab.whole()
  disk = lab.folder / 'disk'
  disk.mkdir(exist_ok=True)
  faults = []
  for number in range(2, 1_000, 3):
    if mount('-o', f'{limit}={number * unit}', 'faults', str(disk)):
      pytest.skip('mounting a file system needs root')
    try:
      answer = lab.order('attempt', disk / 'run')
      assert not mount('-o', f'remount,{limit}={2**16 * unit}', str(disk))
      faults.append(lab.judge(disk / 'run', answer))
    finally:
      subprocess.run(['umount', '--lazy', disk], check=True)
    if answer['end'] == 'finished':
      break
  name = {'size': 'no space', 'nr_inodes': 'no space for files'}[limit]
  summary.record(f'A full disk ({name})', 'a run', faults)


def test_a_limit_on_the_size_of_files(lab):
  lab.whole()
  faults, pid = [], lab.process.pid
  before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
  for number in range(0, 18):
    workdir = lab_lib.fresh(lab.folder)
    small = 2**number, before[1]
    resource.prlimit(pid, resource.RLIMIT_FSIZE, small)
    answer = lab.order('attempt', workdir)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
    faults.append(lab.judge(workdir, answer))
  summary.record('A limit on the size of files', 'a run', faults)


def test_pauses(lab):
  lab.whole()
  draw, faults = random.Random(0), []
  for _ in range(15):
    workdir = lab_lib.fresh(lab.folder)
    lab.send('attempt', workdir)
    for _ in range(3):
      time.sleep(draw.uniform(0, 0.4))
      lab.process.send_signal(signal.SIGSTOP)
      time.sleep(0.2)
      lab.process.send_signal(signal.SIGCONT)
    answer = lab.answer()
    unfinished = [f'{answer}'] * (answer['end'] != 'finished')
    faults.append(unfinished + lab.judge(workdir, answer))
  summary.record('SIGSTOP, later SIGCONT', 'a run', faults)


def test_one_of_two_processes_pauses(tmp_path):
  folders = [tmp_path / 'whole', tmp_path / 'paused']
  for folder in folders:
    both = processes.start(
      *(distributed_test.SCRIPT, f'--workdir={folder}', '--distributed'),
      '--pause=0.2',
      count=2,
    )
    if folder == folders[1]:
      records = folder / 'run' / 'metrics.jsonl'
      processes.wait_for_lines(both[0], records, 2)
      both[1].send_signal(signal.SIGSTOP)
      time.sleep(3)
      both[1].send_signal(signal.SIGCONT)
    processes.finish(both)
  whole, paused = (
    (folder / 'run' / 'metrics.jsonl').read_bytes() for folder in folders
  )
  wrong = ['other records'] * (whole != paused)
  summary.record(
    'SIGSTOP of one process, later SIGCONT', 'two processes', [wrong]
  )


def test_the_clock_jumps(lab):
  """By up to a day in both directions, at each look."""
  lab.whole()
  draw, faults = random.Random(0), []
  for number in range(10):
    workdir = lab_lib.fresh(lab.folder)
    if number % 2:  # And a disturbed run in between.
      at = draw.randint(1, 50)
      lab.calls.arm(syscalls.Fault('write', at, syscalls.ERRORS['write']))
    answer = lab.order('jump', workdir)
    lab.calls.arm(None)
    faults.append(lab.judge(workdir, answer))
  summary.record('The clock jumps by a day, both ways', 'a run', faults)


def test_exit_status_0_implies_own_results(lab):
  """Runs of several flags and data in one workdir, some of them disturbed."""
  draw, faults = random.Random(0), []
  variants = [
    {'steps': steps, 'rate': rate, 'row': row}
    for steps in (2, 3)
    for rate in (0.1, 0.2)
    for row in (0.5, 0.25)
  ]
  for _ in range(20):
    workdir = lab_lib.fresh(lab.folder)
    for _ in range(4):
      settings = draw.choice(variants)
      if draw.random() < 0.5:
        kind = draw.choice(['write', 'rename', 'sync'])
        at = draw.randint(1, 60)
        lab.calls.arm(syscalls.Fault(kind, at, syscalls.ERRORS[kind]))
      answer = lab.order('attempt', workdir, **settings)
      lab.calls.arm(None)
      wrong = [answer['text']] * (answer['end'] == 'traceback')
      if answer['end'] == 'finished':
        whole = lab_lib.contents(lab.whole(**settings))
        own = lab_lib.contents(workdir)
        for name in ('results.json', 'metrics.jsonl', 'table.md', 'score.png'):
          if own[name] != whole[name]:
            wrong.append(f'{settings}: {name} of another run')
      faults.append(wrong)
  summary.record('Other flags or data under the same workdir', 'a run', faults)
