"""What a joint step of speech recognition costs beside a supervised one.

    python -m experiments.benchmarks.bl_just

Expected: a joint step about twice a supervised one: it has two losses, each on
its own batch. Time: 3 minutes on 2 cores.

Audio is noise of the lengths of digit strings, since cost does not depend on
what is said. Beside the ratios it prints how long a second of audio takes, in
training and in decoding, how many programs a run compiles (length buckets times
kinds of steps), and how much of what is computed is padding.
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel_jax as bj
from experiments import harness
from experiments.benchmarks import measure
from experiments.bl_just import (
  decoding,
  feed,
  front_end,
  methods,
  objectives,
  recogniser,
)

JOINT_BOUND = 2.2


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    encoder: its kind.
    width: of its layers.
    depth: layers after the strided ones.
    rate: samples a second.
    mels: bands.
    units: labels.
    utterances: noise of 1.3 to 4 seconds.
    batch_size: of each loss.
    buckets: of lengths.
    rounds: pairs of single steps that are timed.
  """

  encoder: str = 'conv'
  width: int = 96
  depth: int = 6
  rate: int = 8_000
  mels: int = 40
  units: int = 12
  utterances: int = 64
  batch_size: int = 8
  buckets: int = 2
  rounds: int = 21


PRESETS = {'paper': Settings()}


def examples_of(settings: Settings) -> feed.Examples:
  """Noise, with four labels each."""
  rng = np.random.default_rng(0)
  seconds = rng.uniform(1.3, 4.0, settings.utterances)
  lengths = (seconds * settings.rate).astype(np.int64)
  audio = [rng.normal(size=n).astype(np.float32) for n in lengths]
  labels = [
    rng.integers(1, settings.units, 4).astype(np.int32) for _ in lengths
  ]
  names = [str(i) for i in range(len(lengths))]
  return feed.Examples(audio.__getitem__, lengths, labels, names, names)


def programs(
  network: recogniser.Recogniser, batch: Any, plan: np.ndarray
) -> dict[str, measure.Program]:
  """A step of each kind on the same batch."""
  training = recogniser.Training(
    objectives.Task(), front_end.Augmentation(), 0.1
  )
  solver = methods.solver(
    'bl_just',
    plan,
    methods.Steps(1e-3, 1e-3, 1e-4, 0.3),
    lambda z, part: network.ctc(training, z, part),
    lambda z, part: network.ssl(training, z, part),
  )
  params = network.init(jax.random.key(0), training.task)
  key = jax.random.key(1)
  batch = {loss: part | {'key': key} for loss, part in batch.items()}
  batch['ssl']['fixed'] = recogniser.quantiser(training, network, key)

  def step(carry, batch):
    params, state = carry
    updates, state = solver.update(batch, state, params)
    return bj.apply_updates(params, updates), state

  carry = params, solver.init(params)
  return {
    name: measure.Program(step, carry, {loss: batch[loss] for loss in losses})
    for name, losses in (
      ('supervised', ('ctc',)),
      ('joint', ('ctc', 'ssl')),
      ('exploration', ('ssl',)),
    )
  }


def kinds_of_batches(stream: feed.Feed, steps: int) -> int:
  """How many programs a run compiles: one for each shape of a batch."""
  seen = set()
  for step in range(steps):
    leaves, structure = jax.tree.flatten(stream.batch(step))
    seen.add((structure, tuple(leaf.shape for leaf in leaves)))
  return len(seen)


def main(options: harness.Options) -> None:
  """Runs the comparisons and writes a table and results."""
  start = time.monotonic()
  settings = options.settings
  examples = examples_of(settings)
  plan = methods.plan('bl_just', 60, methods.Shares())
  every = np.arange(settings.utterances)
  stream = feed.Feed(
    examples,
    {'ctc': [every], 'ssl': [every]},
    plan,
    edges=feed.edges_of(examples.lengths, settings.buckets, 80),
    batch_size=settings.batch_size,
    seeds=(0,),
  )
  network = recogniser.Recogniser(
    recogniser.Shape(
      settings.encoder,
      settings.width,
      settings.depth,
      (2, 2, 2),
      5,
      4,
      False,
      settings.units,
      front_end.FrontEnd(settings.rate, settings.mels),
    )
  )
  joint = int(np.flatnonzero(plan == feed.STEPS.index(('ctc', 'ssl')))[0])
  batch = feed.of_member(stream.batch(joint), 0)
  made = programs(network, jax.tree.map(jnp.asarray, batch), plan)
  seconds = float(batch['ctc']['length'].sum()) / settings.rate
  metrics: dict[str, float] = {}
  rows = []
  for name, bound in (('joint', JOINT_BOUND), ('exploration', None)):
    # One step a timing: a median over as many steps as there are rounds.
    ratio = measure.time_ratio(
      made[name].run, made['supervised'].run, rounds=settings.rounds, steps=1
    )
    metrics |= {
      f'cpu_ratio/{name}': ratio.cpu,
      f'time_ratio/{name}': ratio.wall,
      f'flops_ratio/{name}': made[name].flops / made['supervised'].flops,
      f'memory_ratio/{name}': made[name].memory / made['supervised'].memory,
      f'real_time_factor/{name}': ratio.seconds / seconds,
    }
    metrics['real_time_factor/supervised'] = ratio.base_seconds / seconds
    rows.append(
      {
        'what': f'{name} step / supervised step',
        'processor time': f'{ratio.cpu:.2f}',
        'time (range)': str(ratio),
        'operations': f'{metrics[f"flops_ratio/{name}"]:.2f}',
        'memory': f'{metrics[f"memory_ratio/{name}"]:.2f}',
        'bound': '-'
        if bound is None
        else f'processor time ≤ {bound}: '
        + ('holds' if ratio.cpu <= bound else 'does not hold'),
      }
    )
  params = network.init(jax.random.key(0), objectives.Task())
  for name, decode in (
    ('greedy', lambda found, out: decoding.greedy(found, out)),
    ('a beam of 16', lambda found, out: decoding.decode(found, out, width=16)),
  ):
    metrics[f'real_time_factor/{name}'] = _decoding(
      network, params, batch['ctc'], decode, seconds
    )
  metrics |= {
    'compiles': kinds_of_batches(stream, len(plan)),
    'buckets': settings.buckets,
    'padding': stream.waste(),
  }
  for name in ('supervised', 'joint', 'exploration', 'greedy', 'a beam of 16'):
    rows.append(
      {
        'what': f'{name}: seconds for a second of audio',
        'time (range)': f'{metrics[f"real_time_factor/{name}"]:.4f}',
      }
    )
  rows.append(
    {
      'what': f'programs of a run, {settings.buckets} buckets by 3 kinds',
      'time (range)': str(metrics['compiles']),
    }
  )
  rows.append({'what': 'padding', 'time (range)': f'{metrics["padding"]:.1%}'})
  harness.write_table(options.workdir, rows)
  path = harness.write_results(
    options, metrics=metrics, seconds=time.monotonic() - start
  )
  print(f'Results: {path}')


def _decoding(network, params, batch, decode, seconds):
  times = []
  for _ in range(4):
    begin = time.monotonic()
    _, found, out = network.outputs(params, batch['audio'], batch['length'])
    decode(np.asarray(found), np.asarray(out))
    times.append(time.monotonic() - begin)
  return float(np.median(times[1:])) / seconds


STUDY = harness.Study(main, PRESETS, paper='benchmarks', binary='bl_just')


if __name__ == '__main__':
  harness.run(STUDY)
