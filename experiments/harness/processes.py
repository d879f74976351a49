"""Several processes of one run: how they find each other."""

import os
from collections.abc import Mapping

import jax

from experiments.harness import errors


def join(environment: Mapping[str, str] = os.environ) -> None:
  """Joins this process to the others of the run, for one mesh of all devices.

  SLURM, Open MPI and Kubernetes are detected by jax. Elsewhere each process
  is told by JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES
  and JAX_PROCESS_ID.

  Args:
    environment: environment variables.

  Raises:
    SettingsError: if jax cannot tell which processes there are.
  """
  given = {
    name: int(environment[variable])
    for name, variable in (
      ('num_processes', 'JAX_NUM_PROCESSES'),
      ('process_id', 'JAX_PROCESS_ID'),
    )
    if variable in environment
  }
  # Processors talk to each other by gloo; accelerators have their own way.
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  try:
    jax.distributed.initialize(**given)
  except ValueError as error:
    raise errors.SettingsError(
      f'--distributed found no other processes ({error}). Start it by SLURM, '
      'Open MPI or Kubernetes, or set JAX_COORDINATOR_ADDRESS, '
      'JAX_NUM_PROCESSES and JAX_PROCESS_ID for each process.'
    ) from error
