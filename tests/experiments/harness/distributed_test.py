"""Two processes of four devices each run as one process of eight does."""

import signal
import time

import numpy as np
import pytest

from experiments import harness
from experiments.harness.app import termination
from tests.experiments.harness import processes

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
    harness.Task(
      lambda context: jax.random.uniform(context.key, (5,)),
      lambda context: context.data, data=rows, shard=True),
    harness.Training(
      30, chunk=5, seeds=2, workdir=options.workdir, save_seconds=0),
    # Not to stop, but to leave time for the signal.
    harness.Measure(
      stop_when=lambda history: time.sleep(options.settings.pause)))
  harness.write_table(options.workdir, [{'devices': jax.device_count()}])
  harness.write_results(
    options, seconds=trained.seconds,
    metrics={f'param/{i}': x for i, x in enumerate(trained.params.ravel())})

STUDY = harness.Study(
  main, {'quick': Settings()}, paper='tests', binary='processes')


if __name__ == '__main__':
  harness.run(STUDY)
"""


def run_here(workdir):
  """The script in this process, which has eight devices too."""
  here = processes.run_here(SCRIPT)
  here['main'](
    harness.Options(
      'tests', 'processes', 'quick', here['Settings'](), str(workdir), None, ()
    )
  )


@pytest.mark.slow
def test_two_processes_ended_and_resumed_equal_one(tmp_path):
  one, two = tmp_path / 'one', tmp_path / 'two'
  run_here(one)
  arguments = SCRIPT, f'--workdir={two}', '--distributed'
  both = processes.start(*arguments, '--pause=0.3', count=2)
  records = two / 'run' / 'metrics.jsonl'
  processes.wait_for_lines(both[0], records, 2)
  both[1].send_signal(signal.SIGTERM)  # All end if one is told to.
  processes.finish(both, termination.EXIT_STATUS)
  before = len(harness.read_records(records))
  assert 2 <= before < 6

  first, second = processes.finish(processes.start(*arguments, count=2))
  assert 'devices' in first[0]
  assert 'devices' not in second[0]  # The first one speaks.
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
  arguments = SCRIPT, f'--workdir={tmp_path}', '--distributed'
  every = processes.start(*arguments, '--pause=0.3', count=count)
  records = tmp_path / 'run' / 'metrics.jsonl'
  processes.wait_for_lines(every[0], records, 2)
  killed = every.pop(victim)
  killed.kill()
  since = time.monotonic()
  for process in every:
    _, said = process.communicate(timeout=90)
    assert process.returncode == termination.EXIT_STATUS, said
    assert said.count('\n') == 1
    assert said.startswith(f'process {victim} of the run is gone')
  assert time.monotonic() - since < 60
  killed.communicate()
  processes.finish(processes.start(*arguments, count=count))
  steps = [record['step'] for record in harness.read_records(records)]
  assert steps == [5 * i for i in range(1, 7)]


def test_without_other_processes_says_how_to_start_them(tmp_path):
  process = processes.start(SCRIPT, f'--workdir={tmp_path}', '--distributed')
  ((_, said),) = processes.finish(process, 1)
  assert said.startswith('tests/processes: --distributed found no')
  assert 'JAX_COORDINATOR_ADDRESS' in said
