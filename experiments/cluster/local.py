r"""Starts a command as several processes of this machine.

    python -m experiments.cluster.local --processes=2 -- \
      python -m experiments.bl_just.train --preset=smoke --distributed

Each process gets the variables by which jax finds the others. `--devices=4`
gives each four virtual CPU devices, to try a program without accelerators. On
SLURM and Kubernetes, see `slurm.sh` and `jobset.yaml` in this folder.

SIGTERM and Ctrl-C go to all processes, which save and end. The exit status is 0
if all succeed, otherwise that of the first process that fails.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

_POLL_SECONDS = 0.05


def environments(
  processes: int,
  devices: int | None = None,
  *,
  base: Mapping[str, str] = os.environ,
) -> list[dict[str, str]]:
  """Makes the environment of each process of a run.

  Args:
    processes: number of processes.
    devices: virtual CPU devices of each; None for the devices of the machine.
    base: variables that all of them get.

  Returns:
    An environment per process.
  """
  # jax would ask a proxy for the other processes.
  common = {k: v for k, v in base.items() if 'proxy' not in k.lower()}
  if devices is not None:
    # XLA takes the last value of a flag.
    count = f'--xla_force_host_platform_device_count={devices}'
    common['XLA_FLAGS'] = f'{common.get("XLA_FLAGS", "")} {count}'.strip()
    common['JAX_PLATFORMS'] = 'cpu'
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  common['JAX_COORDINATOR_ADDRESS'] = f'localhost:{port}'
  common['JAX_NUM_PROCESSES'] = str(processes)
  return [common | {'JAX_PROCESS_ID': str(i)} for i in range(processes)]


def launch(command: Sequence[str], own: Sequence[Mapping[str, str]]) -> int:
  """Runs a command once per environment, and waits for all.

  Args:
    command: the command line.
    own: environments, of `environments`.

  Returns:
    0 if all succeed, otherwise the status of the first that failed.
  """
  started = [subprocess.Popen(command, env=dict(env)) for env in own]

  def forward(number, frame):
    del frame
    for process in started:
      process.send_signal(number)

  before = {n: signal.signal(n, forward) for n in (signal.SIGTERM,)}
  # A terminal sends Ctrl-C to all processes itself.
  before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)
  status, running = 0, list(started)
  try:
    while running:
      for process in [p for p in running if p.poll() is not None]:
        running.remove(process)
        status = status or process.returncode
      time.sleep(_POLL_SECONDS)
  finally:
    for process in running:
      process.kill()
    for number, handler in before.items():
      signal.signal(number, handler)
  return status if status >= 0 else 128 - status


def main(argv: Sequence[str] | None = None) -> int:
  """Parses the flags and starts the processes; returns the exit status."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.cluster.local',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--processes', type=int, default=2, metavar='N')
  parser.add_argument('--devices', type=int, metavar='N')
  parser.add_argument('command', nargs='+', help='the command, after --')
  args = parser.parse_args(argv)
  for name in ('processes', 'devices'):
    value = getattr(args, name)
    if value is not None and value < 1:
      parser.error(f'--{name} must be at least 1, got {value}')
  command = list(args.command)
  if command[0] == 'python':
    command[0] = sys.executable
  try:
    return launch(command, environments(args.processes, args.devices))
  except OSError as error:
    parser.error(f'cannot start {command[0]}: {error.strerror}')


if __name__ == '__main__':
  sys.exit(main())
