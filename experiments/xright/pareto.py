"""What a model forgets: the front of two objectives at equal numbers of steps.

Paper: Fernando, Shen, Ram, Zhou, Samulowitz, Baracaldo and Chen, Understanding
Forgetting in LLM Supervised Fine-Tuning and Preference Learning, 2024.

    python -m experiments.xright.pareto --preset=quick --data_dir=LLM

Expected: after training in stages the model is further from the best value of
both objectives than after ALRIGHT. Time: 25 minutes on 2 cores.

SmolLM2-135M-Instruct, adapters on its last layers; the layers below are run
once for each row. Every method has the same number of updates, of one objective
each (those that hold both gradients cost twice that, and are listed so). The
best value of an objective is the least that any run has reached on held-out
rows, and the ideal distance of a run the norm of its two gaps to them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import numpy as np

from experiments import harness
from experiments.lm import data as data_lib
from experiments.lm import weights
from experiments.xright import methods, model_measures, pareto_plot, runs
from experiments.xright import problem as problem_lib

# The files of `--data_dir`, as they are published.
DEMONSTRATIONS = ('alpaca_data_safety_only.json', 'dolly_safety_only.jsonl')
COMPARISONS = 'hh_harmless_base_test.jsonl.gz'
ADVICE = (
  'give a folder with the test part of harmless-base of HH-RLHF (Anthropic) '
  f'under this name, and with {" and ".join(DEMONSTRATIONS)} (rows with an '
  'instruction and an output)'
)


@dataclasses.dataclass(frozen=True)
class Answers:
  """What the first seed's models answer, to count refusals.

  Attributes:
    prompts: of held-out comparisons.
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
    seeds: runs of a method at the middle share.
    shares: weights lambda of the comparisons, in the paper 0.01 to 0.99.
    methods: which are compared.
    once: which of them are run with `others` seeds.
    others: runs at the other shares, and of the methods in `once`.
    answers: of the models.
  """

  steps: int = 48
  chunk: int = 24
  seeds: int = 5
  shares: tuple[float, ...] = (0.5,)
  methods: Annotated[tuple[str, ...], _KNOWN] = (
    *('sequential', 'alright', 'maxright', 'mix'),
  )
  once: Annotated[tuple[str, ...], _KNOWN] = ('mix',)
  others: int = 1
  rows: problem_lib.Sizes = _SIZES
  adapters: runs.Adapters = _ADAPTERS
  optimiser: runs.Optimiser = _OPTIMISER
  maxright: runs.Maxright = _MAXRIGHT
  answers: Answers = Answers()

  @property
  def middle(self) -> float:
    """The share at which methods are compared."""
    return self.shares[len(self.shares) // 2]


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
    shares=(0.01, 0.25, 0.5, 0.75, 0.99),
    others=5,
    methods=tuple(n for n in methods.TITLES if n not in methods.SINGLE),
    steps=24_000,
    chunk=1_000,
    optimiser=runs.Optimiser(learning_rate=5e-5),
    adapters=runs.Adapters(rank=32),
    rows=problem_lib.Sizes(12, held_out=256, refresh=64),
  ),
}


def check(settings: Settings) -> None:
  """Raises SettingsError for settings that no run can have."""
  runs.check(settings)
  if settings.steps % settings.chunk:
    raise harness.SettingsError(
      f'steps={settings.steps} are no multiple of chunk={settings.chunk}.'
    )
  if any(share >= 1 for share in settings.shares):
    raise harness.SettingsError(
      f'shares={settings.shares} are below 1: one objective alone is run by '
      'itself.'
    )


def prepare(options: harness.Options) -> problem_lib.Problem:
  """The model and the rows."""
  settings = options.settings
  if options.preset == 'smoke' and not options.data_dir:
    model, words, examples = problem_lib.made_up(dtype=settings.stored_dtype)
  else:
    found = harness.find(options.data_dir, [COMPARISONS], advice=ADVICE)
    folder = found.parent
    examples: dict[str, Any] = {'sft': [], 'dpo': []}
    for name in DEMONSTRATIONS:
      examples['sft'] += data_lib.read_examples(folder / name)[0]
    # Some dialogues differ before their last turn.
    examples['dpo'], _ = data_lib.read_examples(folder / COMPARISONS, skip=True)
    model, words = weights.load_both(settings.model, settings.stored_dtype)
  return problem_lib.prepare(
    model,
    words,
    settings.tuning(model.config),
    examples,
    settings.rows,
    folder=f'{options.workdir}/kept',
  )


def run(
  options: harness.Options,
  problem: problem_lib.Problem,
  method: str,
  share: float,
  optima: Any,
) -> harness.Trained:
  """One method at one share, all of its seeds."""
  settings, alone = options.settings, method in methods.SINGLE
  if share != settings.middle or method in settings.once or alone:
    options = options._replace(seeds=tuple(range(settings.others)))
  identity = harness.settings_of(
    settings,
    *('methods', 'shares', 'others', 'once', 'answers'),
    'dtype',  # Stored weights are compared by themselves.
  )
  # Only MAXRIGHT sees optima: the others' runs do not depend on them.
  identity |= {'optima': list(optima)} if method == 'maxright' else {}
  return runs.run(
    options,
    problem,
    method,
    settings.plan(0.5 if alone else share, optima),
    name=method if alone else f'{method}/share{share:g}',
    identity=identity,
    # It is the same for all: adapters that change nothing yet.
    record_start=False,
  )


def measure_start(problem: problem_lib.Problem) -> dict[str, float]:
  """What is measured on held-out rows before the first update."""

  @jax.jit
  def measure(frozen, held_out):
    trained = problem.tuning.init(frozen, jax.random.key(0))
    return problem_lib.measure(problem, trained, frozen, held_out)

  found = measure(problem.frozen, problem.tables['held_out'])
  return {name: float(value) for name, value in found.items()}


def held_out(
  trained: harness.Trained, before: Mapping[str, float]
) -> dict[str, np.ndarray]:
  """Metrics from the start to the end of a run, (records, seeds) by name."""
  found = {}
  for name, start in before.items():
    history = np.asarray(trained.history[f'held_out/{name}'])
    found[name] = np.concatenate([np.full_like(history[:1], start), history])
  return found


def estimated_optima(
  problem: problem_lib.Problem, alone: dict[str, harness.Trained]
) -> tuple[float, ...]:
  """The losses that either objective alone reaches, on the rows of the looks.

  Not on those that are reported: MAXRIGHT is to know nothing of them.
  """

  @jax.jit
  def measure(params, frozen, refresh):
    return problem_lib.measure(problem, params, frozen, refresh)

  found = []
  for name, trained in zip(problem.names, alone.values(), strict=True):
    first = jax.tree.map(lambda leaf: leaf[0], trained.params)
    losses = measure(first, problem.frozen, problem.tables['refresh'])
    found.append(float(losses[name]))
  return tuple(found)


def summarise(
  names: tuple[str, str],
  trained: Mapping[tuple[str, float], harness.Trained],
  before: Mapping[str, float],
) -> harness.Results:
  """Numbers of all runs by method and share.

  Args:
    names: of both objectives.
    trained: runs by method and share; of one objective alone, the share is 0
      or 1.
    before: what was measured before the first update.
  """
  results = harness.Results()
  held = {place: held_out(t, before) for place, t in trained.items()}
  best = {n: min(float(np.nanmin(h[n])) for h in held.values()) for n in names}
  gaps = {p: {n: h[n][-1] - best[n] for n in names} for p, h in held.items()}
  distances = {place: np.hypot(*gap.values()) for place, gap in gaps.items()}
  for name in names:
    results.add({'objective': name}, optimum=best[name])
    results.add({'method': 'start', 'objective': name}, loss=before[name])
  results.add({'method': 'start'}, accuracy=before['accuracy'])
  for place, run_ in trained.items():
    method, share = place
    at = {'method': method, 'share': share}
    results.add(at, ideal_distance=distances[place])
    for name, gap in gaps[place].items():
      loss = held[place][name][-1]
      results.add({**at, 'objective': name}, loss=loss, gap=gap)
    taken = [run_.history.get(f'count/gradients/{n}') for n in names]
    counts = [0.0 if t is None else float(np.mean(t[-1])) for t in taken]
    seeds = len(distances[place])
    seconds = run_.seconds / seeds
    results.add(
      at,
      accuracy=held[place]['accuracy'][-1],
      comparisons_share=counts[1] / max(sum(counts), 1),
      seconds=seconds,
    )
    results.note(at, {'seeds': seeds})
    base = ('sequential', share)
    if base in trained and place != base:
      both = min(seeds, len(distances[base]))
      lead = (distances[base] - distances[place])[:both]
      stages = trained[base].seconds / len(distances[base])
      results.add(at, lead=lead, wins=np.sum(lead > 0))
      results.add(at, time_ratio=seconds / stages)
  return results


def main(options: harness.Options) -> harness.Report:
  """Runs all methods at all shares, and compares."""
  settings = options.settings
  problem = prepare(options)
  trained = {
    (name, float(share)): run(options, problem, name, float(share), ())
    for share, name in enumerate(methods.SINGLE)
  }
  optima = estimated_optima(problem, trained)
  trained |= {
    (method, share): run(options, problem, method, share, optima)
    for share in settings.shares
    for method in settings.methods
  }
  before = measure_start(problem)
  results = summarise(problem.names, trained, before)
  for name, optimum in zip(problem.names, optima, strict=True):
    results.add({'objective': name}, estimated_optimum=optimum)
  for name, share in problem_lib.length_controls(problem).items():
    results.add({'method': name}, accuracy=share)
    results.note({'method': name, 'share': '-'}, {'accuracy': share})
  first_seed = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)
  models = {place: first_seed(t.params) for place, t in trained.items()}
  declined = model_measures.refusals(problem, settings, models)
  for (method, share), rate in declined.items():
    results.add({'method': method, 'share': share}, refusal_rate=rate)
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
      harness.Column('seconds', 's a run'),
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
  paper='xright',
  binary='pareto',
  check=check,
  renamed={'answer': 'answers.answer_length'},
)


if __name__ == '__main__':
  harness.run(STUDY)
