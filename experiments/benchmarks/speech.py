"""Steps of speech recognition: joint steps compared with supervised ones.

A joint step has two losses on two batches, so about twice the cost. The audio
is noise with the lengths of digit strings, since the cost does not depend on
the content. Decoding and a supervised step are compared with the duration of
the audio. `programs` counts the compiled programs of a run (length buckets
times kinds of steps), `padding` is the fraction of computation on padding.
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import measure
from experiments.bl_just import methods
from experiments.speech import decoding, feed, front_end, objectives, recogniser

JOINT_BOUND = 2.2


class Sizes(NamedTuple):
  """Sizes of the model and the data.

  Attributes:
    encoder: kind of the encoder.
    width: width of its layers.
    depth: layers after the strided ones.
    rate: samples per second.
    mels: mel bands.
    units: number of labels.
    utterances: number of utterances, of 1.3 to 4 seconds.
    batch_size: utterances in a batch of each loss.
    buckets: number of length buckets.
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


def make_examples(sizes: Sizes) -> feed.Examples:
  """Makes utterances of noise with four labels each."""
  rng = np.random.default_rng(0)
  seconds = rng.uniform(1.3, 4.0, sizes.utterances)
  lengths = (seconds * sizes.rate).astype(np.int64)
  audio = [rng.normal(size=n).astype(np.float32) for n in lengths]
  labels = [rng.integers(1, sizes.units, 4).astype(np.int32) for _ in lengths]
  names = [str(i) for i in range(len(lengths))]
  return feed.Examples(audio.__getitem__, lengths, labels, names, names)


def programs(
  network: recogniser.Recogniser, batch: Any, plan: np.ndarray
) -> dict[str, measure.Program]:
  """Compiles a step of each kind on the same batch."""
  training = recogniser.Training(objectives.Ssl(), front_end.Masks(), 0.1)
  solver = methods.solver(
    'bl_just',
    plan,
    methods.StepSizes(1e-3, 1e-3, 1e-4, 0.3),
    lambda z, part: network.ctc(training, z, part),
    lambda z, part: network.ssl(training, z, part),
  )
  params = network.init(jax.random.key(0), training.ssl)
  key = jax.random.key(1)
  batch = {loss: part | {'key': key} for loss, part in batch.items()}
  batch['ssl']['fixed'] = recogniser.quantiser(training, network, key)

  return {
    name: measure.solver_program(solver, params, {n: batch[n] for n in losses})
    for name, losses in (
      ('supervised', ('ctc',)),
      ('joint', ('ctc', 'ssl')),
      ('exploration', ('ssl',)),
    )
  }


def count_programs(stream: feed.Feed, steps: int) -> int:
  """Counts the programs that a run compiles: one per shape of a batch."""
  shapes = set()
  for step in range(steps):
    leaves, structure = jax.tree.flatten(stream.batch(step))
    shapes.add((structure, tuple(leaf.shape for leaf in leaves)))
  return len(shapes)


def make_case(sizes: Sizes) -> tuple[Any, ...]:
  """Makes the network, a batch of both losses, the plan and the feed."""
  examples = make_examples(sizes)
  plan = methods.plan('bl_just', 60, methods.Shares())
  every = np.arange(sizes.utterances)
  stream = feed.Feed(
    examples,
    {'ctc': [every], 'ssl': [every]},
    plan,
    edges=feed.bucket_edges(examples.lengths, sizes.buckets, 80),
    batch_size=sizes.batch_size,
    seeds=(0,),
  )
  network = recogniser.Recogniser(
    recogniser.Shape(
      sizes.encoder,
      sizes.width,
      sizes.depth,
      (2, 2, 2),
      5,
      4,
      False,
      sizes.units,
      front_end.FrontEnd(sizes.rate, sizes.mels),
    )
  )
  joint = int(np.flatnonzero(plan == feed.STEPS.index(('ctc', 'ssl')))[0])
  batch = feed.select_member(stream.batch(joint), 0)
  return network, jax.tree.map(jnp.asarray, batch), plan, stream


def _steps(name, sizes, context):
  """Compares a step with a supervised one and the duration of the audio."""
  network, batch, plan, stream = make_case(sizes)
  steps = programs(network, batch, plan)
  numbers = measure.compare(steps[name], steps['supervised'], context, steps=1)
  seconds = float(batch['ctc']['length'].sum()) / sizes.rate
  return numbers | {
    'real_time': numbers['seconds'] / seconds,
    'real_time/supervised': numbers['base_seconds'] / seconds,
    'programs': count_programs(stream, len(plan)),
    'padding': stream.waste(),
  }


def _decoding(width, sizes, context):
  """Compares greedy or beam decoding with the duration of the audio."""
  network, batch, _, _ = make_case(sizes)
  params = network.init(jax.random.key(0), objectives.Ssl())
  audio, length = batch['ctc']['audio'], batch['ctc']['length']
  seconds = float(length.sum()) / sizes.rate
  times = []
  for _ in range(context.rounds + 1):
    wall, cpu = time.perf_counter(), time.process_time()
    _, logits, frames = network.outputs(params, audio, length)
    arguments = np.asarray(logits), np.asarray(frames)
    if width == 1:
      decoding.greedy(*arguments)
    else:
      decoding.decode(*arguments, width=width)
    times.append((time.perf_counter() - wall, time.process_time() - cpu))
  wall, cpu = np.median(times[1:], axis=0) / seconds  # The first one compiles.
  return {'wall': float(wall), 'cpu': float(cpu), 'seconds': wall * seconds}


def rows(preset: str) -> Sequence[measure.Row]:
  """Returns the comparisons."""
  sizes = Sizes()
  if preset == 'smoke':
    sizes = Sizes(width=8, depth=1, utterances=8, batch_size=2)
  every = measure.Rows()
  for name, bounds in (('joint', {'cpu': JOINT_BOUND}), ('exploration', {})):
    what = f'{name} step / supervised step'
    every.add(f'speech/{name}', what, _steps, name, sizes, **bounds)
  for width in (1, 16):
    what = f'decoding, beam of {width} / duration of the audio'
    every.add(f'speech/decoding/{width}', what, _decoding, width, sizes)
  return every
