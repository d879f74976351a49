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
from typing import Annotated, Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments import harness
from experiments.lm import (
  batches,
  decoder,
  lora,
  objectives,
  precision,
  tokenizer,
  tuning,
  weights,
)
from experiments.lm import config as config_lib
from experiments.seal import measures, rows, selection

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
ENDS = {
  'auroc': measures.auroc,
  'auprc': measures.auprc,
}


@dataclasses.dataclass(frozen=True)
class Settings(precision.Precision):
  """Settings of a run.

  Attributes:
    model: a folder of Hugging Face or a .gguf file; '' for SmolLM2-135M, and
      'random' for a few random weights that read bytes.
    finetune_data: rows to rank, of a user's own; '' for known rows.
    safe_data: safe rows, likewise.
    unsafe_data: unsafe rows, if there are any, for the score that takes them.
    output: where scores and kept rows are written; '' for the workdir.
    bad_rows: whether invalid rows are refused or skipped.
    safe_loss: what is to stay low on the safe rows, a name of
      `experiments.lm.objectives`: of their answers, or of comparisons. It is
      the selector's; controls take the answers that are to be learnt.
    finetune_loss: what the rows to rank cost, likewise; not kto, which is no
      loss of a single row.
    beta: of the losses that have a reference.
    teacher: of distillation: a folder or file, as `model`.
    score: by which of the scores rows are kept.
    keep: the share of the rows that is kept; the paper's.
    sets: known rows: 'shuffled' answers among ordinary rows, 'harmless' for
      rejected ones, 'made_up' for neither data nor tokeniser.
    safe_of: what is safe for 'harmless': 'chosen' answers or 'instructions'.
    benign: ordinary rows of 'harmless' and of 'made_up'.
    chosen: chosen answers among the ordinary rows.
    unsafe: unsafe rows; by default a fifth of all rows, as in the paper.
    safe: safe rows.
    anchors: further unsafe rows, for the score that takes them.
    shuffled_share: 'shuffled' has this share of all numbers of rows.
    longest: tokens of a prompt with its answer; longer rows have no score.
    layers: of how many layers, the last ones, adapters are trained; 0 for all,
      as in the paper. What leaves the others is kept, for all rows.
    rank: of the adapters; the paper's is 16.
    rate: of Adam, for adapters.
    epochs: of the rows; the paper has 3.
    batch_size: rows of either kind a step; the paper has 64.
    share: of the safe loss in the first epoch; the paper's.
    decay: by which the share of the safe loss falls each epoch; the paper's.
    selector_rate: step size of the scores' descent.
    weights: of `bj.solvers.seal`; the paper has 'softmax', by Adam.
    tune_steps: of the model that is tuned on safe rows, for the controls.
    tune_batch: rows a step, likewise.
    methods: the scores.
    seeds: of data and order; one is run.
  """

  model: str = ''
  finetune_data: str = ''
  safe_data: str = ''
  unsafe_data: str = ''
  output: str = ''
  bad_rows: Literal['refuse', 'skip'] = 'refuse'
  safe_loss: str = 'sft'
  finetune_loss: str = 'sft'
  beta: float = 0.1
  teacher: str = ''
  score: str = 'seal'
  keep: Annotated[float, harness.Allowed(high=1.0)] = 0.8
  sets: Annotated[tuple[str, ...], harness.Allowed(empty=True)] = (
    'shuffled',
    'harmless',
  )
  safe_of: Literal['chosen', 'instructions'] = 'chosen'
  benign: int = 384
  chosen: Annotated[int, harness.Allowed(low=0)] = 128
  unsafe: int = 128
  safe: int = 192
  anchors: Annotated[int, harness.Allowed(low=0)] = 32
  shuffled_share: Annotated[float, harness.Allowed(high=1.0)] = 0.375
  longest: int = 96
  layers: Annotated[int, harness.Allowed(low=0)] = 4
  rank: int = 8
  rate: float = 4e-3
  epochs: int = 2
  batch_size: int = 8
  share: Annotated[float, harness.Allowed(high=1.0)] = 1.0
  decay: Annotated[float, harness.Allowed(low=0.0, high=1.0)] = 0.03
  selector_rate: float = 1.0
  weights: Literal['softmax', 'mirror', 'sigmoid'] = 'mirror'
  tune_steps: int = 48
  tune_batch: int = 8
  methods: tuple[str, ...] = tuple(n for n in TITLES if n != 'seal_full')
  seeds: int = 1


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    model='random',
    sets=('made_up',),
    benign=40,
    chosen=8,
    unsafe=14,
    safe=16,
    anchors=8,
    longest=12,
    layers=1,
    rank=4,
    tune_steps=8,
    methods=tuple(TITLES),
  ),
  'user': Settings(sets=(), longest=512, batch_size=16, epochs=3),
  # The published sizes; their rows and models are larger than what is here.
  'paper': Settings(
    benign=1_200,
    chosen=128,
    unsafe=300,
    longest=256,
    layers=30,
    rank=16,
    rate=2e-4,
    epochs=3,
    batch_size=64,
    tune_steps=200,
    shuffled_share=1.0,
    methods=tuple(TITLES),
  ),
}


def model_of(settings: Any) -> tuple[weights.Model, tokenizer.Tokenizer]:
  """A model by its path: '' for SmolLM2, 'random' for a few weights.

  Args:
    settings: with `model`, and a `Precision`.
  """
  path, dtype = settings.model, settings.stored_dtype
  if path != 'random':
    model = weights.load(path or weights.smollm2(), dtype)
    return model, tokenizer.load(model.vocabulary, model.config)
  config = config_lib.tiny(width=16)
  params = dict(decoder.init(config, 0, dtype or jnp.float32))
  return weights.Model(config, params, None), tokenizer.of_bytes()


def subject_of(settings: Any) -> selection.Subject:
  """The model of the settings, with adapters of its last layers."""
  model, words = model_of(settings)
  teacher, shape = None, objectives.Shape()
  if isinstance(settings, Settings):  # What only fine-tunes has no such loss.
    if settings.teacher:
      teacher = weights.teacher(
        settings.teacher, model, words, settings.stored_dtype
      )
    shape = objectives.Shape(settings.beta, teacher=teacher and teacher.config)
  how = tuning.Tuning(
    model.config,
    rank=settings.rank,
    alpha=float(settings.rank),
    weights=lora.WEIGHTS if settings.model == 'random' else ('q', 'v'),
    layers=min(settings.layers, model.config.layers) or None,
    dtype=settings.compute_dtype,
  )
  below, frozen = how.split(model.params)
  if teacher is not None:
    frozen = {**frozen, 'teacher': teacher.params}
  return selection.Subject(how, frozen, below, words, shape)


def sizes_of(settings: Any, name: str) -> rows.Sizes:
  """How many rows a set has."""
  each = rows.Sizes(
    settings.benign,
    settings.chosen,
    settings.unsafe,
    settings.safe,
    settings.anchors,
  )
  if name != 'shuffled':
    return each
  part = lambda count: round(settings.shuffled_share * count)
  return rows.Sizes(
    part(each.benign + each.chosen), 0, part(each.unsafe), part(each.safe),
    part(each.anchors),
  )  # fmt: skip


def compose(
  options: harness.Options, name: str, words: tokenizer.Tokenizer
) -> rows.Sets:
  """Known rows of a set, those that fit into the length."""
  settings = options.settings
  sizes, seed = sizes_of(settings, name), options.seeds[0]
  if name == 'made_up':
    return rows.made_up(sizes, seed=seed)
  require_data(options, name)

  def fits(example):
    tokens, _ = batches.encode_answer(words, example.prompt, example.answer)
    return len(tokens) <= settings.longest

  if name == 'shuffled':
    return rows.control(options.data_dir, sizes, fits, seed=seed)
  return rows.harmless(
    options.data_dir, sizes, fits, seed=seed, safe_of=settings.safe_of
  )


def require_data(options: harness.Options, name: str) -> None:
  """Raises MissingDataError if files of known rows are missing."""
  if name == 'made_up':
    return
  if options.data_dir is None:
    raise harness.MissingDataError(
      f'the rows are read from --data_dir, a folder with {rows.WHERE}; or give '
      'files of your own: --preset=user --finetune_data=F.jsonl '
      '--safe_data=S.jsonl.'
    )
  rows.require(options.data_dir, name, options.settings.safe_of)


class Ranked(NamedTuple):
  """Scores of rows by name, by place in the file or set; NaN without one."""

  scores: dict[str, np.ndarray]
  seconds: dict[str, float]


def rank(
  options: harness.Options, name: str, subject: selection.Subject, sets: Any
) -> Ranked:
  """All scores of the rows of a set."""
  settings = options.settings
  files = {
    'rows to rank': settings.finetune_data,
    'safe rows': settings.safe_data,
    'unsafe rows': settings.unsafe_data,
  }
  make = lambda what, examples, loss='sft': subject.make(
    examples,
    settings.longest,
    loss=loss,
    source=files[what] or f'{name}, {what}',
    skip=settings.bad_rows == 'skip',
  )
  made, safe = make('rows to rank', sets.finetune), make('safe rows', sets.safe)
  anchors = make('unsafe rows', sets.anchors) if sets.anchors else None
  count = max(one.row for one in sets.finetune) + 1
  left = len(sets.finetune) - len(made.places)
  if left:
    print(
      f'{name}: {left} rows that are empty or longer than {settings.longest} '
      'tokens have no score and are not kept; --longest lets rows be longer.'
    )
  found: dict[str, np.ndarray] = {}
  seconds: dict[str, float] = {}

  # What a kept run depends on, beside its data.
  without = ('methods', 'output', 'score', 'keep', 'sets', 'bad_rows')
  without += ('model', 'finetune_data', 'safe_data', 'unsafe_data', 'dtype')
  # Runs from before there was a choice of losses go on.
  plain = settings.safe_loss == settings.finetune_loss == 'sft'
  without += ('teacher',) + plain * ('safe_loss', 'finetune_loss', 'beta')
  identity = harness.settings_of(settings, *without)
  kept_in = lambda what: selection.Run(options, f'{name}_{what}', identity)

  def tuned():
    return selection.fine_tuned(
      kept_in('tuned'),
      subject,
      safe,
      steps=settings.tune_steps,
      size=min(settings.tune_batch, len(safe.places)),
      rate=settings.rate,
    )

  @functools.cache
  def seen():
    """Controls see answers; what the selector sees may be comparisons."""
    own, held = made, safe
    if settings.finetune_loss != 'sft':
      own = make('rows to rank', sets.finetune, settings.finetune_loss)
    if settings.safe_loss != 'sft':
      held = make('safe rows', sets.safe, settings.safe_loss)
    return own, held

  def selected(form):
    own, held = seen()
    found = selection.selected(
      kept_in(form),
      subject,
      own,
      held,
      losses=(settings.safe_loss, settings.finetune_loss),
      epochs=settings.epochs,
      size=min(settings.batch_size, len(own.places), len(held.places)),
      rate=settings.rate,
      selector_rate=settings.selector_rate,
      weights=settings.weights,
      share=settings.share,
      decay=settings.decay,
      full=form == 'seal_full',
    ).scores
    # A comparison may be too long where its answer alone is not.
    scores = np.full(len(sets.finetune), np.nan)
    scores[own.places] = found
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


def judged(
  name: str, sets: rows.Sets, ranked: Ranked, keep: float
) -> tuple[dict[str, float], list[dict[str, Any]]]:
  """Metrics of all scores of a set of known rows, and its table.

  `auroc` and `auprc` of shuffled answers have no further name; of rejected ones
  they are `_style_matched` against chosen answers and `_ordinary` against all
  others, where style tells much.
  """
  against = {'': np.ones(len(sets.kinds), bool)}
  if name != 'shuffled' and np.any(sets.kinds == 'chosen'):
    against = {
      '_style_matched': sets.kinds != 'benign',
      '_ordinary': sets.kinds != 'chosen',
    }
  metrics: dict[str, float] = {}
  table = []
  for key, scores in ranked.scores.items():
    row: dict[str, Any] = {'rows': name, 'score': TITLES[key]}
    for suffix, which in against.items():
      there = which & ~np.isnan(scores)
      for end, measure in ENDS.items():
        found = measures.resampled(measure, scores[there], sets.unsafe[there])
        metrics |= measures.with_name(found, f'{end}{suffix}/{key}')
        row[f'{end}{suffix}'.replace('_', ' ')] = measures.interval(found)
    rates = measures.drop_rates(scores, sets.unsafe, keep)
    for what, value in rates.items():
      metrics[f'{what}/{name}/{key}'] = value
      row[what.replace('_', ' ')] = value
    metrics[f'seconds/{name}/{key}'] = ranked.seconds[key]
    table.append(row)
  return metrics, table


def check(settings: Settings) -> None:
  """Raises SettingsError for settings that no run can have."""
  if unknown := set(settings.methods) - set(TITLES):
    raise harness.SettingsError(
      f'unknown methods {sorted(unknown)}; known: {", ".join(TITLES)}.'
    )
  known = ('shuffled', 'harmless', 'made_up')
  if unknown := set(settings.sets) - set(known):
    raise harness.SettingsError(
      f'unknown sets {sorted(unknown)}; known: {", ".join(known)}.'
    )
  if bool(settings.finetune_data) != bool(settings.safe_data):
    raise harness.SettingsError(
      "a user's rows are two files: --finetune_data, which is ranked, and "
      '--safe_data, rows that are safe.'
    )
  if settings.score not in settings.methods:
    raise harness.SettingsError(
      f'score={settings.score} is not among methods={settings.methods}: rows '
      'cannot be kept by it.'
    )
  for flag, loss in (
    ('safe_loss', settings.safe_loss),
    ('finetune_loss', settings.finetune_loss),
  ):
    known = objectives.DEMONSTRATIONS + objectives.COMPARISONS
    if flag == 'finetune_loss':
      known = tuple(n for n in known if n != 'kto')
    if loss not in known:
      raise harness.SettingsError(
        f'--{flag}={loss}: known are {", ".join(known)}.'
      )
  distilled = 'distillation' in (settings.safe_loss, settings.finetune_loss)
  if distilled != bool(settings.teacher):
    raise harness.SettingsError(
      'the loss distillation and --teacher=DIR go together, a model with the '
      'words of --model.'
    )
  if settings.rank < 1:
    raise harness.SettingsError('rank is at least 1: adapters are trained.')


def of_user(options: harness.Options) -> None:
  """Ranks a user's file and writes its scores and the rows that are kept."""
  settings = options.settings
  skip = settings.bad_rows == 'skip'

  def read(path, loss):
    # Other losses take the chosen answer of a comparison.
    pairs = True if loss in objectives.COMPARISONS else None
    return rows.read(path, skip=skip, comparisons=pairs)

  to_rank = read(settings.finetune_data, settings.finetune_loss)
  safe = read(settings.safe_data, settings.safe_loss)
  anchors = []
  if settings.unsafe_data:
    anchors = rows.read(settings.unsafe_data, skip=skip).examples
  sets = rows.Sets(to_rank.examples, np.array([]), safe.examples, anchors)
  start = time.monotonic()
  ranked = rank(options, 'user', subject_of(settings), sets)
  total = len(to_rank.raw)
  scores = {
    n: np.concatenate([s, np.full(total - len(s), np.nan)])
    for n, s in ranked.scores.items()
  }
  ranked = ranked._replace(scores=scores)
  kept = measures.kept(scores[settings.score], settings.keep)
  folder = pathlib.Path(settings.output or options.workdir)
  write(folder, ranked, kept, to_rank.raw)
  metrics = {'rows': float(total), 'kept': float(kept.sum())}
  metrics |= {f'seconds/user/{n}': s for n, s in ranked.seconds.items()}
  harness.write_results(
    options, metrics=metrics, seconds=time.monotonic() - start
  )
  print(f'{int(kept.sum())} of {total} rows kept by {settings.score}: {folder}')


def main(options: harness.Options) -> None:
  """Ranks known rows, or a user's, and writes scores, table and results."""
  settings = options.settings
  if settings.finetune_data:
    of_user(options)
    return
  if not settings.sets:
    raise harness.SettingsError(
      'nothing is to be ranked: give --finetune_data=F.jsonl and '
      '--safe_data=S.jsonl, or --sets=shuffled,harmless.'
    )
  start = time.monotonic()
  for name in settings.sets:
    require_data(options, name)
  subject = subject_of(settings)
  metrics: dict[str, float] = {}
  table: list[dict[str, Any]] = []
  for name in settings.sets:
    sets = compose(options, name, subject.words)
    ranked = rank(options, name, subject, sets)
    found, lines = judged(name, sets, ranked, settings.keep)
    metrics |= found
    table += lines
    kept = measures.kept(ranked.scores[settings.score], settings.keep)
    raw = [raw_of(one) for one in sets.finetune]
    folder = pathlib.Path(options.workdir) / 'rows' / name
    write(folder, ranked, kept, raw, sets.kinds)
  harness.write_table(options.workdir, table)
  path = harness.write_results(
    options, metrics=metrics, seconds=time.monotonic() - start
  )
  print(f'Results: {path}')


STUDY = harness.Study(main, PRESETS, paper='seal', binary='rank', check=check)


if __name__ == '__main__':
  harness.run(STUDY)
