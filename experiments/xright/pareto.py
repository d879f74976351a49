"""Measures forgetting: both objectives of a model after equal updates.

Paper: Fernando, Shen, Ram, Zhou, Samulowitz, Baracaldo and Chen, Understanding
Forgetting in LLM Supervised Fine-Tuning and Preference Learning, 2024.

    python -m experiments.xright.pareto --preset=quick --data_dir=LLM

Expected: after training in stages the model is further from the best value of
both objectives than after ALRIGHT. Time: 25 minutes on 2 cores.

The model is SmolLM2-135M-Instruct with adapters in its last layers; the layers
below run once per row. All methods have the same number of updates, each of one
objective; methods that use both gradients cost twice as much. The optimum of an
objective is the least held-out loss of all runs, and the ideal distance of a
run is the norm of its two gaps to the optima.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import jax
import numpy as np

from experiments import harness
from experiments.lm import data as data_lib
from experiments.lm import weights
from experiments.xright import methods, model_measures, pareto_plot, runs
from experiments.xright import problem as problem_lib

# Files in the folder `--data_dir`.
DEMONSTRATIONS = ('alpaca_data_safety_only.json', 'dolly_safety_only.jsonl')
COMPARISONS = 'hh_harmless_base_test.jsonl.gz'
ADVICE = (
  'give a folder with the test part of harmless-base of HH-RLHF (Anthropic) '
  f'under this name, and with {" and ".join(DEMONSTRATIONS)} (rows with an '
  'instruction and an output)'
)


@dataclasses.dataclass(frozen=True)
class Answers:
  """Answers of the first seed's models, to count refusals.

  Attributes:
    prompts: number of held-out prompts that are answered.
    answer_length: tokens of an answer.
  """

  prompts: int = 32
  answer_length: int = 32


_KNOWN = harness.Among(methods.TITLES)
_SIZES = problem_lib.Sizes(buckets=(72, 96), train=144)
_ADAPTERS = runs.Adapters(layers=8)
_OPTIMISER = runs.Optimiser(learning_rate=2e-3)
_MAXRIGHT = runs.Maxright(refresh_every=8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(runs.Settings):
  """Settings of a run; the paper's values are those of its Pythia-1b.

  Attributes:
    seeds: seeds of each method at the middle mixing ratio.
    mixing_ratios: weights lambda of the comparisons, 0.01 to 0.99 in the paper.
    methods: methods that are compared.
    few_seed_methods: methods among them that run with few_seeds only.
    few_seeds: seeds of these methods, and at the other mixing ratios.
    answers: of the trained models.
  """

  steps: int = 48
  chunk: int = 24
  seeds: int = 5
  mixing_ratios: tuple[float, ...] = (0.5,)
  methods: Annotated[tuple[str, ...], _KNOWN] = (
    *('sequential', 'alright', 'maxright', 'mix'),
  )
  few_seed_methods: Annotated[tuple[str, ...], _KNOWN] = ('mix',)
  few_seeds: int = 1
  rows: problem_lib.Sizes = _SIZES
  adapters: runs.Adapters = _ADAPTERS
  optimiser: runs.Optimiser = _OPTIMISER
  maxright: runs.Maxright = _MAXRIGHT
  answers: Answers = Answers()

  @property
  def middle(self) -> float:
    """The mixing ratio at which methods are compared."""
    return self.mixing_ratios[len(self.mixing_ratios) // 2]


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    seeds=2,
    methods=('sequential', 'alright'),
    steps=24,
    chunk=12,
    optimiser=runs.Optimiser(learning_rate=1e-2),
    adapters=runs.Adapters(rank=4),
    rows=problem_lib.Sizes(buckets=(16,), held_out=16, refresh=8),
    answers=Answers(prompts=4, answer_length=4),
  ),
  # 24,000 comparisons, 8,000 demonstrations, 6 epochs.
  'paper': Settings(
    mixing_ratios=(0.01, 0.25, 0.5, 0.75, 0.99),
    few_seeds=5,
    methods=tuple(n for n in methods.TITLES if n not in methods.SINGLE),
    steps=24_000,
    chunk=1_000,
    optimiser=runs.Optimiser(learning_rate=5e-5),
    adapters=runs.Adapters(rank=32),
    rows=problem_lib.Sizes(12, held_out=256, refresh=64),
  ),
}


def check(settings: Settings) -> None:
  """Raises SettingsError for settings that contradict each other."""
  runs.check(settings)
  if settings.steps % settings.chunk:
    raise harness.SettingsError(
      f'steps={settings.steps} is no multiple of chunk={settings.chunk}.'
    )
  if any(ratio >= 1 for ratio in settings.mixing_ratios):
    raise harness.SettingsError(
      f'--mixing_ratios={settings.mixing_ratios} have to be below 1; each '
      'objective alone is run anyway.'
    )


def prepare(options: harness.Options) -> problem_lib.Problem:
  """Loads the model and the rows."""
  settings = options.settings
  if options.preset == 'smoke' and not options.data_dir:
    model, tokenizer, examples = problem_lib.made_up(
      dtype=settings.stored_dtype
    )
  else:
    folder = harness.find(options.data_dir, [COMPARISONS], advice=ADVICE).parent
    examples: dict[str, Any] = {'sft': [], 'dpo': []}
    for name in DEMONSTRATIONS:
      examples['sft'] += data_lib.read_examples(folder / name)[0]
    # Dialogues that differ before their last turn are skipped.
    examples['dpo'], _ = data_lib.read_examples(folder / COMPARISONS, skip=True)
    model, tokenizer = weights.load_both(settings.model, settings.stored_dtype)
  return problem_lib.prepare(
    model,
    tokenizer,
    settings.tuning(model.config),
    examples,
    settings.rows,
    folder=f'{options.workdir}/kept',
  )


def run(
  options: harness.Options,
  problem: problem_lib.Problem,
  method: str,
  mixing_ratio: float,
  optima: Any,
) -> harness.Trained:
  """Runs all seeds of a method at a mixing ratio."""
  settings, single = options.settings, method in methods.SINGLE
  few = single or method in settings.few_seed_methods
  if few or mixing_ratio != settings.middle:
    options = options._replace(seeds=tuple(range(settings.few_seeds)))
  identity = harness.run_settings(
    settings,
    *('methods', 'mixing_ratios', 'few_seeds', 'few_seed_methods', 'answers'),
    'dtype',  # The weights themselves are compared.
  )
  # Only MAXRIGHT depends on optima.
  identity |= {'optima': list(optima)} if method == 'maxright' else {}
  return runs.run(
    options,
    problem,
    method,
    settings.plan(0.5 if single else mixing_ratio, optima),
    name=method if single else f'{method}/share{mixing_ratio:g}',
    identity=identity,
    # The same for all runs: `measure_start`.
    record_start=False,
  )


def measure_start(problem: problem_lib.Problem) -> dict[str, float]:
  """Measures on held-out rows before the first update."""

  @jax.jit
  def measure(frozen, held_out):
    trained = problem.tuning.init(frozen, jax.random.key(0))
    return problem_lib.measure(problem, trained, frozen, held_out)

  measures = measure(problem.frozen, problem.tables['held_out'])
  return {name: float(value) for name, value in measures.items()}


def held_out(
  trained: harness.Trained, before: Mapping[str, float]
) -> dict[str, np.ndarray]:
  """Metrics from start to end of a run, (records, seeds), by name."""
  metrics = {}
  for name, start in before.items():
    history = np.asarray(trained.history[f'held_out/{name}'])
    metrics[name] = np.concatenate([np.full_like(history[:1], start), history])
  return metrics


def estimated_optima(
  problem: problem_lib.Problem, single: Sequence[harness.Trained]
) -> tuple[float, ...]:
  """Estimates optima for MAXRIGHT: losses after training on one objective.

  They are losses on MAXRIGHT's refresh rows: it does not see held-out rows.

  Args:
    problem: the problem.
    single: runs on one objective, in the order of the objectives.
  """

  @jax.jit
  def measure(params, frozen, refresh):
    return problem_lib.measure(problem, params, frozen, refresh)

  optima = []
  for name, trained in zip(problem.names, single, strict=True):
    first = jax.tree.map(lambda leaf: leaf[0], trained.params)
    losses = measure(first, problem.frozen, problem.tables['refresh'])
    optima.append(float(losses[name]))
  return tuple(optima)


def summarise(
  names: tuple[str, str],
  trained: Mapping[tuple[str, float], harness.Trained],
  before: Mapping[str, float],
) -> harness.Results:
  """Summarises all runs by method and mixing ratio.

  Args:
    names: of both objectives.
    trained: runs by (method, mixing ratio), which is 0 or 1 for one objective.
    before: measures before the first update.
  """
  results = harness.Results()
  histories = {place: held_out(t, before) for place, t in trained.items()}
  best = {
    n: min(float(np.nanmin(h[n])) for h in histories.values()) for n in names
  }
  gaps = {
    place: {n: h[n][-1] - best[n] for n in names}
    for place, h in histories.items()
  }
  distances = {place: np.hypot(*gap.values()) for place, gap in gaps.items()}
  for name in names:
    results.add({'objective': name}, optimum=best[name])
    results.add({'method': 'start', 'objective': name}, loss=before[name])
  results.add({'method': 'start'}, accuracy=before['accuracy'])
  for place, run_ in trained.items():
    method, mixing_ratio = place
    at = {'method': method, 'share': mixing_ratio}
    results.add(at, ideal_distance=distances[place])
    for name, gap in gaps[place].items():
      loss = histories[place][name][-1]
      results.add({**at, 'objective': name}, loss=loss, gap=gap)
    updates = [run_.history.get(f'count/gradients/{n}') for n in names]
    counts = [0.0 if u is None else float(np.mean(u[-1])) for u in updates]
    seeds = len(distances[place])
    seconds = run_.seconds / seeds
    results.add(
      at,
      accuracy=histories[place]['accuracy'][-1],
      comparisons_share=counts[1] / max(sum(counts), 1),
      seconds=seconds,
    )
    results.note(at, {'seeds': seeds})
    base = ('sequential', mixing_ratio)
    if base in trained and place != base:
      common = min(seeds, len(distances[base]))
      lead = distances[base][:common] - distances[place][:common]
      stages = trained[base].seconds / len(distances[base])
      results.add(at, lead=lead, wins=np.sum(lead > 0))
      results.add(at, time_ratio=seconds / stages)
  return results


def main(options: harness.Options) -> harness.Report:
  """Runs all methods at all mixing ratios and compares them."""
  settings = options.settings
  problem = prepare(options)
  trained = {
    (name, float(i)): run(options, problem, name, float(i), ())
    for i, name in enumerate(methods.SINGLE)
  }
  optima = estimated_optima(problem, [*trained.values()])
  trained |= {
    (method, ratio): run(options, problem, method, ratio, optima)
    for ratio in settings.mixing_ratios
    for method in settings.methods
  }
  before = measure_start(problem)
  results = summarise(problem.names, trained, before)
  for name, optimum in zip(problem.names, optima, strict=True):
    results.add({'objective': name}, estimated_optimum=optimum)
  for name, accuracy in problem_lib.length_controls(problem).items():
    results.add({'method': name}, accuracy=accuracy)
    results.note({'method': name, 'share': '-'}, {'accuracy': accuracy})
  first_seed = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)
  models = {place: first_seed(t.params) for place, t in trained.items()}
  rates = model_measures.refusals(problem, settings, models)
  for (method, ratio), rate in rates.items():
    results.add({'method': method, 'share': ratio}, refusal_rate=rate)
  peak = {
    n: model_measures.memory(problem, settings, n, optima)
    for n in dict.fromkeys(('sequential', *settings.methods))
  }
  for name, size in peak.items():
    results.add({'method': name}, memory_ratio=size / peak['sequential'])
  first, second = ({'objective': name} for name in problem.names)
  return harness.Report(
    results,
    rows=('method', 'share'),
    columns=(
      harness.Column('ideal_distance', 'ideal distance'),
      harness.Column('gap', 'gap of demonstrations', first),
      harness.Column('gap', 'gap of comparisons', second),
      harness.Column('accuracy', 'reward accuracy'),
      harness.Column('comparisons_share', 'updates on comparisons'),
      'seeds',
      harness.Column('seconds', 'seconds per run'),
      harness.Column('refusal_rate', 'refusals, first seed'),
    ),
    titles=methods.TITLES | methods.CONTROLS,
    plots={
      'pareto.png': pareto_plot.draw(
        {place: held_out(t, before) for place, t in trained.items()},
        {place: t.steps for place, t in trained.items()},
        problem.names,
        settings.middle,
      )
    },
  )


STUDY = harness.Study(
  main,
  PRESETS,
  check=check,
  renamed=runs.RENAMED
  | {
    'answer': 'answers.answer_length',
    'shares': 'mixing_ratios',
    'once': 'few_seed_methods',
    'others': 'few_seeds',
  },
)


if __name__ == '__main__':
  harness.run(STUDY)
