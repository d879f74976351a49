"""Measures communication, memory and weak scaling from compiled programs.

    python -m experiments.cluster.scale --workdir=/tmp/scale
    python -m experiments.tables --store /tmp/scale
    python -m experiments.tables

Expected: each method exchanges as many numbers as its formula says.
Time: smoke and quick a few minutes on 2 cores.

The last two commands store the numbers and fill the tables of docs/scale.md. It
needs no accelerator and no weights: programs are compiled for 8 virtual CPU
devices, and only the small ones of the weak scaling run.
"""

import dataclasses
import os
import time
from typing import Annotated

import jax
import jax.numpy as jnp

from experiments import harness
from experiments.cluster import communication, memory
from experiments.lm import config as config_lib

DEVICES = 8
COUNTS = (1, 2, 4, 8)
_FLAG = 'xla_force_host_platform_device_count'


_KNOWN = harness.Among(
  communication.METHODS,
  {
    'f2sa, one loop': 'F2SA with one step of each lower sequence.',
    'f2sa, two loops': 'F2SA with several steps of each lower sequence.',
  },
)


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    methods: methods whose communication is counted.
    large_model: whether the memory is that of Llama-3-8B, or of a small model.
    scaled_method: method of the weak scaling.
    examples: examples per device in the weak scaling.
    repeats: timed steps in the weak scaling.
  """

  methods: Annotated[tuple[str, ...], _KNOWN] = tuple(communication.METHODS)
  large_model: bool = True
  scaled_method: Annotated[str, _KNOWN] = 'v_pbgd'
  examples: int = 2048
  repeats: int = 50


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    methods=('v_pbgd', 'seal'), large_model=False, examples=64, repeats=2
  ),
}


def add_communication(
  results: harness.Results, methods: tuple[str, ...]
) -> None:
  """Adds predicted and compiled numbers of each method."""
  for name in methods:
    cost = communication.METHODS[name].cost
    exchange = communication.compile_step(name).exchange()
    at = {'part': 'communication', 'name': name}
    results.add(
      at,
      predicted=cost.count(),
      compiled=exchange.bytes // 4,
      scalars=exchange.scalars,
      collectives=exchange.calls,
    )
    results.note(at, {'cost': str(cost)})


def add_memory(results: harness.Results, *, large_model: bool) -> None:
  """Adds the memory of a device by use, GiB."""
  config, sizes = memory.LLAMA_3_8B, memory.Sizes()
  if not large_model:
    config, sizes = config_lib.tiny(64), memory.Sizes(8, 32, 16)
  for name in memory.METHODS:
    step = memory.abstract_step(name, config, sizes, axes=f'fsdp={DEVICES}')
    used = memory.per_device(step, memory.compile_step(step))
    results.add({'part': 'memory', 'name': name}, **used)


def add_scaling(results: harness.Results, settings: Settings) -> None:
  """Adds work, exchange and time of a step with equal work per device."""
  for count in COUNTS:
    compiled = communication.compile_step(
      settings.scaled_method, devices=count, examples=count * settings.examples
    )
    arguments = jax.tree.map(
      lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding),
      compiled.arguments,
    )
    seconds = []
    for _ in range(settings.repeats):
      start = time.monotonic()
      jax.block_until_ready(compiled.step(*arguments))
      seconds.append(time.monotonic() - start)
    results.add(
      {'part': 'scaling', 'name': f'{count} devices'},
      mflop=compiled.step.cost_analysis()['flops'] / 1e6,
      numbers=compiled.exchange().bytes // 4,
      ms=1e3 * min(seconds),
    )


def main(options: harness.Options) -> harness.Report:
  """Compiles and counts."""
  if _FLAG not in os.environ.get('XLA_FLAGS', ''):
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', DEVICES)
  if jax.device_count() != DEVICES:
    raise harness.SettingsError(
      f'{jax.device_count()} devices, but this program needs {DEVICES} virtual '
      f'ones: unset XLA_FLAGS, or set --{_FLAG}={DEVICES} there.'
    )
  settings, results = options.settings, harness.Results()
  add_communication(results, settings.methods)
  add_memory(results, large_model=settings.large_model)
  add_scaling(results, settings)
  return harness.Report(results, rows=('part', 'name'))


STUDY = harness.Study(main, PRESETS)


if __name__ == '__main__':
  harness.run(STUDY)
