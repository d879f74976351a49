r"""Ranks fine-tuning rows by safety and selects the rows to keep.

Paper: Shen, Chen, Das and Chen, SEAL: Safety-enhanced Aligned LLM Fine-tuning
via Bilevel Data Selection, ICLR 2025.

    python -m experiments.seal.rank --preset=quick --data_dir=LLM
    python -m experiments.seal.rank --preset=user --model=DIR \
      --finetune_data=F.jsonl --safe_data=S.jsonl --keep=0.8 --output=OUT

Expected: on shuffled answers the selector is level with the loss of the first
model; between rejected and chosen answers the excess loss is above both.
Time: 20 minutes on one core for `quick`, with a model of 135 M parameters.

With files, OUT gets `scores.jsonl`, one line per row of the file with its
number and all scores, higher for rows to keep, and `kept.jsonl`, the kept rows
unchanged. Without files, known rows are ranked, and each score is judged by the
rows that it drops. Needs the extra `llm`, except for `smoke`.
"""

import dataclasses
import functools
import pathlib
import time
from typing import Annotated

import numpy as np

from experiments import harness
from experiments.lm import objectives
from experiments.seal import (
  inputs,
  measures,
  ranking,
  rows,
  selection,
  tuned_models,
)

TITLES = {
  'seal': 'SEAL',
  'seal_full': 'SEAL with the third sequence',
  'initial_loss': 'loss of the first model',
  'tuned_loss': 'loss after tuning on safe rows',
  'excess': 'excess loss (tuned minus first)',
  'excess_tokens': 'excess loss per token',
  'distance': 'distance to safe rows',
  'distance_both': 'distance to safe and unsafe rows',
  'gradient': 'gradient similarity',
  'ngrams': 'hashed n-grams (DSIR)',
  'longer': 'length, longer is kept',
  'shorter': 'length, shorter is kept',
  'random': 'random order',
}
LOSSES = objectives.DEMONSTRATIONS + objectives.COMPARISONS
# `kto` compares the rows of a batch, so it cannot rank single rows.
ROW_LOSSES = tuple(name for name in LOSSES if name != 'kto')


@dataclasses.dataclass(frozen=True)
class Losses:
  """Objectives of the selector; controls use the loss of chosen answers.

  Attributes:
    safe_loss: objective of the safe rows.
    finetune_loss: objective of the rows to rank.
    beta: strength of the pull to the reference, for losses with one.
    teacher: folder or file of the teacher of distillation, like model; '' for
      none.
  """

  safe_loss: Annotated[str, harness.Among(LOSSES, objectives.MEANINGS)] = 'sft'
  finetune_loss: Annotated[
    str, harness.Among(ROW_LOSSES, objectives.MEANINGS)
  ] = 'sft'
  beta: float = 0.1
  teacher: str = ''


@dataclasses.dataclass(frozen=True)
class Tuning:
  """Fine-tuning on the safe rows, for the controls.

  Attributes:
    tune_steps: number of updates of the controls on the safe rows.
    tune_batch: rows of an update.
  """

  tune_steps: int = 48
  tune_batch: int = 8


_SELECTOR = selection.Selector()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(inputs.Settings):
  """Settings of a run.

  Attributes:
    sets: known rows to rank, without files.
    methods: the scores that are computed.
    selector: how scores are learnt.
    losses: objectives of the selector.
    controls: fine-tuning on the safe rows.
  """

  sets: Annotated[
    tuple[str, ...],
    harness.Allowed(empty=True),
    harness.Among(inputs.SETS, inputs.SETS_MEANINGS),
  ] = ('shuffled', 'harmless')
  methods: Annotated[tuple[str, ...], harness.Among(TITLES)] = tuple(
    n for n in TITLES if n != 'seal_full'
  )
  selector: selection.Selector = _SELECTOR
  losses: Losses = Losses()
  controls: Tuning = Tuning()


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    model='random',
    sets=('made_up',),
    max_length=12,
    known=inputs.Known(
      benign=40, chosen=8, unsafe=14, safe=16, reference_rows=8
    ),
    adapters=inputs.Adapters(layers=1, rank=4),
    controls=Tuning(tune_steps=8),
    methods=tuple(TITLES),
  ),
  'user': Settings(
    sets=(),
    max_length=512,
    selector=selection.Selector(epochs=3, batch_size=16),
  ),
  'paper': Settings(
    max_length=256,
    known=dataclasses.replace(inputs.PAPER_ROWS, shuffled_share=1.0),
    adapters=inputs.Adapters(layers=30, rank=16, rate=2e-4),
    selector=selection.Selector(epochs=3, batch_size=64),
    controls=Tuning(tune_steps=200),
    methods=tuple(TITLES),
  ),
}
RENAMED = inputs.RENAMED | {
  'rate': 'adapters.rate',
  'selector_rate': 'selector.rate',
  'share': 'selector.mixing_ratio',
  'selector.share': 'selector.mixing_ratio',
}


def rank(
  options: harness.Options,
  name: str,
  model: tuned_models.TunedModel,
  sets: rows.Sets,
) -> ranking.Ranking:
  """Computes all scores of the rows of a set."""
  settings, files = options.settings, options.settings.files
  losses = settings.losses
  examples = {
    'rows to rank': (sets.finetune, files.finetune_data),
    'safe rows': (sets.safe, files.safe_data),
    'unsafe rows': (sets.reference_rows, files.unsafe_data),
  }

  @functools.cache
  def encode(what, loss):
    part, path = examples[what]
    return model.encode(
      part,
      settings.max_length,
      loss=loss,
      source=path or f'{name}, {what}',
      skip=files.skip,
    )

  encoded, safe = encode('rows to rank', 'sft'), encode('safe rows', 'sft')
  reference_rows = None
  if sets.reference_rows:
    reference_rows = encode('unsafe rows', 'sft')
  if left_out := len(sets.finetune) - len(encoded.indices):
    print(
      f'{name}: {left_out} rows are empty or longer than {settings.max_length} '
      'tokens, get no score and are dropped; --max_length raises the limit.'
    )
  without = (*inputs.NO_IDENTITY, 'methods', 'sets', 'losses.teacher')
  # Runs with the default losses do not depend on their parameters.
  if losses.safe_loss == losses.finetune_loss == 'sft':
    without += ('losses',)
  identity = harness.run_settings(settings, *without)
  run = lambda what: selection.Run(options, f'{name}_{what}', identity)

  def tune():
    return selection.fine_tune(
      run('tuned'),
      model,
      safe,
      steps=settings.controls.tune_steps,
      size=min(settings.controls.tune_batch, len(safe.indices)),
      rate=settings.adapters.rate,
    )

  def learn(form):
    to_rank = encode('rows to rank', losses.finetune_loss)
    learnt = selection.learn_scores(
      run(form),
      model,
      to_rank,
      encode('safe rows', losses.safe_loss),
      settings.selector,
      rate=settings.adapters.rate,
      losses=(losses.safe_loss, losses.finetune_loss),
      full=form == 'seal_full',
    ).scores
    # A comparison may be too long although its chosen answer is not.
    scores = np.full(len(sets.finetune), np.nan)
    scores[to_rank.indices] = learnt
    return scores[encoded.indices]

  fitting = [sets.finetune[i] for i in encoded.indices]
  compute = selection.control_scores(
    model,
    encoded,
    safe,
    reference_rows,
    tune,
    tuple([*map(rows.as_text, part)] for part in (fitting, sets.safe)),
  )
  compute |= {form: lambda form=form: learn(form) for form in selection.FORMS}
  scores: dict[str, np.ndarray] = {}
  seconds: dict[str, float] = {}
  count = max(one.row for one in sets.finetune) + 1
  for key in (n for n in TITLES if n in settings.methods and n in compute):
    start = time.monotonic()
    scores[key] = np.full(count, np.nan)
    # A row with several examples gets the lowest of their scores.
    np.fmin.at(scores[key], [one.row for one in fitting], compute[key]())
    seconds[key] = time.monotonic() - start
  return ranking.Ranking(scores, seconds)


def check(settings: Settings) -> None:
  """Raises SettingsError for settings that contradict each other."""
  inputs.check(settings)
  if settings.score not in settings.methods:
    raise harness.SettingsError(
      f'score={settings.score} is not among methods={settings.methods}: add it '
      'there, or take another score.'
    )
  losses = settings.losses
  distilled = 'distillation' in (losses.safe_loss, losses.finetune_loss)
  if distilled != bool(losses.teacher):
    raise harness.SettingsError(
      'the loss distillation and --teacher=DIR go together; the teacher has '
      'the tokenizer of --model.'
    )


def rank_files(options: harness.Options) -> harness.Report:
  """Ranks a user's file and writes its scores and the kept rows."""
  settings, files = options.settings, options.settings.files

  def read(path, loss):
    # None allows both: losses of single answers take the chosen one.
    kind = 'comparisons' if loss in objectives.COMPARISONS else None
    return rows.read(path, skip=files.skip, kind=kind)

  to_rank = read(files.finetune_data, settings.losses.finetune_loss)
  safe = read(files.safe_data, settings.losses.safe_loss)
  unsafe = []
  if files.unsafe_data:
    unsafe = rows.read(files.unsafe_data, skip=files.skip).examples
  sets = rows.Sets(to_rank.examples, np.array([]), safe.examples, unsafe)
  ranked = rank(options, 'user', load_model(settings), sets)
  total = len(to_rank.raw)
  scores = {
    n: np.concatenate([s, np.full(total - len(s), np.nan)])
    for n, s in ranked.scores.items()
  }
  mask = measures.keep_highest(scores[settings.score], settings.keep)
  folder = pathlib.Path(files.output or options.workdir)
  ranking.write(folder, ranked._replace(scores=scores), mask, to_rank.raw)
  results = harness.Results()
  results.add(rows=total, kept=mask.sum())
  for name, seconds in ranked.seconds.items():
    results.add({'score': name}, seconds=seconds)
  print(f'{int(mask.sum())} of {total} rows kept by {settings.score}: {folder}')
  return harness.Report(results, rows='score', titles=TITLES)


def load_model(settings: Settings) -> tuned_models.TunedModel:
  """Loads the model, and the teacher of distillation."""
  losses = settings.losses
  return inputs.load_tuned_model(
    settings, beta=losses.beta, teacher=losses.teacher
  )


def main(options: harness.Options) -> harness.Report:
  """Ranks a user's rows or known rows, and writes the scores."""
  settings = options.settings
  if settings.files.finetune_data:
    return rank_files(options)
  if not settings.sets:
    raise harness.SettingsError(
      'there are no rows to rank: give --finetune_data=F.jsonl and '
      '--safe_data=S.jsonl, or --sets=shuffled,harmless.'
    )
  for name in settings.sets:
    inputs.require_data(options, name)
  model = load_model(settings)
  results = harness.Results()
  for name in settings.sets:
    sets = inputs.compose(options, name, model.tokenizer)
    ranked = rank(options, name, model, sets)
    ranking.judge(results, name, sets, ranked, settings.keep)
    mask = measures.keep_highest(ranked.scores[settings.score], settings.keep)
    raw = [ranking.as_raw(one) for one in sets.finetune]
    folder = pathlib.Path(options.workdir) / 'rows' / name
    ranking.write(folder, ranked, mask, raw, sets.kinds)
  return harness.Report(results, rows=('rows', 'score'), titles=TITLES)


STUDY = harness.Study(main, PRESETS, check=check, renamed=RENAMED)


if __name__ == '__main__':
  harness.run(STUDY)
