"""Tests of SIGTERM: at any moment of a run, and more than once."""

import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from experiments import harness
from experiments.harness.app import termination
from experiments.harness.store import checkpoints, records

ROOT = pathlib.Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def handler_is_put_back():
  before = signal.getsignal(signal.SIGTERM)
  yield
  signal.signal(signal.SIGTERM, before)


def terminate():
  signal.raise_signal(signal.SIGTERM)


class TestDeferred:
  def test_is_obeyed_at_the_end_even_if_nobody_asks(self):
    with pytest.raises(SystemExit) as left, termination.deferred() as received:
      terminate()
      assert received()
    assert left.value.code == termination.EXIT_STATUS == 75
    terminate()  # The process is on its way out: nothing happens.

  def test_without_a_signal_the_former_handler_is_back(self):
    seen = []
    signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    with termination.deferred() as received:
      assert not received()
    terminate()
    assert seen == [1]

  def test_one_signal_within_the_handler_of_another(self):
    """It is not to wait for a lock that the interrupted one holds."""
    left, late = 50, []

    def again(frame, event, arg):
      nonlocal left
      left -= 1
      if left > 0:
        terminate()
      return again

    def give_up(number, frame):
      late.append(number)
      raise TimeoutError

    before = signal.signal(signal.SIGALRM, give_up)
    try:
      with pytest.raises(SystemExit), termination.deferred() as received:
        signal.setitimer(signal.ITIMER_REAL, 10)
        sys.settrace(again)
        terminate()
        sys.settrace(None)
        assert received()
      assert not late
    finally:
      sys.settrace(None)
      signal.setitimer(signal.ITIMER_REAL, 0)
      signal.signal(signal.SIGALRM, before)

  def test_an_error_beside_it_is_still_told(self, capsys):
    with pytest.raises(SystemExit) as left, termination.deferred():
      terminate()
      raise harness.WriteError('the disk is full')
    assert left.value.code == termination.EXIT_STATUS
    assert capsys.readouterr().err == 'the disk is full\n'

  def test_in_another_thread_the_signal_keeps_its_effect(self):
    def work():
      with termination.deferred() as received:
        assert not received()

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
@pytest.mark.parametrize(
  ('owner', 'method'),
  [
    (checkpoints.Checkpoints, 'restore'),
    (checkpoints.Checkpoints, 'wait'),  # The last save is under way.
    (checkpoints.Checkpoints, 'close'),
    (records.MetricsWriter, 'close'),
  ],
)
def test_at_any_moment_of_a_run(train, monkeypatch, owner, method):
  """Twice while `method` runs: it must end by 75, with all saved."""
  original = getattr(owner, method)

  def interrupted(*args, **kwargs):
    terminate()
    result = original(*args, **kwargs)
    terminate()
    return result

  with monkeypatch.context() as patched:
    patched.setattr(owner, method, interrupted)
    with pytest.raises(SystemExit) as left:
      train(steps=20)
  assert left.value.code == termination.EXIT_STATUS
  assert train(steps=20).step == 20


@pytest.mark.parametrize('seconds', [0.3, 1.0])
def test_while_a_binary_is_imported(tmp_path, seconds):
  """The signal itself ends it, or `harness.run` does by 75."""
  process = subprocess.Popen(
    [
      sys.executable,
      *('-m', 'experiments.custom_problem', f'--workdir={tmp_path}'),
    ],
    cwd=ROOT,
    stderr=subprocess.PIPE,
    text=True,
  )
  time.sleep(seconds)
  process.terminate()
  _, said = process.communicate(timeout=60)
  ends = -signal.SIGTERM, termination.EXIT_STATUS
  assert process.returncode in ends, said
  assert 'Traceback' not in said
