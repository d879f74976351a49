"""Tests of the local launcher."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import yaml

from experiments.cluster import local

FOLDER = pathlib.Path(local.__file__).parent
ROOT = FOLDER.parents[1]
PRINT = (
  'import os; names = ("JAX_PROCESS_ID", "JAX_NUM_PROCESSES", '
  '"JAX_COORDINATOR_ADDRESS", "XLA_FLAGS"); '
  'line = " ".join(os.environ[n] for n in names); '
  'os.write(1, (line + chr(10)).encode())'
)


def start(*words, **given):
  return subprocess.Popen(
    [sys.executable, FOLDER / 'local.py', *words],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    **given,
  )


def test_each_process_gets_its_number_and_all_the_same_address():
  env = os.environ | {'XLA_FLAGS': '--a', 'HTTP_PROXY': 'x'}
  process = start(
    '--processes=3', '--devices=2', '--', 'python', '-c', PRINT, env=env
  )
  lines = [line.split() for line in process.communicate()[0].splitlines()]
  assert process.returncode == 0
  assert sorted(line[0] for line in lines) == ['0', '1', '2']
  (rest,) = {tuple(line[1:]) for line in lines}
  assert rest[0] == '3' and rest[1].startswith('localhost:')
  assert rest[2:] == ('--a', '--xla_force_host_platform_device_count=2')
  assert all('HTTP_PROXY' not in one for one in local.environments(2, base=env))


def test_the_status_is_that_of_the_first_failure():
  script = 'import os, sys; sys.exit(3 * int(os.environ["JAX_PROCESS_ID"]))'
  process = start('--', 'python', '-c', script)
  process.communicate()
  assert process.returncode == 3


def test_sigterm_goes_to_all_processes(tmp_path):
  script = (
    'import os, pathlib, signal, sys, time\n'
    'signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n'
    f'pathlib.Path({str(tmp_path)!r}, os.environ["JAX_PROCESS_ID"]).touch()\n'
    'time.sleep(600)'
  )
  process = start('--', 'python', '-c', script)
  while len(list(tmp_path.iterdir())) < 2 and process.poll() is None:
    time.sleep(0.01)
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=60)
  assert process.returncode == 75


@pytest.mark.parametrize(
  ('words', 'reason'),
  [
    (('--processes=0', '--', 'x'), '--processes must be at least 1'),
    (('--', 'no_such_program'), 'cannot start no_such_program'),
  ],
)
def test_wrong_arguments_are_named(words, reason, capsys):
  with pytest.raises(SystemExit):
    local.main(words)
  assert reason in capsys.readouterr().err


def test_the_job_set_is_consistent():
  text = (FOLDER / 'jobset.yaml').read_text()
  spec = yaml.safe_load(text)
  (job,) = spec['spec']['replicatedJobs']
  inner = job['template']['spec']
  (container,) = inner['template']['spec']['containers']
  values = {x['name']: x.get('value') for x in container['env']}
  name = spec['metadata']['name']
  assert int(values['JAX_NUM_PROCESSES']) == inner['completions']
  assert inner['completions'] == inner['parallelism']
  host, _, port = values['JAX_COORDINATOR_ADDRESS'].partition(':')
  assert host == f'{name}-{job["name"]}-0-0.{name}'
  assert int(port) == container['ports'][0]['containerPort']
  assert '--distributed' in container['command']


@pytest.mark.parametrize(
  ('status', 'requeued'), [(0, False), (75, True), (1, False)]
)
def test_the_slurm_script_queues_again_what_has_saved(
  tmp_path, status, requeued
):
  for name, text in (
    ('srun', f'echo "$@" > {tmp_path}/srun.txt; exit {status}'),
    ('scontrol', f'echo "$@" > {tmp_path}/scontrol.txt'),
  ):
    (tmp_path / name).write_text(f'#!/bin/sh\n{text}\n')
    (tmp_path / name).chmod(0o755)
  env = {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'SLURM_JOB_ID': '7'}
  words = ['python', '-m', 'experiments.xright.train', '--workdir=a b']
  run = subprocess.run(['bash', FOLDER / 'slurm.sh', *words], env=env)
  assert run.returncode == status
  sent = (tmp_path / 'srun.txt').read_text()
  assert sent.endswith('experiments.xright.train --workdir=a b --distributed\n')
  queued = tmp_path / 'scontrol.txt'
  assert queued.exists() == requeued
  assert not requeued or queued.read_text() == 'requeue 7\n'
