"""Joint unsupervised and supervised training of speech recognition.

Paper: Saif, Cui, Shen, Lu, Kingsbury and Chen, Joint Unsupervised and
Supervised Training for Automatic Speech Recognition via Bilevel Optimization,
2024.

    python -m experiments.bl_just.train --dataset=fsdd --preset=quick --data_dir=SPEECH
    python -m experiments.bl_just.train --dataset=an4 --preset=an4_full --data_dir=SPEECH
    python -m experiments.bl_just.train --dataset=folder --preset=user --data_dir=MINE

Expected: `quick` .04 word error by all methods, converged; with a twentieth of
the transcripts (`--labelled=0.05`) BL-JUST .11 below supervised training. AN4:
.17 supervised. Time: 25 CPU-minutes, and 22 for AN4; `digits` 2 minutes;
`an4_grid` four and a half hours of a core.

Recognition by connectionist temporal classification is the upper problem, a
loss of audio alone the lower one; they share an encoder. Methods are compared
at equal numbers of updates, and the supervised one also with as many gradients
as the joint one takes. `SPEECH` has `fsdd.tar.gz` and `an4_mfcc.tar.gz`, or the
folders of LibriSpeech or TED-LIUM; `MINE` audio and a file `texts.tsv` of
lines `path<TAB>text`.
"""  # noqa: E501

import dataclasses
import pathlib
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness
from experiments.bl_just import (
  decoding,
  feed,
  methods,
  picture,
  recogniser,
  scoring,
  utterances,
)
from experiments.bl_just import (
  problem as problem_lib,
)
from experiments.harness import comparison

_TUNING_SEED = 1_000_000
# What others are compared with, in the words of the table.
_AGAINST = {
  'supervised': 'supervised',
  'supervised_longer': 'supervised at equal gradients',
  'pretrain': 'pre-training',
}
_CONTROLS = ('supervised', 'supervised_longer')


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run; the paper's are in the preset `paper`.

  Attributes:
    dataset: which loader.
    sampling: samples a second, resampled to; 0 for the loader's own.
    train_part: of LibriSpeech or TED-LIUM, to learn from, several joined by a
      comma; '' for the loader's own, as in the following.
    unlabelled_part: of LibriSpeech, to learn from without its transcripts.
    validation_part: to choose with.
    test_part: to report on.
    strings: of digits or tones, to learn from.
    test_strings: of digits or tones, to report on.
    held_speaker: of the digits, one who is reported apart; '' for none.
    labelled: share of the training utterances that have a text; of several,
      each is a run of its own.
    data_seed: of strings and of what keeps its text.
    units: of texts.
    pieces: how many, where units are learnt.
    mels: bands of the front end.
    encoder: its kind.
    width: of its layers.
    depth: layers after the strided ones.
    strides: of the first convolutions.
    kernel: frames that a convolution sees.
    heads: of attention.
    dropout: of the encoder.
    task: the loss of audio alone.
    hidden: probability that a hidden span begins at an encoded frame.
    span: encoded frames of a hidden span.
    negatives: frames among which one is told.
    ahead: encoded frames that are predicted.
    codes: of the random quantiser.
    time_stripes: hidden from the loss of transcripts.
    longest_stripe: frames of one.
    band_stripes: of bands, hidden from the loss of transcripts.
    widest_stripe: bands of one.
    methods: which are compared.
    steps: updates of each.
    batch_size: utterances of a loss in an update.
    buckets: lengths that batches are padded to.
    rates: step sizes that are tried, one for none.
    penalties: largest penalties that are tried by methods that have one.
    decays: of the weights, tried by the others, as many.
    audio_rate: step size of updates on audio alone.
    tuning_rate: of the final fine-tuning.
    clip: the largest norm of a gradient.
    pretraining: share of the updates of `pretrain` on audio alone.
    exploring: share of BL-JUST's updates on audio alone.
    tuning: share of the final fine-tuning.
    rounds: of exploration and joint updates.
    chunk: updates between two records.
    check_every: updates between two looks at the validation part.
    converged: training error up to which a run is called converged.
    seeds: of training.
  """

  dataset: Literal[
    'made_up', 'fsdd', 'an4', 'librispeech', 'tedlium', 'folder'
  ] = 'fsdd'
  sampling: Annotated[int, harness.Allowed(0)] = 0
  train_part: str = ''
  unlabelled_part: str = ''
  validation_part: str = ''
  test_part: str = ''
  strings: int = 1_000
  test_strings: int = 300
  held_speaker: str = ''
  labelled: Annotated[tuple[float, ...], harness.Allowed(0, 1)] = (0.25,)
  data_seed: Annotated[int, harness.Allowed(0)] = 0
  units: Literal['characters', 'words', 'pieces'] = 'words'
  pieces: int = 1_000
  mels: int = 40
  encoder: Literal['conv', 'conv_lstm', 'conformer'] = 'conv'
  width: int = 96
  depth: Annotated[int, harness.Allowed(0)] = 6
  strides: tuple[int, ...] = (2, 2, 2)
  kernel: int = 5
  heads: int = 4
  dropout: Annotated[float, harness.Allowed(0, 0.9)] = 0.1
  task: Literal['cpc', 'contrastive', 'best_rq'] = 'best_rq'
  hidden: Annotated[float, harness.Allowed(0, 1)] = 0.15
  span: int = 3
  negatives: int = 20
  ahead: int = 3
  codes: int = 256
  time_stripes: Annotated[int, harness.Allowed(0)] = 2
  longest_stripe: int = 20
  band_stripes: Annotated[int, harness.Allowed(0)] = 2
  widest_stripe: int = 8
  methods: tuple[str, ...] = (
    *('supervised', 'supervised_longer', 'pretrain', 'bl_just'),
  )
  steps: int = 2_400
  batch_size: int = 8
  buckets: int = 2
  rates: tuple[float, ...] = (3e-3,)
  penalties: Annotated[tuple[float, ...], harness.Allowed(0)] = (0.3,)
  decays: Annotated[tuple[float, ...], harness.Allowed(0)] = (1e-2,)
  audio_rate: float = 1e-3
  tuning_rate: float = 3e-4
  clip: float = 5.0
  pretraining: Annotated[float, harness.Allowed(0, 1)] = 0.4
  exploring: Annotated[float, harness.Allowed(0, 1)] = 0.1
  tuning: Annotated[float, harness.Allowed(0, 1)] = 0.1
  rounds: int = 5
  chunk: int = 100
  check_every: int = 600
  converged: float = 0.02
  seeds: int = 3


_AN4 = Settings(
  dataset='an4',
  labelled=(1.0,),
  units='characters',
  width=128,
  depth=7,
  strides=(2, 2),
  dropout=0.15,
  longest_stripe=30,
  methods=('supervised', 'bl_just'),
  steps=8_000,
  buckets=3,
  rates=(2e-3,),
  chunk=200,
  check_every=2_000,
  seeds=1,
)
PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    dataset='made_up',
    strings=24,
    test_strings=8,
    labelled=(0.5,),
    mels=16,
    width=16,
    depth=0,
    strides=(2, 2),
    methods=('supervised', 'bl_just'),
    steps=20,
    batch_size=4,
    buckets=1,
    chunk=10,
    check_every=20,
    seeds=2,
  ),
  # A recogniser of digits to transcribe with.
  'digits': Settings(
    held_speaker='theo',
    labelled=(1.0,),
    methods=('supervised',),
    seeds=1,
  ),
  'an4_full': _AN4,
  # All methods, by the share that has texts; a night of one core.
  'an4_grid': dataclasses.replace(
    _AN4,
    labelled=(0.1, 0.25, 0.5),
    methods=tuple(methods.TITLES),
    steps=3_000,
    buckets=6,
    check_every=1_000,
    seeds=3,
  ),
  # 100 hours with texts; batches of 64, 200 epochs in all.
  'paper': Settings(
    dataset='librispeech',
    labelled=(1.0,),
    units='pieces',
    mels=80,
    encoder='conformer',
    width=512,
    depth=8,
    strides=(2, 2, 2),
    heads=8,
    task='contrastive',
    codes=8_192,
    longest_stripe=30,
    widest_stripe=25,
    methods=('supervised', 'pretrain', 'joint', 'bl_just'),
    steps=90_000,
    batch_size=64,
    buckets=4,
    rates=(5e-4,),
    penalties=(1.0,),
    chunk=500,
    check_every=10_000,
    seeds=1,
  ),
  # A folder of one's own.
  'user': Settings(
    dataset='folder',
    labelled=(1.0,),
    units='characters',
    encoder='conv_lstm',
    width=256,
    depth=3,
    strides=(2, 2),
    methods=('bl_just',),
    steps=10_000,
    buckets=3,
    rates=(1e-3,),
    seeds=1,
  ),
}


def check(settings: Settings) -> None:
  """Raises SettingsError for settings that no run can have."""
  for name in settings.methods:
    methods.check(name)
  if len(set(settings.methods)) < len(settings.methods):
    raise harness.SettingsError(
      f'methods={",".join(settings.methods)} has one of them twice.'
    )
  if len(set(settings.labelled)) < max(len(settings.labelled), 1):
    shares = ','.join(f'{share:g}' for share in settings.labelled)
    raise harness.SettingsError(
      f'labelled={shares} is to be one share of the texts or several, none '
      'of them twice.'
    )
  if settings.sampling and settings.dataset in ('an4', 'made_up'):
    raise harness.SettingsError(
      f'sampling={settings.sampling}: {settings.dataset} has no audio that '
      'could be resampled; leave it out.'
    )
  named = problem_lib.parts_of(settings)
  known = problem_lib.PARTS.get(settings.dataset, ())
  if others := [name for name in named if name not in known]:
    raise harness.SettingsError(
      f'{settings.dataset} has no such part to name: leave out '
      f'--{others[0]}_part.'
    )
  if len(settings.penalties) != len(settings.decays):
    raise harness.SettingsError(
      f'{len(settings.penalties)} penalties and {len(settings.decays)} decays: '
      'methods are tried at equal numbers of points, give as many of both.'
    )
  if settings.exploring + settings.tuning >= 1 or settings.pretraining >= 1:
    raise harness.SettingsError(
      'exploring and tuning together, and pretraining, are shares below 1.'
    )


def grid_of(settings: Settings, method: str) -> comparison.Grid:
  """What is tried: step sizes, and penalties or decays of the weights."""
  plan = methods.plan(method, settings.steps, shares_of(settings))
  joint = feed.STEPS.index(('ctc', 'ssl'))
  second = (
    {'penalty': settings.penalties}
    if np.any(plan == joint)
    else {'decay': settings.decays}
  )
  return {'rate': settings.rates, **second}


def shares_of(settings: Settings) -> methods.Shares:
  """Parts of a run."""
  return methods.Shares(
    settings.pretraining, settings.exploring, settings.tuning, settings.rounds
  )


def run(
  settings: Settings, problem: problem_lib.Problem, job: comparison.Job
) -> harness.Trained:
  """Trains one method, all members."""
  plan = methods.plan(job.method, settings.steps, shares_of(settings))
  network, training = problem.network, problem.training
  everything = np.arange(len(problem.examples['train'].lengths))
  members = len(job.seeds)
  stream = feed.Feed(
    problem.examples['train'],
    {'ctc': [problem.labelled] * members, 'ssl': [everything] * members},
    plan,
    edges=problem.edges,
    batch_size=settings.batch_size,
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
    steps = methods.Steps(
      rate=hyper['rate'],
      audio=settings.audio_rate,
      tuning=settings.tuning_rate,
      penalty=hyper.get('penalty', settings.penalties[0]),
      decay=hyper.get('decay', settings.decays[0]),
      clip=settings.clip,
    )
    return methods.solver(
      job.method,
      plan,
      steps,
      lambda z, batch: network.ctc(training, z, batch),
      lambda z, batch: network.ssl(training, z, batch),
    )

  def batch(context):
    mine = feed.of_member(context.streamed, context.own['place'])
    keys = dict(zip(sorted(mine), jax.random.split(context.key, len(mine))))
    if 'ssl' in mine:
      mine['ssl']['fixed'] = context.own['fixed']
    return {loss: part | {'key': keys[loss]} for loss, part in mine.items()}

  def validate(params, step, state):
    del step, state
    found = problem_lib.errors(problem, params, 'validation')['words']
    return {'validation': np.array([errors.rate for errors in found])}

  print(
    f'{job.method}: {len(plan)} updates; programs are compiled as '
    'they are needed, so that the first updates take longest.',
    flush=True,
  )
  return harness.train(
    solver,
    lambda context: network.init(context.key, training.task),
    batch,
    steps=len(plan),
    chunk=settings.chunk,
    stream=stream,
    own=own,
    evaluate_host=validate,
    host_every=settings.check_every,
    # Side by side, products of members would be in groups.
    at_once=1,
    **job.keywords,
  )


def main(options: harness.Options) -> dict[str, float]:
  """Trains all methods, and compares what they understand."""
  shares = options.settings.labelled
  if len(shares) == 1:
    done = of_share(options, shares[0])
    write(options, done.metrics, done.rows, [done])
    return done.metrics
  metrics, rows, runs = {}, [], []
  for share in shares:
    print(f'{share:.0%} with texts.', flush=True)
    folder = pathlib.Path(options.workdir) / f'labelled-{share:g}'
    done = of_share(options._replace(workdir=str(folder)), share)
    runs.append(done)
    metrics |= {
      f'{share:g}/{k}': value
      for k, value in done.metrics.items()
      # The rest is in the results of the share's own folder.
      if k.split('/')[0] in ('wer', 'cer', 'training_error', 'difference')
    }
    rows += [{'with texts': f'{share:.0%}', **row} for row in done.rows]
  plot_shares(pathlib.Path(options.workdir) / 'shares.png', shares, runs)
  write(options, metrics, rows, runs)
  return metrics


class Share(NamedTuple):
  """What all methods came to with a share of the texts.

  Attributes:
    metrics: by name.
    rows: of the table.
    errors: word errors of the test by title, of all seeds.
    corpus: what was learnt from.
    seconds: that it took, with runs that were finished before.
  """

  metrics: dict[str, float]
  rows: list[dict[str, Any]]
  errors: dict[str, np.ndarray]
  corpus: utterances.Corpus
  seconds: float


def write(
  options: harness.Options,
  metrics: dict[str, float],
  rows: list[dict[str, Any]],
  runs: Sequence[Share],
) -> None:
  """Writes table and results; the corpus but for its texts is that of all."""
  corpus = runs[0].corpus
  harness.write_table(options.workdir, rows)
  harness.write_results(
    options,
    metrics=metrics,
    seconds=sum(run.seconds for run in runs),
    data=[corpus.source],
    published=problem_lib.PUBLISHED,
    skipped={why: len(n) for why, n in corpus.skipped.items()},
  )


def of_share(options: harness.Options, labelled: float) -> Share:
  """Trains all methods with a share of the texts."""
  start = time.monotonic()
  settings, folder = options.settings, pathlib.Path(options.workdir)
  settings = dataclasses.replace(settings, labelled=(labelled,))
  problem = problem_lib.prepare(settings, options.data_dir, folder, labelled)
  print(f'{utterances.describe(problem.corpus)}.', flush=True)
  for line in utterances.left_out(problem.corpus):
    print(f'left out, {line}', flush=True)
  rules = comparison.Rules(
    options,
    settings=harness.settings_of(
      settings,
      *('methods', 'rates', 'penalties', 'decays', 'converged'),
    ),
    score=lambda trained: -trained.history['validation'][-1],
    tuning_seeds=(_TUNING_SEED,),
  )
  outcomes = comparison.compare(
    rules,
    settings.methods,
    lambda job: run(settings, problem, job),
    lambda method: grid_of(settings, method),
  )
  found = {
    name: measured(problem, one)
    for name, one in outcomes.items()
    if not one.failure
  }
  metrics, rows = report(settings, problem, outcomes, found)
  fine = [name for name in outcomes if name in found]
  if fine:
    best = 'bl_just' if 'bl_just' in fine else fine[0]
    keep(folder, problem, first_of(outcomes[best]))
    plot(folder, settings, {n: outcomes[n] for n in fine})
  return Share(
    metrics,
    rows,
    {
      methods.TITLES[name]: rates(one['test']['words'])
      for name, one in found.items()
    },
    problem.corpus,
    # Runs that were finished before count too.
    max(
      time.monotonic() - start,
      sum(
        one.trained.seconds + one.trained.compile_seconds
        for one in outcomes.values()
        if not one.failure
      ),
    ),
  )


def rates(errors: Sequence[scoring.Errors]) -> np.ndarray:
  """Error rates of all seeds."""
  return np.array([one.rate for one in errors])


def first_of(outcome: comparison.Outcome) -> Any:
  """The weights of the first reported seed."""
  place = int(outcome.members[0])
  return jax.tree.map(lambda leaf: leaf[place], outcome.trained.params)


def measured(
  problem: problem_lib.Problem, outcome: comparison.Outcome
) -> dict[str, dict[str, list[scoring.Errors]]]:
  """Errors of the reported seeds by part and kind; of training, some rows."""
  params = jax.tree.map(
    lambda leaf: leaf[outcome.members], outcome.trained.params
  )
  # Evenly over the utterances: of many, a thousand tell enough.
  rows = problem.labelled[:: max(1, len(problem.labelled) // 1_000)]
  found = {'training': problem_lib.errors(problem, params, 'train', rows)}
  for part in ('validation', 'test', *problem.corpus.more):
    found[part] = problem_lib.errors(problem, params, part)
  return found


def report(
  settings: Settings,
  problem: problem_lib.Problem,
  outcomes: dict[str, comparison.Outcome],
  found: dict[str, Any],
) -> tuple[dict[str, float], list[dict[str, Any]]]:
  """Metrics by name, and the rows of the table."""

  def measure(outcome):
    name = outcome.method
    return {
      f'{part} error': rates(errors['words'])
      for part, errors in found[name].items()
    } | {'character error': rates(found[name]['test']['characters'])}

  metrics, rows = comparison.report_outcomes(outcomes, measure)
  for row in rows:
    name = row['method']
    row['method'] = methods.TITLES[name]
    row.pop('seconds', None)  # Those of a run that was finished are none.
    if name not in found:
      continue
    plan = methods.plan(name, settings.steps, shares_of(settings))
    taken = methods.gradients(plan)
    seconds = outcomes[name].trained.seconds / len(outcomes[name].members)
    row |= {
      'updates': len(plan),
      'gradients of transcripts, audio': f'{taken["ctc"]}, {taken["ssl"]}',
      's a seed': round(seconds),
    }
    errors = found[name]
    for key, values in (
      ('wer', rates(errors['test']['words'])),
      ('cer', rates(errors['test']['characters'])),
      ('training_error', rates(errors['training']['words'])),
      ('validation_error', rates(errors['validation']['words'])),
      *(
        (f'wer_{part}', rates(errors[part]['words']))
        for part in problem.corpus.more
      ),
    ):
      metrics |= harness.mean_interval(values).metrics(f'{key}/{name}')
    metrics[f'seconds/{name}'] = seconds
    metrics[f'worst_training_error/{name}'] = float(
      rates(errors['training']['words']).max()
    )
    # One that has not converged makes others look good.
    done = metrics[f'worst_training_error/{name}'] <= settings.converged
    row['converged'] = 'yes' if done else 'not converged'
    for against, words in _AGAINST.items():
      if against not in found or name in (against, *_CONTROLS):
        continue
      lead = harness.mean_interval(
        rates(errors['test']['words']) - rates(found[against]['test']['words'])
      )
      row[f'against {words}'] = lead
      metrics |= lead.metrics(f'difference/{name}/{against}')
  return metrics, rows


def keep(
  folder: pathlib.Path, problem: problem_lib.Problem, weights: Any
) -> None:
  """Writes the file that transcribes, and a picture of a test utterance."""
  front = problem.network.shape.front
  a_second = front.rate or 1 / front.hop
  lengths = problem.examples['train'].lengths[problem.labelled]
  recogniser.save(
    folder / recogniser.NAME,
    problem.network,
    weights,
    (folder / 'units.json').read_text(),
    # A few that are far longer do not count.
    float(np.quantile(lengths, 0.95) / a_second),
  )
  examples = problem.examples['test']
  row = int(np.argsort(examples.lengths)[len(examples.lengths) // 2])
  array = examples.load(row)
  features, found, out = problem.network.outputs(
    weights, array[None], np.array([len(array)], np.int32)
  )
  log_probs = np.asarray(found[0])[: int(out[0])]
  said = decoding.collapse(np.argmax(log_probs, axis=-1))
  if not len(said):
    return
  frames = recogniser.front_end.frames_of(
    problem.network.shape.front, len(array)
  )
  picture.draw(
    folder / 'alignment.png',
    np.asarray(features[0])[: int(frames)],
    log_probs,
    said,
    problem.units.symbols,
    seconds=len(log_probs) * problem.network.shape.frame,
    title=f'said: {examples.texts[row]}; understood: '
    f'{problem.units.decode(said)}',
  )


def plot(
  folder: pathlib.Path,
  settings: Settings,
  outcomes: dict[str, comparison.Outcome],
) -> None:
  """Error of the validation part, by updates and by gradients."""
  by_updates, by_gradients = {}, {}
  for name, outcome in outcomes.items():
    values = outcome.values('validation')
    looked = ~np.isnan(values).all(axis=1)
    steps = np.asarray(outcome.trained.steps)[looked]
    plan = methods.plan(name, settings.steps, shares_of(settings))
    each = np.array([len(step) for step in feed.STEPS])[plan]
    title = methods.TITLES[name]
    # No error at all has no logarithm.
    shown = np.maximum(values[looked], 1e-3)
    by_updates[title] = steps, shown
    by_gradients[title] = np.cumsum(each)[steps - 1], shown
  harness.plot_panels(
    folder / 'errors.png',
    [
      harness.Panel(
        curves, xlabel=label, ylabel='word error, validation', logy=True
      )
      for curves, label in (
        (by_updates, 'updates'),
        (by_gradients, 'gradients of either loss'),
      )
    ],
  )


def plot_shares(
  path: pathlib.Path, shares: Sequence[float], runs: Sequence[Share]
) -> None:
  """Word error of the test by the share that has texts, of all methods.

  Means without bands, which of so many methods hide one another.
  """
  order = np.argsort(shares)
  curves = {
    title: (
      np.asarray(shares)[order],
      np.stack([runs[i].errors[title].mean(keepdims=True) for i in order]),
    )
    for title in runs[0].errors
    # One that failed with some share has no line.
    if all(title in run.errors for run in runs)
  }
  harness.plot_panels(
    path,
    [
      harness.Panel(
        curves,
        xlabel='share of the utterances with a text',
        ylabel='word error, test, mean of the seeds',
        logx=True,
      )
    ],
  )


STUDY = harness.Study(
  main, PRESETS, paper='bl_just', binary='train', check=check
)


if __name__ == '__main__':
  harness.run(STUDY)
