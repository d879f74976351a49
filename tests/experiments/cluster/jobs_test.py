"""Tests of jobs: calls end in any order, and none is left behind."""

import subprocess
import threading
import time

import pytest

from experiments import harness
from experiments.harness.study import jobs


def test_calls_end_in_any_order_and_errors_are_of_their_own_call():
  first = threading.Event()

  def call(item):
    if item == 0:
      first.wait(60)
      raise ValueError('line 1\nthe reason')
    return item * 10

  ended = {}
  for item, job in jobs.run(call, [0, 1], jobs.Plan(jobs=2)):
    ended[item] = job
    first.set()
  assert list(ended) == [1, 0]
  assert ended[1].result() == 10
  with pytest.raises(ValueError, match='the reason') as error:
    ended[0].result()
  assert jobs.describe(error.value) == 'ValueError: the reason'


def test_no_more_calls_run_at_once_than_jobs():
  running, most = [], []

  def call(item):
    running.append(item)
    most.append(len(running))
    time.sleep(0.01)
    running.remove(item)

  assert len(list(jobs.run(call, range(12), jobs.Plan(jobs=3)))) == 12
  assert max(most) <= 3


def test_the_end_of_the_iteration_ends_processes_and_cancels_the_rest():
  processes = []

  def call(item):
    if item:
      processes.append(subprocess.Popen(['sleep', '600']))
      return processes[-1].wait()
    while len(processes) < 2:
      time.sleep(0.01)
    return 0

  def stop():
    for process in processes:
      process.terminate()

  calls = jobs.run(call, range(50), jobs.Plan(jobs=3), stop=stop)
  assert next(calls)[0] == 0
  calls.close()
  assert all(process.poll() is not None for process in processes)
  assert len(processes) <= 4  # One may start in the moment of the end.


def test_options_of_engines():
  parsed = jobs.parse_options(['timeout_min=60', 'num_cpus=0.5', 'account=a=b'])
  assert parsed == {'timeout_min': 60, 'num_cpus': 0.5, 'account': 'a=b'}
  with pytest.raises(harness.SettingsError, match="name=value, got 'gpu'"):
    jobs.parse_options(['gpu'])
  with pytest.raises(harness.SettingsError, match='leave out --engine_options'):
    list(jobs.run(print, [1], jobs.Plan(options={'gpus': 1})))


def test_a_missing_engine_is_named(monkeypatch):
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  for engine in ('slurm', 'ray'):
    with pytest.raises(harness.SettingsError, match=f'the extra `{engine}`'):
      list(jobs.run(print, [1], jobs.Plan(engine)))


def test_unknown_options_of_slurm_are_refused(tmp_path):
  pytest.importorskip('submitit')
  options = {'cluster': 'local', 'no_such_parameter': 1}
  plan = jobs.Plan('slurm', 1, options, tmp_path)
  with pytest.raises(harness.SettingsError, match='no_such_parameter'):
    list(jobs.run(print, [1], plan))
