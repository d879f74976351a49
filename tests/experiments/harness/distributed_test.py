"""Two processes of four devices each run as one process of eight does."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments import harness
from experiments.harness import termination

ROOT = pathlib.Path(__file__).parents[3]
SCRIPT = """
import dataclasses, sys, time, typing
import jax, jax.numpy as jnp, numpy as np, optax
import bilevel_jax as bj
from experiments import harness

@dataclasses.dataclass(frozen=True)
class Settings:
  pause: typing.Annotated[float, harness.Allowed(0)] = 0.0

def main(options):
  rows = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)
  trained = harness.train(
    optax.chain(
      bj.gradient(lambda p, batch: jnp.mean((batch @ p - 1) ** 2)),
      optax.adam(0.1)),
    lambda context: jax.random.uniform(context.key, (5,)),
    lambda context: context.data,
    # Not to stop, but to leave time for the signal.
    stop_when=lambda history: time.sleep(options.settings.pause),
    steps=30, chunk=5, seeds=2, data=rows, shard=True,
    workdir=options.workdir, save_seconds=0)
  harness.write_table(options.workdir, [{'devices': jax.device_count()}])
  harness.write_results(
    options, seconds=trained.seconds,
    metrics={f'param/{i}': x for i, x in enumerate(trained.params.ravel())})

if __name__ == '__main__':
  harness.run(main, {'quick': Settings()}, paper='tests', binary='processes')
"""


def run_here(workdir):
  """The script in this process, which has eight devices too."""
  here = {'__name__': 'script'}
  exec(compile(SCRIPT, 'script', 'exec'), here)
  here['main'](
    harness.Options(
      'tests', 'processes', 'quick', here['Settings'](), str(workdir), None, ()
    )
  )


def start(workdir, count, *more):
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  # The proxies of some machines confuse the detection of processes.
  plain = {k: v for k, v in os.environ.items() if 'proxy' not in k.lower()}
  return [
    subprocess.Popen(
      [sys.executable, '-c', SCRIPT, f'--workdir={workdir}', *more],
      cwd=ROOT,
      env=plain
      | {
        # The last one counts.
        'XLA_FLAGS': os.environ['XLA_FLAGS']
        + f' --xla_force_host_platform_device_count={8 // count}',
        'JAX_COORDINATOR_ADDRESS': f'localhost:{port}',
        'JAX_NUM_PROCESSES': str(count),
        'JAX_PROCESS_ID': str(index),
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(count)
  ]


def finish(processes, status=0):
  try:
    said = [process.communicate(timeout=240) for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [p.returncode for p in processes] == [status] * len(processes), said
  return [out for out, _ in said]


def wait_for(records, count, process):
  deadline = time.monotonic() + 240
  while time.monotonic() < deadline and process.poll() is None:
    if records.exists() and records.read_bytes().count(b'\n') >= count:
      break
    time.sleep(0.01)


def test_two_processes_ended_and_resumed_equal_one(tmp_path):
  one, two = tmp_path / 'one', tmp_path / 'two'
  run_here(one)
  processes = start(two, 2, '--distributed', '--pause=0.3')
  records = two / 'run' / 'metrics.jsonl'
  wait_for(records, 2, processes[0])
  processes[1].send_signal(signal.SIGTERM)  # All end if one is told to.
  finish(processes, termination.EXIT_STATUS)
  before = len(harness.read_records(records))
  assert 2 <= before < 6

  printed = finish(start(two, 2, '--distributed'))
  assert 'devices' in printed[0]
  assert 'devices' not in printed[1]  # The first one speaks.
  assert '8' in (two / 'table.md').read_text()
  assert [r['step'] for r in harness.read_records(records)] == [
    5 * i for i in range(1, 7)
  ]
  metrics = [
    harness.read_results(folder / 'results.json')['metrics']
    for folder in (one, two)
  ]
  np.testing.assert_allclose(
    list(metrics[1].values()), list(metrics[0].values()), 1e-5, 1e-6
  )


@pytest.mark.slow
@pytest.mark.parametrize(('count', 'victim'), [(2, 1), (2, 0), (4, 2)])
def test_one_is_killed_and_the_others_say_which(tmp_path, count, victim):
  processes = start(tmp_path, count, '--distributed', '--pause=0.3')
  wait_for(tmp_path / 'run' / 'metrics.jsonl', 2, processes[0])
  killed = processes.pop(victim)
  killed.kill()
  since = time.monotonic()
  for process in processes:
    _, said = process.communicate(timeout=90)
    assert process.returncode == termination.EXIT_STATUS, said
    assert said.count('\n') == 1
    assert said.startswith(f'process {victim} of the run is gone')
  assert time.monotonic() - since < 60
  killed.communicate()
  finish(start(tmp_path, count, '--distributed'))
  records = harness.read_records(tmp_path / 'run' / 'metrics.jsonl')
  assert [r['step'] for r in records] == [5 * i for i in range(1, 7)]


def test_without_other_processes_says_how_to_start_them(tmp_path):
  plain = {k: v for k, v in os.environ.items() if 'proxy' not in k.lower()}
  process = subprocess.run(
    [sys.executable, '-c', SCRIPT, f'--workdir={tmp_path}', '--distributed'],
    cwd=ROOT,
    env=plain,
    capture_output=True,
    text=True,
    timeout=100,
    check=False,
  )
  assert process.returncode == 1
  assert process.stderr.startswith('tests/processes: --distributed found no')
  assert 'JAX_COORDINATOR_ADDRESS' in process.stderr
