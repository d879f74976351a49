"""Two processes of four devices each run as one process of eight does."""

import signal

import numpy as np
import pytest

from experiments import harness
from experiments.harness.app import processes as join
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
  seed, _, scale = (options.data_dir or '0,1').partition(',')
  scale = float(scale)
  rows = np.random.default_rng(int(seed)).normal(size=(64, 5))
  rows = rows.astype(np.float32)
  trained = harness.train(
    optax.chain(
      bj.gradient(lambda p, batch: scale * jnp.mean((batch @ p - 1) ** 2)),
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
  assert_same_metrics(one, two)


@pytest.mark.slow
@pytest.mark.parametrize(('count', 'victim'), [(2, 1), (2, 0), (4, 2)])
def test_one_is_killed_and_the_others_say_which(tmp_path, count, victim):
  arguments = SCRIPT, f'--workdir={tmp_path}', '--distributed'
  kill_one(tmp_path, count, victim)
  processes.finish(processes.start(*arguments, count=count))
  records = tmp_path / 'run' / 'metrics.jsonl'
  steps = [record['step'] for record in harness.read_records(records)]
  assert steps == [5 * i for i in range(1, 7)]


def kill_one(workdir, count, victim):
  """Kills a process of a run, which the others have to name."""
  every = processes.start(
    *(SCRIPT, f'--workdir={workdir}', '--distributed', '--pause=0.3'),
    '--heartbeat_timeout=20',
    count=count,
  )
  processes.wait_for_lines(every[0], workdir / 'run' / 'metrics.jsonl', 2)
  killed = every.pop(victim)
  killed.kill()
  for process in every:
    _, said = process.communicate(timeout=600)
    assert process.returncode == termination.EXIT_STATUS, said
    assert said.count('\n') == 1
    assert said.startswith(f'process {victim} of the run is gone')
  killed.communicate()


@pytest.mark.slow
@pytest.mark.parametrize('count', [1, 4])
def test_what_two_processes_saved_is_restored_on_others(tmp_path, count):
  """Also after one of the two was killed."""
  whole, moved = tmp_path / 'whole', tmp_path / 'moved'
  run_here(whole)
  kill_one(moved, 2, 1)
  records = moved / 'run' / 'metrics.jsonl'
  before = records.read_bytes().splitlines()[:2]
  if count == 1:
    run_here(moved)
  else:
    arguments = SCRIPT, f'--workdir={moved}', '--distributed'
    processes.finish(processes.start(*arguments, count=count))
  assert records.read_bytes().splitlines()[:2] == before
  steps = [record['step'] for record in harness.read_records(records)]
  assert steps == [5 * i for i in range(1, 7)]
  assert_same_metrics(whole, moved)


def assert_same_metrics(one, other, ignored=()):
  """Equal up to rounding, which depends on where sums are split."""
  metrics = [
    harness.read_results(folder / 'results.json')['metrics']
    for folder in (one, other)
  ]
  for each in metrics:
    for name in ignored:
      each.pop(name)
  assert list(metrics[0]) == list(metrics[1])
  np.testing.assert_allclose(
    list(metrics[1].values()), list(metrics[0].values()), 1e-5, 1e-6
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  ('last', 'told'),
  [
    ('--pause=0.1', 'flags: --pause is None in process 0 and 0.1 in process 1'),
    ('--data_dir=1,1', 'runs run: train.data is '),
    ('--data_dir=0,2', 'programs of run: the step is '),
  ],
)
def test_processes_that_differ_end_at_once(tmp_path, last, told):
  """They would wait for each other for ever."""
  arguments = SCRIPT, f'--workdir={tmp_path}', '--distributed'
  both = processes.start(*arguments, count=2, last=[last])
  for _, said in processes.finish(both, 1):
    assert said.count('\n') == 1
    assert f'the processes of the run have different {told}' in said
  assert not (tmp_path / 'run' / 'metrics.jsonl').exists()


@pytest.mark.slow
def test_a_process_that_never_joins_ends_the_others(tmp_path):
  """For instance since its flags are invalid."""
  first, last = processes.start(
    *(SCRIPT, f'--workdir={tmp_path}', '--distributed'),
    '--heartbeat_timeout=4',
    count=2,
    last=['--steps=1'],
  )
  (_, said), (_, other) = (x.communicate(timeout=600) for x in (first, last))
  assert first.returncode == termination.EXIT_STATUS, said
  assert said.count('\n') == 1
  assert said.startswith('a process of the run is gone (see its output)')
  assert "Unknown command line flag 'steps'" in other


@pytest.mark.slow
def test_compiled_environments_in_two_processes_equal_one(tmp_path):
  """Importing gymnax starts XLA, which has to wait for the others."""
  small = [
    *('--preset=smoke', '--workers=2', '--environments=2', '--rollout=5'),
    *('--frames=200', '--records=2', '--window=5'),
  ]
  one, two = tmp_path / 'one', tmp_path / 'two'
  # One device for each: orthogonal weights need factorisations, which deadlock
  # on several virtual devices.
  for count, workdir, more in ((1, one, ()), (2, two, ('--distributed',))):
    arguments = *small, f'--workdir={workdir}', *more
    processes.finish(
      processes.start(
        'experiments.a3c.gymnax', *arguments, count=count, devices=count
      )
    )
  assert_same_metrics(one, two, ['frames_per_second/round_robin'])


@pytest.mark.parametrize('name', ['JAX_NUM_PROCESSES', 'JAX_PROCESS_ID'])
def test_a_variable_that_is_no_integer_is_named(name):
  with pytest.raises(harness.SettingsError, match=f"{name} is 'abc': give an"):
    join.join(environment={name: 'abc'})


def test_an_address_without_a_port_is_named():
  name = 'JAX_COORDINATOR_ADDRESS'
  with pytest.raises(harness.SettingsError, match=f"{name} is 'a': give host:"):
    join.join(environment={name: 'a'})


def test_without_other_processes_says_how_to_start_them(tmp_path):
  process = processes.start(SCRIPT, f'--workdir={tmp_path}', '--distributed')
  ((_, said),) = processes.finish(process, 1)
  assert said.startswith('tests/processes: --distributed found no')
  assert 'JAX_COORDINATOR_ADDRESS' in said
