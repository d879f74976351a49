"""Ranks fine-tuning rows by safety: a score a row, and the rows that are kept.

Paper: Shen, Chen, Das and Chen, SEAL: Safety-enhanced Aligned LLM Fine-tuning
via Bilevel Data Selection, ICLR 2025.

    python -m experiments.seal.rank --preset=quick --data_dir=LLM
    python -m experiments.seal.rank --preset=user --model=DIR \
      --finetune_data=F.jsonl --safe_data=S.jsonl --keep=0.8 --output=OUT

Expected: on shuffled answers the selector is level with the loss of the first
model; between rejected and chosen answers the excess loss is above both.
Time: 20 minutes on one core for `quick`, of a model of 135 M parameters.

With files, OUT gets `scores.jsonl`, a line for each row of the file with its
number and all scores, higher for rows to keep, and `kept.jsonl`, the rows that
are kept, as they were. Without, known rows are ranked, and every score is
judged by who would be dropped. Needs the extra `llm`, except for `smoke`.
"""

import dataclasses
import functools
import json
import pathlib
import time
from typing import Annotated, Any, NamedTuple

import numpy as np

from experiments import harness
from experiments.lm import objectives
from experiments.seal import inputs, measures, rows, selection, subjects

TITLES = {
  'seal': 'SEAL',
  'seal_full': 'SEAL, with the third sequence',
  'initial_loss': 'loss of the first model',
  'tuned_loss': 'loss after tuning on safe rows',
  'excess': 'excess loss (tuned minus first)',
  'excess_tokens': 'excess loss, by tokens',
  'distance': 'distance to safe rows',
  'distance_both': 'distance to safe and to unsafe rows',
  'gradient': 'similarity of gradients',
  'ngrams': 'hashed n-grams (DSIR)',
  'longer': 'length: the longer answer is kept',
  'shorter': 'length: the shorter answer is kept',
  'random': 'a coin',
}
LOSSES = objectives.DEMONSTRATIONS + objectives.COMPARISONS
# `kto` compares rows with one another: it is no loss of a single row.
ROW_LOSSES = tuple(name for name in LOSSES if name != 'kto')


@dataclasses.dataclass(frozen=True)
class Losses:
  """What the selector sees; controls see the answers that are to be learnt.

  Attributes:
    safe_loss: what is to stay low on the safe rows, a name of
      `experiments.lm.objectives`: of their answers, or of comparisons.
    finetune_loss: what the rows to rank cost, also a name of
      `experiments.lm.objectives`.
    beta: of the losses that have a reference.
    teacher: of distillation: a folder or file, as `model`.
  """

  safe_loss: Annotated[str, harness.Among(LOSSES)] = 'sft'
  finetune_loss: Annotated[str, harness.Among(ROW_LOSSES)] = 'sft'
  beta: float = 0.1
  teacher: str = ''


@dataclasses.dataclass(frozen=True)
class Tuning:
  """The model that is tuned on safe rows, for the controls.

  Attributes:
    tune_steps: updates.
    tune_batch: rows of an update.
  """

  tune_steps: int = 48
  tune_batch: int = 8


_SELECTOR = selection.Selector()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(inputs.Settings):
  """Settings of a run.

  Attributes:
    sets: known rows: 'shuffled' answers among ordinary rows, 'harmless' for
      rejected ones, 'made_up' for neither data nor tokeniser.
    methods: the scores.
    selector: how scores are learnt.
    losses: of the selector.
    controls: of the model that is tuned on safe rows.
  """

  sets: Annotated[
    tuple[str, ...], harness.Allowed(empty=True), harness.Among(inputs.SETS)
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
    known=inputs.Known(benign=40, chosen=8, unsafe=14, safe=16, anchors=8),
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
}


class Ranked(NamedTuple):
  """Scores of rows by name, by place in the file or set; NaN without one."""

  scores: dict[str, np.ndarray]
  seconds: dict[str, float]


def rank(
  options: harness.Options, name: str, subject: subjects.Subject, sets: Any
) -> Ranked:
  """All scores of the rows of a set."""
  settings, files = options.settings, options.settings.files
  losses = settings.losses
  paths = {
    'rows to rank': files.finetune_data,
    'safe rows': files.safe_data,
    'unsafe rows': files.unsafe_data,
  }
  make = lambda what, examples, loss='sft': subject.make(
    examples,
    settings.max_length,
    loss=loss,
    source=paths[what] or f'{name}, {what}',
    skip=files.skip,
  )
  made, safe = make('rows to rank', sets.finetune), make('safe rows', sets.safe)
  anchors = make('unsafe rows', sets.anchors) if sets.anchors else None
  if left := len(sets.finetune) - len(made.places):
    print(
      f'{name}: {left} rows that are empty or longer than '
      f'{settings.max_length} tokens have no score and are not kept; '
      '--max_length lets rows be longer.'
    )
  without = (*inputs.NO_IDENTITY, 'methods', 'sets', 'losses.teacher')
  # Only a run of other losses depends on them.
  if losses.safe_loss == losses.finetune_loss == 'sft':
    without += ('losses',)
  identity = harness.settings_of(settings, *without)
  kept_in = lambda what: selection.Run(options, f'{name}_{what}', identity)

  def tuned():
    return selection.fine_tuned(
      kept_in('tuned'),
      subject,
      safe,
      steps=settings.controls.tune_steps,
      size=min(settings.controls.tune_batch, len(safe.places)),
      rate=settings.adapters.rate,
    )

  @functools.cache
  def seen():
    """Controls see answers; what the selector sees may be comparisons."""
    own, other = made, safe
    if losses.finetune_loss != 'sft':
      own = make('rows to rank', sets.finetune, losses.finetune_loss)
    if losses.safe_loss != 'sft':
      other = make('safe rows', sets.safe, losses.safe_loss)
    return own, other

  def selected(form):
    own, other = seen()
    learnt = selection.selected(
      kept_in(form),
      subject,
      own,
      other,
      settings.selector,
      rate=settings.adapters.rate,
      losses=(losses.safe_loss, losses.finetune_loss),
      full=form == 'seal_full',
    ).scores
    # A comparison may be too long where its answer alone is not.
    scores = np.full(len(sets.finetune), np.nan)
    scores[own.places] = learnt
    return scores[made.places]

  fitting = [sets.finetune[i] for i in made.places]
  texts = fitting, sets.safe
  ways = selection.control_scores(
    subject,
    made,
    safe,
    anchors,
    tuned,
    tuple([rows.text_of(one) for one in part] for part in texts),
  )
  ways |= {form: lambda form=form: selected(form) for form in selection.FORMS}
  found: dict[str, np.ndarray] = {}
  seconds: dict[str, float] = {}
  count = max(one.row for one in sets.finetune) + 1
  for key in (n for n in TITLES if n in settings.methods and n in ways):
    start = time.monotonic()
    found[key] = np.full(count, np.nan)
    # Of several instances of one row, the lowest.
    np.fmin.at(found[key], [one.row for one in fitting], ways[key]())
    seconds[key] = time.monotonic() - start
  return Ranked(found, seconds)


def write(
  folder: pathlib.Path,
  ranked: Ranked,
  kept: np.ndarray,
  raw: Any,
  kinds: Any = None,
) -> None:
  """Writes `scores.jsonl`, with all rows, and `kept.jsonl`.

  Args:
    folder: to be made.
    ranked: the scores.
    kept: which rows are, (rows,) of bool.
    raw: the rows as they were, None for those that are none.
    kinds: what is known of them, if it is.
  """
  folder.mkdir(parents=True, exist_ok=True)
  plain = lambda x: None if np.isnan(x) else float(f'{x:.6g}')
  with (folder / 'scores.jsonl').open('w', encoding='utf-8') as file:
    for i in range(len(kept)):
      row: dict[str, Any] = {'row': i, 'kept': bool(kept[i])}
      if kinds is not None:
        row['kind'] = str(kinds[i])
      row |= {n: plain(scores[i]) for n, scores in ranked.scores.items()}
      file.write(json.dumps(row) + '\n')
  with (folder / 'kept.jsonl').open('w', encoding='utf-8') as file:
    for i in np.flatnonzero(kept):
      file.write(json.dumps(raw[i], ensure_ascii=False) + '\n')


def raw_of(example: rows.Example) -> dict[str, Any]:
  """An example as a row that is read back."""
  prompt = example.prompt
  if not isinstance(prompt, str):
    prompt = [dict(message) for message in prompt]
  if example.rejected is not None:
    pair = {'chosen': example.answer, 'rejected': example.rejected}
    return {'prompt': prompt, **pair}
  return {'prompt': prompt, 'response': example.answer}


def judge(
  results: harness.Results,
  name: str,
  sets: rows.Sets,
  ranked: Ranked,
  keep: float,
) -> None:
  """Adds numbers of all scores of a set of known rows.

  `auroc` and `auprc` of rejected answers are `_style_matched` against chosen
  answers and `_ordinary` against all others, where style tells much.
  """
  against = {'': np.ones(len(sets.kinds), bool)}
  if name != 'shuffled' and np.any(sets.kinds == 'chosen'):
    against = {
      '_style_matched': sets.kinds != 'benign',
      '_ordinary': sets.kinds != 'chosen',
    }
  for key, scores in ranked.scores.items():
    at = {'score': key, 'rows': name}
    for suffix, which in against.items():
      there = which & ~np.isnan(scores)
      for area, measure in measures.AREAS.items():
        found = measures.resampled(measure, scores[there], sets.unsafe[there])
        results.put(at, {f'{area}{suffix}': found})
    results.put(at, measures.drop_rates(scores, sets.unsafe, keep))
    results.add(at, seconds=ranked.seconds[key])


def check(settings: Settings) -> None:
  """Raises SettingsError for settings that no run can have."""
  inputs.check(settings)
  if settings.score not in settings.methods:
    raise harness.SettingsError(
      f'score={settings.score} is not among methods={settings.methods}: rows '
      'cannot be kept by it.'
    )
  losses = settings.losses
  distilled = 'distillation' in (losses.safe_loss, losses.finetune_loss)
  if distilled != bool(losses.teacher):
    raise harness.SettingsError(
      'the loss distillation and --teacher=DIR go together, a model with the '
      'words of --model.'
    )


def rank_files(options: harness.Options) -> harness.Report:
  """Ranks a user's file and writes its scores and the rows that are kept."""
  settings, files = options.settings, options.settings.files

  def read(path, loss):
    # Other losses take the chosen answer of a comparison.
    pairs = True if loss in objectives.COMPARISONS else None
    return rows.read(path, skip=files.skip, comparisons=pairs)

  to_rank = read(files.finetune_data, settings.losses.finetune_loss)
  safe = read(files.safe_data, settings.losses.safe_loss)
  anchors = []
  if files.unsafe_data:
    anchors = rows.read(files.unsafe_data, skip=files.skip).examples
  sets = rows.Sets(to_rank.examples, np.array([]), safe.examples, anchors)
  ranked = rank(options, 'user', load_subject(settings), sets)
  total = len(to_rank.raw)
  scores = {
    n: np.concatenate([s, np.full(total - len(s), np.nan)])
    for n, s in ranked.scores.items()
  }
  kept = measures.kept(scores[settings.score], settings.keep)
  folder = pathlib.Path(files.output or options.workdir)
  write(folder, ranked._replace(scores=scores), kept, to_rank.raw)
  results = harness.Results()
  results.add(rows=total, kept=kept.sum())
  for name, seconds in ranked.seconds.items():
    results.add({'score': name}, seconds=seconds)
  print(f'{int(kept.sum())} of {total} rows kept by {settings.score}: {folder}')
  return harness.Report(results, rows='score', titles=TITLES)


def load_subject(settings: Settings) -> subjects.Subject:
  """The model, and the teacher of distillation."""
  losses = settings.losses
  return inputs.load_subject(settings, beta=losses.beta, teacher=losses.teacher)


def main(options: harness.Options) -> harness.Report:
  """Ranks known rows, or a user's, and writes the scores."""
  settings = options.settings
  if settings.files.finetune_data:
    return rank_files(options)
  if not settings.sets:
    raise harness.SettingsError(
      'nothing is to be ranked: give --finetune_data=F.jsonl and '
      '--safe_data=S.jsonl, or --sets=shuffled,harmless.'
    )
  for name in settings.sets:
    inputs.require_data(options, name)
  subject = load_subject(settings)
  results = harness.Results()
  for name in settings.sets:
    sets = inputs.compose(options, name, subject.words)
    ranked = rank(options, name, subject, sets)
    judge(results, name, sets, ranked, settings.keep)
    kept = measures.kept(ranked.scores[settings.score], settings.keep)
    raw = [raw_of(one) for one in sets.finetune]
    folder = pathlib.Path(options.workdir) / 'rows' / name
    write(folder, ranked, kept, raw, sets.kinds)
  return harness.Report(results, rows=('rows', 'score'), titles=TITLES)


STUDY = harness.Study(
  main, PRESETS, paper='seal', binary='rank', check=check, renamed=RENAMED
)


if __name__ == '__main__':
  harness.run(STUDY)
