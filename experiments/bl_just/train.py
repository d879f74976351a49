"""Joint unsupervised and supervised training of speech recognition.

Paper: Saif, Cui, Shen, Lu, Kingsbury and Chen, Joint Unsupervised and
Supervised Training for Automatic Speech Recognition via Bilevel Optimization,
2024.

    python -m experiments.bl_just.train --dataset=fsdd --preset=quick --data_dir=SPEECH
    python -m experiments.bl_just.train --dataset=an4 --preset=an4_full --data_dir=SPEECH
    python -m experiments.bl_just.train --dataset=folder --preset=user --data_dir=FOLDER

Expected: `quick` 0.04 word error for all methods, converged. AN4: 0.17
supervised. Time: 25 CPU-minutes, and 22 for AN4; `digits` 2 minutes; `few` seven
hours of a core, `an4_grid` ten hours.

Presets: `quick` compares methods on strings of spoken digits, `digits` trains a
recogniser of digits, `few` tunes all methods with few texts, `an4_full` and
`an4_grid` compare on AN4 with all texts and with fractions of them, `paper` is LibriSpeech on an accelerator, `user`
your folder. The upper problem is recognition by connectionist temporal
classification, the lower problem a self-supervised loss of audio; they share an
encoder. Methods are compared at equal numbers of updates, and supervised
training also at the number of gradients of BL-JUST. `SPEECH` has `fsdd.tar.gz`
and `an4_mfcc.tar.gz`, or the folders of LibriSpeech or TED-LIUM. `FOLDER` has
audio files and a file `texts.tsv` with lines `path<TAB>text`.
"""  # noqa: E501

import dataclasses
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness
from experiments.bl_just import methods, presets, speech_report
from experiments.bl_just import problem as problem_lib
from experiments.harness.study import comparison
from experiments.speech import (
  decoding,
  feed,
  front_end,
  picture,
  recogniser,
  utterances,
)

PRESETS, check = presets.PRESETS, presets.check
_TUNING_SEEDS = (1_000_000, 1_000_001)


def run(
  settings: presets.Settings, problem: problem_lib.Problem, job: comparison.Job
) -> harness.Trained:
  """Trains one method with all seeds."""
  plan, numbers = settings.plan(job.method), settings.training
  network, training = problem.network, problem.training
  all_rows = np.arange(len(problem.examples['train'].lengths))
  members = len(job.seeds)
  stream = feed.Feed(
    problem.examples['train'],
    {'ctc': [problem.labelled] * members, 'ssl': [all_rows] * members},
    plan,
    edges=problem.edges,
    batch_size=numbers.batch_size,
    seeds=job.seeds,
  )
  keys = jax.vmap(jax.random.key)(jnp.asarray(job.seeds, jnp.uint32))
  own = {
    'place': jnp.arange(members),
    'fixed': jax.vmap(lambda key: recogniser.quantiser(training, network, key))(
      keys
    ),
  }

  def solver(context):
    hyper = context.hyper
    steps = methods.StepSizes(
      rate=hyper['rate'],
      audio=numbers.audio_rate,
      exploration=numbers.exploration,
      tuning=numbers.tuning_rate,
      penalty=hyper.get('penalty', settings.grid.penalties[0]),
      decay=hyper.get('decay', settings.grid.decays[0]),
      clip=numbers.clip,
    )
    return methods.solver(
      job.method,
      plan,
      steps,
      lambda z, batch: network.ctc(training, z, batch),
      lambda z, batch: network.ssl(training, z, batch),
    )

  def batch(context):
    parts = feed.select_member(context.streamed, context.own['place'])
    keys = dict(zip(sorted(parts), jax.random.split(context.key, len(parts))))
    if 'ssl' in parts:
      parts['ssl']['fixed'] = context.own['fixed']
    return {loss: part | {'key': keys[loss]} for loss, part in parts.items()}

  def validate(params, step, state):
    del step, state
    errors = problem_lib.errors(problem, params, 'validation')['words']
    return {'validation': speech_report.rates(errors)}

  print(
    f'{job.method}: {len(plan)} updates; the first ones take longer, since '
    'they compile.',
    flush=True,
  )
  return harness.train(
    solver,
    harness.Task(
      lambda context: network.init(context.key, training.ssl),
      batch,
      stream=stream,
      own=own,
      hyper=job.hyper,
    ),
    # One seed at a time: batched over seeds, matrix products are grouped.
    job.training(len(plan), numbers.chunk, at_once=1),
    harness.Measure(evaluate_host=validate, host_every=numbers.check_every),
  )


class Comparison(NamedTuple):
  """Results of all methods with a fraction of the texts.

  Attributes:
    outcomes: outcomes by method.
    errors: errors by method, without failed methods.
    corpus: the corpus.
  """

  outcomes: dict[str, comparison.Outcome]
  errors: dict[str, speech_report.PartErrors]
  corpus: utterances.Corpus


def train_methods(options: harness.Options, labelled: float) -> Comparison:
  """Trains all methods with a fraction of the texts."""
  settings, folder = options.settings, pathlib.Path(options.workdir)
  data = dataclasses.replace(settings.data, labelled=(labelled,))
  settings = dataclasses.replace(settings, data=data)
  problem = problem_lib.prepare(settings, options.data_dir, folder, labelled)
  print(f'{utterances.describe(problem.corpus)}.', flush=True)
  for line in utterances.describe_skipped(problem.corpus):
    print(f'skipped, {line}', flush=True)
  rules = comparison.Rules(
    options,
    settings=harness.run_settings(settings, 'methods', 'grid', 'converged'),
    score=lambda trained: -trained.history['validation'][-1],
    tuning_seeds=_TUNING_SEEDS,
  )
  outcomes = comparison.compare(
    rules,
    settings.methods,
    lambda job: run(settings, problem, job),
    settings.axes,
  )
  errors = {
    name: speech_report.measure(problem, one)
    for name, one in outcomes.items()
    if not one.failure
  }
  if errors:
    best = 'bl_just' if 'bl_just' in errors else next(iter(errors))
    first = int(outcomes[best].members[0])
    weights = jax.tree.map(lambda x: x[first], outcomes[best].trained.params)
    save(folder, problem, weights)
  return Comparison(outcomes, errors, problem.corpus)


def save(
  folder: pathlib.Path, problem: problem_lib.Problem, weights: Any
) -> None:
  """Writes a recogniser, and a picture of a test utterance."""
  front = problem.network.shape.front
  a_second = front.rate or 1 / front.hop
  lengths = problem.examples['train'].lengths[problem.labelled]
  recogniser.save(
    folder / recogniser.NAME,
    problem.network,
    weights,
    (folder / 'units.json').read_text(),
    # A quantile, to ignore a few outliers.
    float(np.quantile(lengths, 0.95) / a_second),
  )
  examples = problem.examples['test']
  row = int(np.argsort(examples.lengths)[len(examples.lengths) // 2])
  array = examples.load(row)
  features, log_probs, out = problem.network.outputs(
    weights, array[None], np.array([len(array)], np.int32)
  )
  log_probs = np.asarray(log_probs[0])[: int(out[0])]
  labels = decoding.collapse(np.argmax(log_probs, axis=-1))
  if not len(labels):
    return
  frames = front_end.count_frames(problem.network.shape.front, len(array))
  picture.draw(
    folder / 'alignment.png',
    np.asarray(features[0])[: int(frames)],
    log_probs,
    labels,
    problem.units.symbols,
    seconds=len(log_probs) * problem.network.shape.frame,
    title=f'text: {examples.texts[row]}; recognised: '
    f'{problem.units.decode(labels)}',
  )


def main(options: harness.Options) -> harness.Report:
  """Trains all methods and compares their error rates."""
  settings, workdir = options.settings, pathlib.Path(options.workdir)
  shares = settings.data.labelled
  several = len(shares) > 1
  results, plots, runs = harness.Results(), {}, []
  for share in shares:
    at, folder = {}, ''
    if several:
      print(f'{share:.0%} with texts.', flush=True)
      at, folder = {'labelled': share}, f'labelled-{share:g}/'
    run_options = options._replace(workdir=str(workdir / folder))
    runs.append(train_methods(run_options, share))
    outcomes, errors, _ = runs[-1]
    speech_report.add(results, settings, outcomes, errors, at)
    if errors:
      figure = speech_report.draw(settings, outcomes)
      plots[f'{folder}errors.png'] = figure
  if several:
    plots['shares.png'] = speech_report.draw_shares(
      shares, [one.errors for one in runs]
    )
  corpus = runs[0].corpus  # All runs have the same utterances.
  return harness.Report(
    results,
    rows=('labelled', 'method') if several else 'method',
    columns=speech_report.columns(settings, corpus),
    titles=methods.TITLES,
    plots=plots,
    data=[corpus.source],
    published=problem_lib.PUBLISHED,
    more={'skipped': {why: len(n) for why, n in corpus.skipped.items()}},
  )


STUDY = harness.Study(main, PRESETS, check=check, renamed=presets.RENAMED)


if __name__ == '__main__':
  harness.run(STUDY)
