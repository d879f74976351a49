r"""Fine-tunes on selected rows, on all rows, and with mixed losses.

Paper: Shen, Chen, Das and Chen, SEAL: Safety-enhanced Aligned LLM Fine-tuning
via Bilevel Data Selection, ICLR 2025.

    python -m experiments.seal.train --preset=user --model=DIR \
      --finetune_data=F.jsonl --safe_data=S.jsonl --scores=OUT/scores.jsonl \
      --output=MODEL

Expected: held-out losses before and after each method. Time: 1 minute on 2
cores for `smoke`; with SmolLM2-135M and four layers, 3 seconds per step of 8
rows.

Every eighth row of each file is held out. `scores.jsonl` is written by `rank`
for the same file; its row numbers say which rows are kept. With a file of
prompts, answers are generated before and after training, and refusals are
counted by their openings (`experiments.lm.refusals`).
"""

import dataclasses
import functools
import json
import pathlib
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.lm import (
  batches,
  hugging_face,
  output_folders,
  weights,
)
from experiments.seal import (
  evaluate,
  held_out,
  inputs,
  rows,
  selection,
  tuned_models,
)

SELECTION_METHODS = {
  'all': 'all rows',
  'kept': 'kept rows',
  'mixture': 'all rows and safe rows',
  'kept_mixture': 'kept rows and safe rows',
  'weighted': 'all rows and the safe loss, weighted',
  'surgery': 'all rows and the safe loss, PCGrad',
  'clean': 'rows known to be clean',
}


@dataclasses.dataclass(frozen=True)
class Answers:
  """Answers of the trained models, to count refusals.

  Attributes:
    prompts: file of rows whose prompts are answered; they need no answers. ''
      for none.
    answer_length: tokens of an answer.
  """

  prompts: str = ''
  answer_length: int = 48


@dataclasses.dataclass(frozen=True)
class Training:
  """Training with each method.

  Attributes:
    steps: number of updates.
    batch_size: rows of an update; 64 in the paper.
    mixing_ratio: weight of the safe loss in the method weighted.
  """

  steps: int = 80
  batch_size: int = 8
  mixing_ratio: Annotated[float, harness.Allowed(high=1.0)] = 0.5


_ADAPTERS = inputs.Adapters(rate=2e-3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(inputs.Settings):
  """Settings of a run.

  Attributes:
    scores: `scores.jsonl` of these rows, for methods that keep some rows.
    known_set: known rows: 'shuffled' answers or 'harmless' for rejected
      answers, both among ordinary rows; 'made_up' needs no data.
    selection_methods: rows and losses to train on; --output gets the model of
      the first one.
    training: with each method.
    answers: of the trained models.
  """

  scores: str = ''
  known_set: Annotated[
    str, harness.Among(inputs.SETS, inputs.SETS_MEANINGS)
  ] = 'harmless'
  selection_methods: Annotated[
    tuple[str, ...], harness.Among(SELECTION_METHODS)
  ] = ('all', 'clean', 'mixture')
  adapters: inputs.Adapters = _ADAPTERS
  training: Training = Training()
  answers: Answers = Answers()


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    model='random',
    known_set='made_up',
    max_length=12,
    known=inputs.Known(
      benign=40, chosen=0, unsafe=40, safe=16, reference_rows=8
    ),
    adapters=inputs.Adapters(layers=1, rank=4, rate=2e-3),
    training=Training(steps=8),
    selection_methods=('all', 'clean', 'mixture', 'weighted', 'surgery'),
  ),
  'user': Settings(
    max_length=512,
    adapters=inputs.Adapters(layers=8, rate=2e-3),
    training=Training(steps=500, batch_size=16),
    selection_methods=('kept', 'all'),
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
  model: tuned_models.TunedModel,
  encoded: tuned_models.EncodedRows,
  safe: tuned_models.EncodedRows,
  settings: Settings,
  method: str,
) -> Any:
  """Trains adapters on both losses, weighted or with PCGrad."""
  training = settings.training

  def losses(y, b):
    one = lambda rows, max_length: jnp.mean(
      tuned_models.row_losses(model, y, b['frozen'], rows, max_length)
    )
    return jnp.stack(
      [one(b['safe'], safe.max_length), one(b['rows'], encoded.max_length)]
    )

  weights = jnp.array([training.mixing_ratio, 1 - training.mixing_ratio])
  adam = optax.adam(settings.adapters.rate)
  if method == 'weighted':
    oracle = bj.gradient(lambda y, b: weights @ losses(y, b))
    solver = optax.chain(oracle, adam)
  else:
    solver = optax.chain(
      bj.multi_objective(losses, 2), bj.aggregators.pcgrad(2, key=0), adam
    )
  batch = functools.partial(
    selection.paired_batch, encoded, safe, training.batch_size
  )
  data = {'rows': encoded.rows, 'safe': safe.rows}
  trained = selection.train(run, model, solver, batch, data, training.steps)
  return jax.tree.map(lambda leaf: leaf[0], trained.params)


def prepare(options: harness.Options) -> held_out.Prepared:
  """Reads the rows, then the model, and encodes the rows.

  Raises:
    UserError: if there are too few rows to hold some out.
  """
  settings, files = options.settings, options.settings.files

  def read_mask(count):
    if not settings.scores:
      return None
    return evaluate.read_mask(
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
    mask = read_mask(len(to_train.raw))
    model = inputs.load_tuned_model(settings)
  else:
    inputs.require_data(options, settings.known_set)
    model = inputs.load_tuned_model(settings)
    sets = inputs.compose(options, settings.known_set, model.tokenizer)
    mask = read_mask(len(sets.finetune))
  encoded, safe = (
    model.encode(part, settings.max_length, source=source, skip=files.skip)
    for part, source in (
      (sets.finetune, files.finetune_data),
      (sets.safe, files.safe_data),
    )
  )
  if not held_out.mask(encoded).any() or not held_out.mask(safe).any():
    raise harness.UserError(
      f'every {held_out.EVERY}th row of each file is held out: give more rows.'
    )
  if mask is not None:
    mask = mask[np.array([sets.finetune[i].row for i in encoded.indices])]
  kinds = sets.kinds[encoded.indices]
  batches.warn_of_controls(model.tokenizer, prompts, settings.answers.prompts)
  return held_out.Prepared(model, encoded, safe, kinds, mask, prompts)


def check(settings: Settings) -> None:
  """Raises SettingsError for settings that contradict each other."""
  inputs.check(settings)
  if 'clean' in settings.selection_methods and settings.files.finetune_data:
    raise harness.SettingsError(
      'the kinds of rows in --finetune_data are unknown: leave out the '
      'selection method clean.'
    )


def train(
  options: harness.Options, prepared: held_out.Prepared, method: str
) -> Any:
  """Trains adapters with a selection method."""
  settings, model = options.settings, prepared.model
  masks = {'clean': prepared.kinds != 'unsafe', 'kept': prepared.selected}
  mask = ~held_out.mask(prepared.rows)
  mask = mask & masks.get(method.removesuffix('_mixture'), True)
  subset = prepared.rows.subset(mask)
  safe = prepared.safe.subset(~held_out.mask(prepared.safe))
  identity = harness.run_settings(
    settings, *inputs.NO_IDENTITY, 'selection_methods', 'answers', 'scores'
  )
  run = selection.Run(options, method, identity)
  if method in ('weighted', 'surgery'):
    return train_both(run, model, subset, safe, settings, method)
  if method.endswith('mixture'):
    subset = subset.joined(safe)
  return selection.fine_tune(
    run,
    model,
    subset,
    steps=settings.training.steps,
    size=min(settings.training.batch_size, len(subset.indices)),
    rate=settings.adapters.rate,
  )


def export(
  options: harness.Options,
  model: tuned_models.TunedModel,
  base: weights.Model,
  trained: Any,
) -> None:
  """Writes the model with its adapters merged."""
  settings = options.settings
  make = lambda folder: hugging_face.export(
    folder,
    base.config,
    model.tuning.merged(trained, base.params),
    model.tokenizer,
    dtype=settings.export_dtype(base.dtype),
    generation=base.generation,
  )
  output_folders.write(options.workdir, settings.files.output, '', make)
  print(f'Model: {settings.files.output}')


def main(options: harness.Options) -> harness.Report:
  """Trains with all selection methods, and measures losses and refusals."""
  settings = options.settings
  methods = settings.selection_methods
  if {'kept', 'kept_mixture'} & {*methods} and not settings.scores:
    raise harness.SettingsError(
      'the selection method kept needs --scores=OUT/scores.jsonl, a file that '
      'rank has written; --selection_methods=all needs none.'
    )
  if settings.files.output:
    output_folders.require_own(options.workdir, settings.files.output)
  prepared = prepare(options)
  model, base = prepared.model, None
  if prepared.prompts or settings.files.output:
    base = inputs.load_model(settings)[0]
  measure = held_out.Measure(settings, prepared, base and base.params)
  measure('start', model.tuning.init(model.frozen, jax.random.key(0)))
  for method in methods:
    trained = train(options, prepared, method)
    measure(method, trained)
    if settings.files.output and method == methods[0]:
      export(options, model, base, trained)
  if measure.answers:
    path = pathlib.Path(options.workdir) / 'answers.json'
    path.write_text(json.dumps(measure.answers, indent=2, ensure_ascii=False))
  return harness.Report(
    measure.results,
    rows='trained on',
    titles={'start': 'nothing', **SELECTION_METHODS},
  )


STUDY = harness.Study(
  main,
  PRESETS,
  check=check,
  renamed=inputs.RENAMED
  | {
    'new': 'answers.answer_length',
    'ways': 'selection_methods',
    'rows_of': 'known_set',
    'share': 'training.mixing_ratio',
    'training.share': 'training.mixing_ratio',
  },
)


if __name__ == '__main__':
  harness.run(STUDY)
