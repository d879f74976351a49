"""Each call that writes fails, one after the other, and loses nothing.

The run either ends in one line or does without the call. What it has written
can be read, and the same command then gives the results of an undisturbed run
to the bit. Calls of native code fail too: see `syscalls`.
"""

import itertools

import pytest

from tests.faults import lab as lab_lib
from tests.faults import summary, syscalls

pytestmark = pytest.mark.slow

CALLS = {
  'write': 'write (no space)',
  'sync': 'fsync (input/output error)',
  'rename': 'rename (input/output error)',
  'mkdir': 'mkdir (no space)',
  'unlink': 'deletion (no permission)',
  'open': 'open (too many open files)',
}


@pytest.mark.parametrize('kind', CALLS)
def test_a_call_fails(lab, kind):
  lab.whole()
  faults = []
  for number in itertools.count(1):
    workdir = lab_lib.fresh(lab.folder)
    lab.calls.arm(syscalls.Fault(kind, number, syscalls.ERRORS[kind]))
    answer = lab.order('attempt', workdir)
    path, _ = lab.calls.fired, lab.calls.arm(None)
    if not path:
      break
    wrong = lab.judge(workdir, answer)
    faults.append([f'{path}: {line}' for line in wrong])
  assert number > 10
  summary.record(f'The n-th {CALLS[kind]} fails, each n', 'a run', faults)


def test_killed_before_a_call(tmp_path):
  """Power off at the moment of a call, for some calls of each kind."""
  faults = []
  with lab_lib.lab(tmp_path, 'fork') as lab:
    lab.calls.arm(None)
    lab.whole()
    counts = dict(lab.calls.counts)
    for kind in ('write', 'sync', 'rename', 'unlink'):
      for number in range(1, counts[kind], 16):
        workdir = lab_lib.fresh(tmp_path)
        lab.calls.arm(syscalls.Fault(kind, number, 0))
        answer = lab.order('attempt', workdir)
        path, _ = lab.calls.fired, lab.calls.arm(None)
        assert answer['end'] == 'killed' or not path
        wrong = lab.judge(workdir, answer)
        faults.append([f'{kind} of {path}: {line}' for line in wrong])
  summary.record('SIGKILL before a call that writes', 'a run', faults)
