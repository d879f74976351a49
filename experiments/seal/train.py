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
import json
import pathlib
import time
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.lm import (
  batches,
  generation,
  precision,
  refusals,
  row_files,
  weights,
  written,
)
from experiments.seal import controls, measures, order, rank, rows, selection

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
class Settings(precision.Precision):
  """Settings of a run.

  Attributes:
    model: a folder of Hugging Face or a .gguf file; '' for SmolLM2-135M, and
      'random' for a few random weights that read bytes.
    finetune_data: rows to train on, of a user's own; '' for known rows.
    safe_data: safe rows, likewise.
    scores: `scores.jsonl` of these rows, for the ways that keep some.
    prompts: a file of rows whose prompts are answered; their own answers may be
      missing. '' for none.
    output: a folder for the model of the first way; '' for none.
    bad_rows: whether invalid rows are refused or skipped.
    score: by which of the scores rows are kept.
    keep: the share of the rows that is kept; the paper's.
    rows_of: known rows: 'shuffled' answers among ordinary rows, 'harmless' for
      rejected ones, 'made_up' for neither data nor tokeniser.
    safe_of: what is safe for 'harmless': 'chosen' answers or 'instructions'.
    benign: ordinary rows of 'harmless' and of 'made_up'.
    chosen: chosen answers among the ordinary rows.
    unsafe: unsafe rows.
    safe: safe rows.
    anchors: further unsafe rows, for the score that takes them.
    shuffled_share: 'shuffled' has this share of all numbers of rows.
    longest: tokens of a prompt with its answer; longer rows are left out.
    layers: of how many layers, the last ones, adapters are trained; 0 for all.
    rank: of the adapters; the paper's is 16.
    rate: of Adam.
    steps: updates.
    batch_size: rows of an update; the paper has 64.
    share: of the safe loss, where it is weighted.
    new: tokens of an answer that is generated.
    ways: which are trained.
    seeds: of the order; one is run.
  """

  model: str = ''
  finetune_data: str = ''
  safe_data: str = ''
  scores: str = ''
  prompts: str = ''
  output: str = ''
  bad_rows: Literal['refuse', 'skip'] = 'refuse'
  score: str = 'seal'
  keep: Annotated[float, harness.Allowed(high=1.0)] = 0.8
  rows_of: Literal['shuffled', 'harmless', 'made_up'] = 'harmless'
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
  rate: float = 2e-3
  steps: int = 80
  batch_size: int = 8
  share: Annotated[float, harness.Allowed(high=1.0)] = 0.5
  new: int = 48
  ways: tuple[str, ...] = ('all', 'clean', 'mixture')
  seeds: int = 1


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    model='random',
    rows_of='made_up',
    benign=40,
    chosen=0,
    unsafe=40,
    safe=16,
    anchors=8,
    longest=12,
    layers=1,
    rank=4,
    steps=8,
    ways=('all', 'clean', 'mixture', 'weighted', 'surgery'),
  ),
  'user': Settings(
    longest=512, layers=8, batch_size=16, steps=500, ways=('kept', 'all')
  ),
  'paper': Settings(
    benign=1_200,
    chosen=128,
    unsafe=300,
    longest=256,
    layers=30,
    rank=16,
    rate=2e-4,
    steps=1_000,
    batch_size=64,
  ),
}


def kept_rows(path: str, score: str, share: float, count: int) -> np.ndarray:
  """Which rows of a file are kept, (rows,) of bool, by scores of `rank`.

  Raises:
    UserError: if the scores are of another file, or there is no such score.
  """
  entries = row_files.read_rows(path)
  if [row.get('row') for row in entries] != list(range(count)):
    raise harness.UserError(
      f'{path} has {len(entries)} rows, but the file has {count}: scores are '
      'of one file, in order.'
    )
  if score not in entries[0]:
    there = sorted(set(entries[0]) - {'row', 'kept', 'kind'})
    raise harness.UserError(f'{path} has no score {score!r}; it has {there}.')
  scores = [np.nan if r[score] is None else r[score] for r in entries]
  return measures.kept(np.array(scores, np.float64), share)


def both(
  run: selection.Run,
  subject: selection.Subject,
  made: selection.Made,
  safe: selection.Made,
  settings: Settings,
  way: str,
) -> Any:
  """Adapters after steps on rows and on safe rows, weighted or by surgery."""

  def losses(y, b):
    one = lambda rows, n: jnp.mean(
      selection.row_losses(subject, y, b['frozen'], rows, n)
    )
    return jnp.stack(
      [one(b['safe'], safe.longest), one(b['rows'], made.longest)]
    )

  def batch(context):
    key, step, size = context.seed_key, context.step, settings.batch_size
    at = order.batch_at(key, step, len(made.places), size)
    other = jax.random.fold_in(key, 1)
    there = order.batch_at(other, step, len(safe.places), size)
    return {
      'rows': selection.take(context.data['rows'], at),
      'safe': selection.take(context.data['safe'], there),
    }

  shares = jnp.array([settings.share, 1 - settings.share])
  adam = optax.adam(settings.rate)
  if way == 'weighted':
    oracle = bj.gradient(lambda y, b: shares @ losses(y, b))
    solver = optax.chain(oracle, adam)
  else:
    solver = optax.chain(
      bj.multi_objective(losses, 2), bj.aggregators.pcgrad(2, key=0), adam
    )
  data = {'rows': made.rows, 'safe': safe.rows}
  found = selection.train(run, subject, solver, batch, data, settings.steps)
  return jax.tree.map(lambda leaf: leaf[0], found.params)


def held(made: selection.Made) -> np.ndarray:
  """Which rows are held out: by their places, whatever is too long."""
  return made.places % HOLD_OUT == HOLD_OUT - 1


def part_of(made: selection.Made, which: np.ndarray) -> selection.Made:
  """Some of the rows."""
  at = np.flatnonzero(which)
  return made._replace(
    rows=selection.take(made.rows, at), places=made.places[at]
  )


def joined(one: selection.Made, two: selection.Made) -> selection.Made:
  """Rows of two sets."""
  put = lambda a, b: np.concatenate([np.asarray(a), np.asarray(b)])
  return selection.Made(
    {n: put(one.rows[n], two.rows[n]) for n in one.rows},
    put(one.places, two.places),
    max(one.longest, two.longest),
  )


def scored(settings: Settings, count: int) -> np.ndarray | None:
  """Which rows are kept by the file of scores; None without one."""
  if not settings.scores:
    return None
  return kept_rows(settings.scores, settings.score, settings.keep, count)


def read_sets(settings: Settings) -> tuple[rows.Sets, np.ndarray | None]:
  """Reads a user's rows, and which of them the scores keep."""
  skip = settings.bad_rows == 'skip'
  to_train = rows.read(settings.finetune_data, skip=skip)
  safe = rows.read(settings.safe_data, skip=skip)
  plain = lambda examples: [e._replace(rejected=None) for e in examples]
  kinds = np.array(['rows'] * len(to_train.examples))
  sets = rows.Sets(plain(to_train.examples), kinds, plain(safe.examples), [])
  return sets, scored(settings, len(to_train.raw))


def check(settings: Settings) -> None:
  """Raises SettingsError for settings that no run can have."""
  if unknown := set(settings.ways) - set(WAYS):
    raise harness.SettingsError(
      f'unknown ways {sorted(unknown)}; known: {", ".join(WAYS)}.'
    )
  if bool(settings.finetune_data) != bool(settings.safe_data):
    raise harness.SettingsError(
      "a user's rows are two files: --finetune_data and --safe_data."
    )
  if 'clean' in settings.ways and settings.finetune_data:
    raise harness.SettingsError(
      'which rows are clean is known of known rows only: leave out the way '
      'clean.'
    )


def main(options: harness.Options) -> None:
  """Trains in all ways and writes losses, refusals, and a model."""
  start = time.monotonic()
  settings = options.settings
  if {'kept', 'kept_mixture'} & set(settings.ways) and not settings.scores:
    raise harness.SettingsError(
      'which rows are kept is read from --scores=OUT/scores.jsonl, as rank has '
      'written it; --ways=all does without.'
    )
  folder = pathlib.Path(settings.output) if settings.output else None
  if folder is not None:
    written.require_own(options.workdir, folder)
  skip = settings.bad_rows == 'skip'
  prompts = []
  if settings.prompts:
    prompts = rows.read(settings.prompts, skip=skip, prompts_only=True).examples
  if settings.finetune_data:
    sets, keep_mask = read_sets(settings)
  else:
    rank.require_data(options, settings.rows_of)
  subject = rank.subject_of(settings)
  if not settings.finetune_data:
    sets = rank.compose(options, settings.rows_of, subject.words)
    keep_mask = scored(settings, len(sets.finetune))
  encoded = subject.make(
    sets.finetune, settings.longest, source=settings.finetune_data, skip=skip
  )
  safe = subject.make(
    sets.safe, settings.longest, source=settings.safe_data, skip=skip
  )
  if not held(encoded).any() or not held(safe).any():
    raise harness.UserError(
      f'every {HOLD_OUT}th row is held out: give more rows of either kind.'
    )
  kinds = sets.kinds[encoded.places]
  numbers = np.array([sets.finetune[i].row for i in encoded.places])
  fit, safe_fit = ~held(encoded), part_of(safe, ~held(safe))
  chosen = {'clean': kinds != 'unsafe'}
  if keep_mask is not None:
    chosen['kept'] = keep_mask[numbers]
  held_out = joined(part_of(encoded, held(encoded)), part_of(safe, held(safe)))
  of = np.concatenate([kinds[held(encoded)], ['safe'] * held(safe).sum()])
  read = selection.reader(subject, held_out)
  identity = harness.settings_of(
    settings, 'ways', 'output', 'model', 'prompts', 'new', 'scores', 'bad_rows',
    'finetune_data', 'safe_data', 'dtype',
  )  # fmt: skip
  batches.warn_of_controls(subject.words, prompts, settings.prompts)
  whole = rank.model_of(settings)[0] if prompts or folder else None
  answering = generation.maker(
    subject.tuning.config,
    new=settings.new,
    end=subject.words.end,
    dtype=settings.compute_dtype,
  )
  metrics: dict[str, float] = {}
  table: list[dict[str, Any]] = []
  texts: dict[str, list[str]] = {}

  def look(name, title, trained):
    losses = -controls.by_loss(*read(trained))
    row: dict[str, Any] = {'trained on': title}
    for kind in sorted(set(of)):
      metrics[f'loss/{kind}/{name}'] = float(losses[of == kind].mean())
      row[f'loss, {kind}'] = metrics[f'loss/{kind}/{name}']
    if prompts:
      params = subject.tuning.merged(trained, whole.params)
      texts[name] = generation.answers(
        subject.words,
        answering,
        params,
        [one.prompt for one in prompts],
        key=jax.random.key(0),
      )
      row['refusals'] = refusals.refusal_rate(texts[name])
      metrics[f'refusals/{name}'] = row['refusals']
    table.append(row)

  begin = subject.tuning.init(subject.frozen, jax.random.key(0))
  look('start', 'nothing', begin)
  for number, way in enumerate(settings.ways):
    run = selection.Run(options, way, identity)
    which = fit & chosen.get(way.removesuffix('_mixture'), True)
    subset = part_of(encoded, which)
    if way.endswith('mixture'):
      subset = joined(subset, safe_fit)
    if way in ('weighted', 'surgery'):
      trained = both(run, subject, subset, safe_fit, settings, way)
    else:
      trained = selection.fine_tuned(
        run,
        subject,
        subset,
        steps=settings.steps,
        size=min(settings.batch_size, len(subset.places)),
        rate=settings.rate,
      )
    look(way, WAYS[way], trained)
    if folder is not None and not number:
      merged = subject.tuning.merged(trained, whole.params)
      written.write(
        options.workdir,
        folder,
        '',
        lambda out, merged=merged: weights.export(
          out,
          whole.config,
          merged,
          subject.words,
          dtype=settings.export_dtype(whole.dtype),
          generation=whole.generation,
        ),
      )
      print(f'Model: {folder}')
  if texts:
    path = pathlib.Path(options.workdir) / 'answers.json'
    path.write_text(json.dumps(texts, indent=2, ensure_ascii=False))
  harness.write_table(options.workdir, table)
  path = harness.write_results(
    options, metrics=metrics, seconds=time.monotonic() - start
  )
  print(f'Results: {path}')


STUDY = harness.Study(main, PRESETS, paper='seal', binary='train', check=check)


if __name__ == '__main__':
  harness.run(STUDY)
