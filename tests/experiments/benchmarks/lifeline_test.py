"""A process and those that it starts end with the one that started it."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[3]
PARENT = """
import signal, sys
from experiments.benchmarks import lifeline
# A shell starts background processes that ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(lifeline.run([sys.executable, '-c', sys.argv[1]]))
"""
CHILD = """
import subprocess, sys
from experiments.benchmarks import lifeline
lifeline.hold()
subprocess.Popen([sys.executable, '-c', {grandchild!r}]).wait()
"""
GRANDCHILD = "import time; print('ready', flush=True); time.sleep(3_600)"


def _start(child):
  return subprocess.Popen(
    [sys.executable, '-c', PARENT, child],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
  )


@pytest.mark.parametrize(
  'number', [signal.SIGTERM, signal.SIGINT, signal.SIGKILL]
)
def test_a_signal_to_the_first_process_ends_all(number):
  parent = _start(CHILD.format(grandchild=GRANDCHILD))
  assert parent.stdout.readline() == 'ready\n'
  parent.send_signal(number)
  # All three processes hold the pipe: it ends with the last one.
  rest, _ = parent.communicate(timeout=120)
  assert rest == '' and parent.returncode


@pytest.mark.parametrize(
  ('child', 'status'),
  [('', 0), ('import sys; sys.exit(3)', 3)],
)
def test_the_exit_status_is_that_of_the_command(child, status):
  hold = 'from experiments.benchmarks import lifeline; lifeline.hold()'
  parent = _start(f'{hold}\n{child}')
  parent.communicate(timeout=120)
  assert parent.returncode == status


def test_a_command_ended_by_a_signal_has_its_negative_number():
  code = (
    'import os, sys\n'
    'from experiments.benchmarks import lifeline\n'
    "kill = 'import os; os.kill(os.getpid(), 9)'\n"
    "print(lifeline.run([sys.executable, '-c', kill]))\n"
  )
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True
  )
  assert done.stdout == f'{-signal.SIGKILL}\n', done.stderr


def test_a_process_started_otherwise_goes_on():
  code = (
    'import os, threading\n'
    'from experiments.benchmarks import lifeline\n'
    'lifeline.hold()\n'
    'print(threading.active_count())\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', code],
    cwd=ROOT,
    env={k: v for k, v in os.environ.items() if 'LIFELINE' not in k},
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
  )
  assert done.stdout == '1\n', done.stderr
