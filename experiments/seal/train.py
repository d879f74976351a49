"""Fine-tunes on the rows that are kept, on all of them, and in other ways.

Paper: Shen, Chen, Das and Chen, SEAL: Safety-enhanced Aligned LLM Fine-tuning
via Bilevel Data Selection, ICLR 2025.

    python -m experiments.seal.train --preset=user --model=DIR \
      --finetune_data=F.jsonl --safe_data=S.jsonl --scores=OUT/scores.jsonl \
      --output=MODEL

Expected: held-out losses before and after each way. Time: 1 minute on 2 cores
for `smoke`; of SmolLM2-135M with four layers, some 3 seconds a step of 8 rows.

Every eighth row of either file is held out. `scores.jsonl` is what `rank` wrote
of the same file: its row numbers say which rows are kept. With a file of
prompts, answers are generated before and after, and how many decline is counted
by their openings (`experiments.lm.refusals`).
"""

import dataclasses
import functools
import json
import pathlib
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.lm import (
  batches,
  generation,
  hugging_face,
  output_folders,
  refusals,
  weights,
)
from experiments.seal import (
  controls,
  evaluate,
  inputs,
  rows,
  selection,
  subjects,
)

WAYS = {
  'all': 'all rows',
  'kept': 'rows that are kept',
  'mixture': 'all rows and the safe ones',
  'kept_mixture': 'rows that are kept and the safe ones',
  'weighted': 'all rows and the safe loss, weighted',
  'surgery': 'all rows and the safe loss, conflicting gradients projected',
  'clean': 'rows that are known not to be unsafe',
}
HOLD_OUT = 8


@dataclasses.dataclass(frozen=True)
class Answers:
  """What trained models answer, to count refusals.

  Attributes:
    prompts: a file of rows whose prompts are answered; their own answers may be
      missing. '' for none.
    answer_length: tokens of an answer.
  """

  prompts: str = ''
  answer_length: int = 48


@dataclasses.dataclass(frozen=True)
class Training:
  """Updates of a way to train.

  Attributes:
    steps: updates.
    batch_size: rows of an update; the paper has 64.
    share: of the safe loss, where it is weighted.
  """

  steps: int = 80
  batch_size: int = 8
  share: Annotated[float, harness.Allowed(high=1.0)] = 0.5


_ADAPTERS = inputs.Adapters(rate=2e-3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(inputs.Settings):
  """Settings of a run.

  Attributes:
    scores: `scores.jsonl` of these rows, for the ways that keep some.
    rows_of: known rows: 'shuffled' answers among ordinary rows, 'harmless' for
      rejected ones, 'made_up' for neither data nor tokeniser.
    ways: which are trained; --output gets the model of the first.
    training: updates.
    answers: of trained models.
  """

  scores: str = ''
  rows_of: Annotated[str, harness.Among(inputs.SETS)] = 'harmless'
  ways: Annotated[tuple[str, ...], harness.Among(WAYS)] = (
    *('all', 'clean', 'mixture'),
  )
  adapters: inputs.Adapters = _ADAPTERS
  training: Training = Training()
  answers: Answers = Answers()


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    model='random',
    rows_of='made_up',
    max_length=12,
    known=inputs.Known(benign=40, chosen=0, unsafe=40, safe=16, anchors=8),
    adapters=inputs.Adapters(layers=1, rank=4, rate=2e-3),
    training=Training(steps=8),
    ways=('all', 'clean', 'mixture', 'weighted', 'surgery'),
  ),
  'user': Settings(
    max_length=512,
    adapters=inputs.Adapters(layers=8, rate=2e-3),
    training=Training(steps=500, batch_size=16),
    ways=('kept', 'all'),
  ),
  'paper': Settings(
    max_length=256,
    known=inputs.PAPER_ROWS,
    adapters=inputs.Adapters(layers=30, rank=16, rate=2e-4),
    training=Training(steps=1_000, batch_size=64),
  ),
}


def train_both(
  run: selection.Run,
  subject: subjects.Subject,
  made: subjects.Made,
  safe: subjects.Made,
  settings: Settings,
  way: str,
) -> Any:
  """Adapters after steps on rows and on safe rows, weighted or by surgery."""
  training = settings.training

  def losses(y, b):
    one = lambda rows, n: jnp.mean(
      subjects.row_losses(subject, y, b['frozen'], rows, n)
    )
    return jnp.stack(
      [one(b['safe'], safe.longest), one(b['rows'], made.longest)]
    )

  shares = jnp.array([training.share, 1 - training.share])
  adam = optax.adam(settings.adapters.rate)
  if way == 'weighted':
    oracle = bj.gradient(lambda y, b: shares @ losses(y, b))
    solver = optax.chain(oracle, adam)
  else:
    solver = optax.chain(
      bj.multi_objective(losses, 2), bj.aggregators.pcgrad(2, key=0), adam
    )
  batch = functools.partial(
    selection.paired_batch, made, safe, training.batch_size
  )
  data = {'rows': made.rows, 'safe': safe.rows}
  found = selection.train(run, subject, solver, batch, data, training.steps)
  return jax.tree.map(lambda leaf: leaf[0], found.params)


def held_out(made: subjects.Made) -> np.ndarray:
  """Which rows are held out: by their places, whatever is too long."""
  return made.places % HOLD_OUT == HOLD_OUT - 1


class Prepared(NamedTuple):
  """The model and the rows of a run.

  Attributes:
    subject: the model.
    rows: to train on, encoded.
    safe: safe rows, encoded.
    kinds: words for the rows.
    kept: which of them the file of scores keeps; None without one.
    prompts: to be answered.
  """

  subject: subjects.Subject
  rows: subjects.Made
  safe: subjects.Made
  kinds: np.ndarray
  kept: np.ndarray | None
  prompts: list[rows.Example]


def prepare(options: harness.Options) -> Prepared:
  """Reads the rows, and then the model.

  Raises:
    UserError: if too few rows are given to hold some out.
  """
  settings, files = options.settings, options.settings.files

  def keep_mask(count):
    if not settings.scores:
      return None
    return evaluate.kept_rows(
      settings.scores, settings.score, settings.keep, count
    )

  prompts = []
  if settings.answers.prompts:
    prompts = rows.read(
      settings.answers.prompts, skip=files.skip, prompts_only=True
    ).examples
  if files.finetune_data:
    to_train = rows.read(files.finetune_data, skip=files.skip)
    safe = rows.read(files.safe_data, skip=files.skip)
    kinds = np.array(['rows'] * len(to_train.examples))
    sets = rows.Sets(to_train.examples, kinds, safe.examples, [])
    mask = keep_mask(len(to_train.raw))
    subject = inputs.load_subject(settings)
  else:
    inputs.require_data(options, settings.rows_of)
    subject = inputs.load_subject(settings)
    sets = inputs.compose(options, settings.rows_of, subject.words)
    mask = keep_mask(len(sets.finetune))
  encoded, safe = (
    subject.make(some, settings.max_length, source=source, skip=files.skip)
    for some, source in (
      (sets.finetune, files.finetune_data),
      (sets.safe, files.safe_data),
    )
  )
  if not held_out(encoded).any() or not held_out(safe).any():
    raise harness.UserError(
      f'every {HOLD_OUT}th row is held out: give more rows of either kind.'
    )
  if mask is not None:
    mask = mask[np.array([sets.finetune[i].row for i in encoded.places])]
  kinds = sets.kinds[encoded.places]
  batches.warn_of_controls(subject.words, prompts, settings.answers.prompts)
  return Prepared(subject, encoded, safe, kinds, mask, prompts)


def check(settings: Settings) -> None:
  """Raises SettingsError for settings that no run can have."""
  inputs.check(settings)
  if 'clean' in settings.ways and settings.files.finetune_data:
    raise harness.SettingsError(
      'which rows are clean is known of known rows only: leave out the way '
      'clean.'
    )


class Measure:
  """Measures trained models: losses of held-out rows, and refusals.

  Args:
    settings: of the run.
    prepared: the model and the rows.
    params: weights of the whole model, for answers.

  Attributes:
    results: the numbers so far.
    answers: to the prompts, by model.
  """

  def __init__(self, settings: Settings, prepared: Prepared, params: Any):
    self.results = harness.Results()
    self.answers: dict[str, list[str]] = {}
    self._prepared, self._params = prepared, params
    subject, encoded, safe, kinds = prepared[:4]
    out, safe_out = held_out(encoded), held_out(safe)
    self._read = selection.reader(
      subject, encoded.part(out).joined(safe.part(safe_out))
    )
    self._kinds = np.concatenate([kinds[out], ['safe'] * safe_out.sum()])
    self._generate = generation.make_generator(
      subject.tuning.config,
      new=settings.answers.answer_length,
      end=subject.words.end,
      dtype=settings.compute_dtype,
    )

  def __call__(self, name: str, trained: Any) -> None:
    """Adds the numbers of a model by its adapters."""
    losses = -controls.by_loss(*self._read(trained))
    for kind in sorted(set(self._kinds)):
      mean = losses[self._kinds == kind].mean()
      self.results.add({'trained on': name, 'rows': kind}, loss=mean)
    subject, prompts = self._prepared.subject, self._prepared.prompts
    if not prompts:
      return
    self.answers[name] = generation.answers(
      subject.words,
      self._generate,
      subject.tuning.merged(trained, self._params),
      [one.prompt for one in prompts],
      key=jax.random.key(0),
    )
    rate = refusals.refusal_rate(self.answers[name])
    self.results.add({'trained on': name}, refusals=rate)


def train(options: harness.Options, prepared: Prepared, way: str) -> Any:
  """Adapters after training in a way."""
  settings, subject = options.settings, prepared.subject
  chosen = {'clean': prepared.kinds != 'unsafe', 'kept': prepared.kept}
  which = ~held_out(prepared.rows)
  which = which & chosen.get(way.removesuffix('_mixture'), True)
  subset = prepared.rows.part(which)
  safe = prepared.safe.part(~held_out(prepared.safe))
  identity = harness.settings_of(
    settings, *inputs.NO_IDENTITY, 'ways', 'answers', 'scores'
  )
  run = selection.Run(options, way, identity)
  if way in ('weighted', 'surgery'):
    return train_both(run, subject, subset, safe, settings, way)
  if way.endswith('mixture'):
    subset = subset.joined(safe)
  return selection.fine_tuned(
    run,
    subject,
    subset,
    steps=settings.training.steps,
    size=min(settings.training.batch_size, len(subset.places)),
    rate=settings.adapters.rate,
  )


def export(
  options: harness.Options,
  subject: subjects.Subject,
  whole: weights.Model,
  trained: Any,
) -> None:
  """Writes the model with its adapters merged."""
  settings = options.settings
  how = {
    'dtype': settings.export_dtype(whole.dtype),
    'generation': whole.generation,
  }
  merged = subject.tuning.merged(trained, whole.params)
  model = whole.config, merged, subject.words
  make = lambda folder: hugging_face.export(folder, *model, **how)
  output_folders.write(options.workdir, settings.files.output, '', make)
  print(f'Model: {settings.files.output}')


def main(options: harness.Options) -> harness.Report:
  """Trains in all ways and measures losses and refusals."""
  settings = options.settings
  if {'kept', 'kept_mixture'} & set(settings.ways) and not settings.scores:
    raise harness.SettingsError(
      'which rows are kept is read from --scores=OUT/scores.jsonl, as rank has '
      'written it; --ways=all does without.'
    )
  if settings.files.output:
    output_folders.require_own(options.workdir, settings.files.output)
  prepared = prepare(options)
  subject, whole = prepared.subject, None
  if prepared.prompts or settings.files.output:
    whole = inputs.load_model(settings)[0]
  measure = Measure(settings, prepared, whole and whole.params)
  measure('start', subject.tuning.init(subject.frozen, jax.random.key(0)))
  for way in settings.ways:
    trained = train(options, prepared, way)
    measure(way, trained)
    if settings.files.output and way == settings.ways[0]:
      export(options, subject, whole, trained)
  if measure.answers:
    path = pathlib.Path(options.workdir) / 'answers.json'
    path.write_text(json.dumps(measure.answers, indent=2, ensure_ascii=False))
  return harness.Report(
    measure.results,
    rows='trained on',
    titles={'start': 'nothing', **WAYS},
  )


STUDY = harness.Study(
  main,
  PRESETS,
  paper='seal',
  binary='train',
  check=check,
  renamed=inputs.RENAMED | {'new': 'answers.answer_length'},
)


if __name__ == '__main__':
  harness.run(STUDY)
