"""Compares methods where demonstrations and comparisons pull a model apart.

Paper: Fernando, Shen, Ram, Zhou, Samulowitz, Baracaldo and Chen, Understanding
Forgetting in LLM Supervised Fine-Tuning and Preference Learning, 2024.

    python -m experiments.xright.conflict --preset=quick --data_dir=LLM

Expected: ALRIGHT and MAXRIGHT are nearer to the best value of both objectives
than training in stages and than each objective alone. Time: 30 minutes on 2
cores.

A small decoder learns other texts from scratch, and then both objectives of
`conflict_data`. All methods take the same number of gradients. Each has its own
step size and mixing ratio, tuned on rows that are not reported; grids are
extended at their edges. The front of a method has its losses over mixing
ratios; MGDA has no ratio, so one point.

A fifth of the labels of comparisons are wrong: their loss is its mean over
these labels, at least 0.500, so a model cannot solve it by large margins alone.

The preset `long` has 1,000 updates or more per stage; `smollm2` trains adapters
of SmolLM2-135M-Instruct.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated

import numpy as np

from experiments import harness
from experiments.lm import objectives, weights
from experiments.lm import scratch as scratch_lib
from experiments.xright import (
  conflict_data,
  conflict_plot,
  fronts,
  methods,
  model_measures,
  pareto,
  runs,
)
from experiments.xright import problem as problem_lib

COMPARED = (
  *('sequential', 'reversed', 'replay', 'mix', 'alright', 'maxright', 'mgda'),
)


@dataclasses.dataclass(frozen=True)
class Grid:
  """Points that are tried before a run is reported.

  Attributes:
    rates: step sizes of Adam.
    limits: smallest and largest mixing ratio of an extended grid.
    widenings: largest number of extensions.
  """

  rates: tuple[float, ...] = (5e-4, 2e-3)
  limits: tuple[float, float] = (0.05, 0.95)
  widenings: Annotated[int, harness.Allowed(low=0)] = 2


_KNOWN = harness.Among(methods.TITLES)
_SIZES = problem_lib.Sizes(buckets=(96,), held_out=96, refresh=64)
_SCRATCH = scratch_lib.Scratch(updates=600)
_GRID = Grid()
_ADAPTERS = runs.Adapters(rank=0)
_MAXRIGHT = runs.Maxright(refresh_every=20)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(runs.Settings):
  """Settings of a run.

  Attributes:
    model: 'scratch' for a small decoder that is trained first; otherwise a
      folder of Hugging Face or .gguf file, '' for SmolLM2-135M-Instruct.
    conflict: the data of both objectives.
    longest: characters of the longest answer.
    wrong_labels: fraction of comparisons with exchanged answers, in the mean.
    scratch: the small decoder and its texts.
    steps: gradients of a run; methods with two per update take half as many
      updates.
    records: measurements of a run.
    seeds: reported seeds of each method and mixing ratio.
    tuning_seeds: other seeds, of the runs for tuning.
    mixing_ratios: weights of the comparisons that are tried and reported; for
      stages, the fraction of their stage.
    grid: points that are tried.
    methods: methods that are compared.
  """

  model: str = 'scratch'
  conflict: Annotated[
    str, harness.Among(conflict_data.KINDS, conflict_data.KINDS)
  ] = 'style'
  longest: int = 150
  wrong_labels: Annotated[float, harness.Allowed(low=0, high=0.5)] = 0.2
  scratch: scratch_lib.Scratch = _SCRATCH
  steps: int = 240
  # Stages end at a record, so that forgetting is measured from there.
  records: int = 5
  seeds: int = 5
  tuning_seeds: int = 1
  mixing_ratios: tuple[float, ...] = (0.2, 0.4, 0.8)
  grid: Grid = _GRID
  methods: Annotated[tuple[str, ...], _KNOWN] = COMPARED
  rows: problem_lib.Sizes = _SIZES
  adapters: runs.Adapters = _ADAPTERS
  maxright: runs.Maxright = _MAXRIGHT


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    steps=24,
    records=2,
    seeds=2,
    scratch=scratch_lib.Scratch(width=16, hidden=32, length=32, updates=40),
    mixing_ratios=(0.3, 0.6),
    grid=Grid(rates=(1e-3, 1e-2), widenings=0),
    methods=('sequential', 'alright'),
    rows=problem_lib.Sizes(buckets=(96,), held_out=8, refresh=8),
  ),
  'long': Settings(
    scratch=scratch_lib.Scratch(),
    steps=4_000,
    records=4,
    mixing_ratios=(0.25, 0.5, 0.75),
    grid=Grid(rates=(1e-4, 4e-4, 1.6e-3), limits=(0.25, 0.75)),
    rows=problem_lib.Sizes(buckets=(96,), held_out=128, refresh=64),
  ),
  'smollm2': Settings(
    model='',
    longest=200,
    steps=600,
    records=3,
    seeds=3,
    mixing_ratios=(0.2, 0.6),
    grid=Grid(rates=(5e-4, 2e-3), widenings=0),
    methods=('sequential', 'alright'),
    rows=problem_lib.Sizes(buckets=(128,), held_out=64, refresh=32, train=384),
    adapters=runs.Adapters(layers=8),
  ),
  # The sizes of its Pythia-1b: 6 epochs of 24,000 and 8,000 samples.
  'paper': Settings(
    model='',
    longest=200,
    wrong_labels=0.0,
    steps=48_000,
    mixing_ratios=(0.01, 0.25, 0.5, 0.75, 0.99),
    grid=Grid(rates=(1.5e-5, 5e-5, 1.5e-4), limits=(0.01, 0.99)),
    rows=problem_lib.Sizes(batch_size=12, held_out=256, refresh=64),
    adapters=runs.Adapters(rank=32),
  ),
}


def check(settings: Settings) -> None:
  """Raises SettingsError for settings that contradict each other."""
  runs.check(settings)
  if settings.steps % (2 * settings.records):
    raise harness.SettingsError(
      f'steps={settings.steps} is no multiple of twice records='
      f'{settings.records}.'
    )
  low, high = settings.grid.limits
  ratios = settings.mixing_ratios
  if len(set(ratios)) < 2 or not low <= min(ratios) <= max(ratios) <= high:
    raise harness.SettingsError(
      f'--mixing_ratios={ratios}: give two or more between the limits {low:g} '
      f'and {high:g}.'
    )
  if single := set(methods.SINGLE) & set(settings.methods):
    raise harness.SettingsError(
      f'--methods has {", ".join(sorted(single))}, which are run anyway, as '
      'controls: leave them out.'
    )


def prepare(options: harness.Options) -> problem_lib.Problem:
  """Makes the rows, and loads the model or trains it first."""
  settings = options.settings
  if options.preset == 'smoke' and not options.data_dir:
    data = conflict_data.made_up(settings.conflict, longest=settings.longest)
  else:
    data = conflict_data.load(
      options.data_dir, settings.conflict, longest=settings.longest
    )
  if settings.model == 'scratch':
    texts = [example.answer for example in data.texts]
    tokenizer = scratch_lib.make_tokenizer(texts, settings.scratch.vocabulary)
    model = scratch_lib.pretrain(
      options, settings.scratch, tokenizer, data.texts
    )
  else:
    model, tokenizer = weights.load_both(settings.model, settings.stored_dtype)
  problem = problem_lib.prepare(
    model,
    tokenizer,
    settings.tuning(model.config),
    data.examples,
    settings.rows,
    folder=f'{options.workdir}/kept',
  )
  shape = objectives.Shape(smoothing=settings.wrong_labels)
  return problem._replace(shape=shape)


def summarise(
  names: tuple[str, ...],
  reported: Mapping[str, fronts.Front],
  before: Mapping[str, float],
) -> harness.Results:
  """Summarises all fronts.

  Args:
    names: of both objectives.
    reported: fronts by method, with those of one objective.
    before: measures on held-out rows before the first update.
  """
  results = harness.Results()
  held_out = {
    method: {n: front.values(f'held_out/{n}') for n in (*names, 'accuracy')}
    for method, front in reported.items()
  }
  best = {
    n: min(float(np.nanmin(values[n])) for values in held_out.values())
    for n in names
  }
  for name in names:
    results.add({'objective': name}, optimum=best[name])
    results.add({'method': 'start', 'objective': name}, loss=before[name])
  corner = [before[n] for n in names]
  norm = lambda values, unit: np.hypot(
    *((values[n][-1] - best[n]) / unit[n] for n in names)
  )
  distances = {m: norm(v, dict.fromkeys(names, 1)) for m, v in held_out.items()}
  gains = {n: before[n] - best[n] for n in names}
  scaled = {m: norm(values, gains) for m, values in held_out.items()}
  for method, front in reported.items():
    ends = {n: values[-1] for n, values in held_out[method].items()}
    for i, point in enumerate(front.points):
      if 'share' in point:
        at = {'method': method, 'share': point['share']}
        results.add(at, ideal_distance=distances[method][i])
        for name in names:
          results.add({**at, 'objective': name}, loss=ends[name][i])
    at, chosen = {'method': method}, front.chosen
    point = front.points[chosen]
    results.add(
      at,
      ideal_distance=distances[method][chosen],
      scaled_distance=scaled[method][chosen],
    )
    for name in names:
      loss = ends[name][chosen]
      lowest = np.min(held_out[method][name][:, chosen], axis=0)
      results.add(
        {**at, 'objective': name},
        loss=loss,
        gap=loss - best[name],
        forgotten=loss - lowest,
      )
    stacked = np.stack([ends[n] for n in names], axis=-1)
    areas = [
      fronts.hypervolume(stacked[:, seed], corner)
      for seed in range(stacked.shape[1])
    ]
    results.add(at, hypervolume=areas, accuracy=ends['accuracy'][chosen])
    if 'sequential' in reported and method != 'sequential':
      base = reported['sequential']
      lead = distances['sequential'][base.chosen] - distances[method][chosen]
      results.add(at, lead=lead, wins=np.sum(lead > 0))
    counts = [front.trained.history.get(f'count/gradients/{n}') for n in names]
    gradients = sum(np.mean(c[-1]) for c in counts if c is not None)
    results.add(at, gradients=gradients, trials=front.trials)
    members = stacked[..., 0].size
    results.add(at, seconds=front.trained.seconds / members)
    results.put(at, point)
    results.note(
      at,
      {
        name: f'{value:.3g}{" (edge)" if name in front.edges else ""}'
        for name, value in point.items()
      },
    )
  return results


def main(options: harness.Options) -> harness.Report:
  """Tunes and runs all methods, and compares their fronts."""
  settings = options.settings
  problem = prepare(options)
  reported = {
    name: fronts.tuned(options, problem, name) for name in methods.SINGLE
  }
  # The least losses on rows for tuning: neither MAXRIGHT nor the choice of
  # points sees held-out rows.
  optima = tuple(
    float(np.min(front.values(f'refresh/{name}')[-1]))
    for name, front in zip(problem.names, reported.values(), strict=True)
  )
  reported |= {
    name: fronts.tuned(options, problem, name, optima)
    for name in settings.methods
  }
  before = pareto.measure_start(problem)
  results = summarise(problem.names, reported, before)
  for name, accuracy in problem_lib.length_controls(problem).items():
    results.add({'method': name}, accuracy=accuracy)
  trained = {name: front.chosen_params() for name, front in reported.items()}
  for name, cosines in model_measures.cosines(problem, trained).items():
    results.add({'method': name}, cosine=cosines)
  first, second = ({'objective': name} for name in problem.names)
  return harness.Report(
    results,
    columns=(
      harness.Column('ideal_distance', 'ideal distance'),
      harness.Column('scaled_distance', 'distance of scaled gaps'),
      'hypervolume',
      harness.Column('gap', 'gap of demonstrations', first),
      harness.Column('gap', 'gap of comparisons', second),
      harness.Column('forgotten', 'demonstrations forgotten', first),
      harness.Column('cosine', "cosine of both objectives' gradients"),
      harness.Column('accuracy', 'reward accuracy'),
      harness.Column('share', 'mixing ratio'),
      harness.Column('rate', 'step size'),
      harness.Column('trials', 'points tried'),
      'gradients',
      harness.Column('seconds', 'seconds per run'),
    ),
    titles=methods.TITLES | methods.CONTROLS,
    plots={'fronts.png': conflict_plot.draw(reported, problem.names, before)},
  )


STUDY = harness.Study(main, PRESETS, check=check)


if __name__ == '__main__':
  harness.run(STUDY)
