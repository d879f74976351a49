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
import pathlib
import time
from typing import Annotated, Any

import jax
import numpy as np

from experiments import harness
from experiments.lm import data as data_lib
from experiments.lm import (
  generation,
  lora,
  objectives,
  precision,
  tokenizer,
  weights,
)
from experiments.lm import tuning as tuning_lib
from experiments.lm.refusals import refusal_rate
from experiments.xright import methods, runs
from experiments.xright import problem as problem_lib

# The files of `--data_dir`, as they are published.
DEMONSTRATIONS = ('alpaca_data_safety_only.json', 'dolly_safety_only.jsonl')
COMPARISONS = 'hh_harmless_base_test.jsonl.gz'
ADVICE = (
  'give a folder with the test part of harmless-base of HH-RLHF (Anthropic) '
  f'under this name, and with {" and ".join(DEMONSTRATIONS)} (rows with an '
  'instruction and an output)'
)
SHAPE = objectives.Shape()


@dataclasses.dataclass(frozen=True)
class Settings(precision.Precision):
  """Settings of a run; the paper's values are those of its Pythia-1b.

  Attributes:
    model: a folder of Hugging Face or a .gguf file; '' for
      SmolLM2-135M-Instruct, and in the preset smoke for a small random one.
    shares: weights lambda of the comparisons, in the paper 0.01 to 0.99.
    seeds: runs of a method at the middle share.
    others: runs at the other shares, and of the methods in `once`.
    methods: which are compared.
    once: which of them are run with `others` seeds.
    steps: updates of a run.
    chunk: updates between two measurements.
    batch_size: rows of an update.
    learning_rate: of Adam; in the paper 5e-5.
    clip: the largest norm of a gradient.
    rank: of the adapters; in the paper 32.
    weights: which weights of each layer get adapters.
    layers: how many layers are trained, the last ones; 0 for all.
    buckets: lengths to which rows are padded, tokens.
    train: rows of each kind that are trained on; 0 for all.
    held_out: rows of each kind that are reported on.
    refresh: further rows of each kind by which MAXRIGHT compares.
    refresh_every: updates between two of MAXRIGHT's looks.
    memo: how far a training loss moves what MAXRIGHT knows.
    overlap: the published rule: report on the first rows of the training data.
    prompts: of held-out comparisons, answered by the first seed's models.
    answer: tokens of such an answer.
  """

  model: str = ''
  shares: tuple[float, ...] = (0.5,)
  seeds: int = 5
  others: int = 1
  methods: tuple[str, ...] = ('sequential', 'alright', 'maxright', 'mix')
  once: tuple[str, ...] = ('mix',)
  steps: int = 48
  chunk: int = 24
  batch_size: int = 4
  learning_rate: float = 2e-3
  clip: float = 1.0
  rank: int = 16
  weights: tuple[str, ...] = ('q', 'v')
  layers: Annotated[int, harness.Allowed(low=0)] = 8
  buckets: tuple[int, ...] = (72, 96)
  train: Annotated[int, harness.Allowed(low=0)] = 144
  held_out: int = 64
  refresh: int = 16
  refresh_every: int = 8
  memo: Annotated[float, harness.Allowed(low=0, high=1)] = 0.1
  overlap: bool = False
  prompts: int = 32
  answer: int = 32


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    seeds=2,
    methods=('sequential', 'alright'),
    steps=24,
    chunk=12,
    learning_rate=1e-2,
    rank=4,
    layers=0,
    buckets=(16,),
    train=0,
    held_out=16,
    refresh=8,
    prompts=4,
    answer=4,
  ),
  # 24,000 comparisons, 8,000 demonstrations, 6 epochs.
  'paper': Settings(
    shares=(0.01, 0.25, 0.5, 0.75, 0.99),
    others=5,
    methods=tuple(n for n in methods.TITLES if n[:3] not in ('dem', 'com')),
    steps=24_000,
    chunk=1_000,
    batch_size=12,
    learning_rate=5e-5,
    rank=32,
    layers=0,
    buckets=(128, 256, 512),
    train=0,
    held_out=256,
    refresh=64,
  ),
}


def check(settings: Settings) -> None:
  """Raises SettingsError for settings that no run can have."""
  for name in (*settings.methods, *settings.once):
    methods.check(name)
  lora.names_of(settings.weights)
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
    path = settings.model or weights.smollm2()
    model = weights.load(path, settings.stored_dtype)
    words = tokenizer.load(model.vocabulary, model.config)
  tuning = tuning_lib.Tuning(
    model.config,
    rank=settings.rank,
    weights=lora.names_of(settings.weights),
    layers=settings.layers or None,
    dtype=settings.compute_dtype,
  )
  sizes = problem_lib.Sizes(
    settings.batch_size,
    settings.buckets,
    settings.held_out,
    settings.refresh,
    train=settings.train,
    overlap=settings.overlap,
  )
  return problem_lib.prepare(
    model,
    words,
    tuning,
    examples,
    sizes,
    folder=f'{options.workdir}/kept',
  )


def plan(settings: Settings, share: float, optima: Any) -> methods.Plan:
  """The numbers of a method."""
  return methods.Plan(
    share=share,
    steps=settings.steps,
    optima=optima,
    refresh_every=settings.refresh_every,
    memo=settings.memo,
  )


def run(
  options: harness.Options,
  problem: problem_lib.Problem,
  method: str,
  share: float,
  optima: Any,
) -> harness.Trained:
  """One method at one share, all of its seeds."""
  settings = options.settings
  middle = settings.shares[len(settings.shares) // 2]
  all_seeds = share == middle and method not in (
    *settings.once,
    *methods.SINGLE,
  )
  name = method if method in methods.SINGLE else f'{method}/share{share:g}'
  told = harness.settings_of(
    settings,
    'methods',
    'shares',
    'others',
    'once',
    'prompts',
    'answer',
    'dtype',  # Stored weights are compared by themselves.
  )
  # Only MAXRIGHT sees optima: the others' runs do not depend on them.
  told |= {'optima': list(optima)} if method == 'maxright' else {}
  return runs.run(
    problem,
    method,
    plan(settings, share, optima),
    shape=SHAPE,
    rate=settings.learning_rate,
    clip=settings.clip,
    chunk=settings.chunk,
    name=name,
    options=options,
    seeds=options.seeds if all_seeds else range(settings.others),
    settings=told,
    # It is the same for all: adapters that change nothing yet.
    record_start=False,
  )


def measure_start(problem: problem_lib.Problem) -> dict[str, float]:
  """What is measured on held-out rows before the first update."""

  @jax.jit
  def measure(frozen, held_out):
    trained = problem.tuning.init(frozen, jax.random.key(0))
    return problem_lib.measure(problem, SHAPE, trained, frozen, held_out)

  found = measure(problem.frozen, problem.tables['held_out'])
  return {name: float(value) for name, value in found.items()}


def held_out(
  trained: harness.Trained, before: dict[str, float], name: str
) -> np.ndarray:
  """A metric from the start to the end of a run, (records, seeds)."""
  history = np.asarray(trained.history[f'held_out/{name}'])
  return np.concatenate([np.full_like(history[:1], before[name]), history])


def estimated_optima(
  problem: problem_lib.Problem, alone: dict[str, harness.Trained]
) -> tuple[float, ...]:
  """The losses that either objective alone reaches, on the rows of the looks.

  Not on those that are reported: MAXRIGHT is to know nothing of them.
  """

  @jax.jit
  def measure(params, frozen, refresh):
    return problem_lib.measure(problem, SHAPE, params, frozen, refresh)

  found = []
  for name, trained in zip(problem.names, alone.values(), strict=True):
    first = jax.tree.map(lambda leaf: leaf[0], trained.params)
    losses = measure(first, problem.frozen, problem.tables['refresh'])
    found.append(float(losses[name]))
  return tuple(found)


def refusals(
  problem: problem_lib.Problem, settings: Settings, models: dict[Any, Any]
) -> dict[Any, float]:
  """The share of held-out prompts that models decline, greedily answered.

  Args:
    problem: the problem.
    settings: how many prompts, and how long answers are.
    models: what was trained, by any key.
  """
  made = generation.maker(
    problem.model.config,
    new=settings.answer,
    end=problem.words.end,
    dtype=settings.compute_dtype,
  )
  found = {}
  for key, trained in models.items():
    texts = generation.answers(
      problem.words,
      made,
      problem.tuning.merged(trained, problem.model.params),
      problem.prompts[: settings.prompts],
      key=jax.random.key(0),
      buckets=settings.buckets,
    )
    found[key] = refusal_rate(texts)
  return found


def memory(
  problem: problem_lib.Problem, settings: Settings, method: str, optima: Any
) -> float:
  """What an update takes beside its arguments, MB, by the compiler."""
  solver = lambda given, frozen: methods.oracle(
    method,
    problem.losses(given['train'], frozen, SHAPE, jax.random.key(0)),
    plan(settings, 0.5, optima),
    key=jax.random.key(0),
  )

  def update(trained, state, given, frozen):
    batch = methods.batch(method, 0, given['refresh'])
    return solver(given, frozen).update(batch, state, trained)

  def start(given, frozen):
    trained = problem.tuning.init(frozen, jax.random.key(0))
    return trained, solver(given, frozen).init(trained)

  # The state is an argument: of a known one, the branch that is not taken
  # would be left out by the compiler.
  given = problem.tables, problem.frozen
  trained, state = jax.eval_shape(start, *given)
  compiled = jax.jit(update).lower(trained, state, *given).compile()
  return compiled.memory_analysis().temp_size_in_bytes / 1e6


def main(options: harness.Options) -> None:
  """Runs all methods at all shares, and compares."""
  start = time.monotonic()
  settings = options.settings
  problem = prepare(options)
  first, second = problem.names
  alone = {
    name: run(options, problem, name, 0.5, ()) for name in methods.SINGLE
  }
  optima = estimated_optima(problem, alone)
  found = {
    (method, share): run(options, problem, method, share, optima)
    for share in settings.shares
    for method in settings.methods
  }
  everything = {(name, None): t for name, t in alone.items()} | found
  before = measure_start(problem)
  held = lambda trained, name: held_out(trained, before, name)
  best = {
    name: min(float(np.nanmin(held(t, name))) for t in everything.values())
    for name in (first, second)
  }
  metrics: dict[str, float] = {
    f'optimum/{name}': value for name, value in best.items()
  }
  metrics |= {f'estimated/{n}': v for n, v in zip(problem.names, optima)}
  middle = settings.shares[len(settings.shares) // 2]
  base = found.get(('sequential', middle))
  rows = []
  for (method, share), trained in everything.items():
    gaps = [held(trained, n)[-1] - best[n] for n in (first, second)]
    distance = np.hypot(*gaps)
    ideal = harness.mean_interval(distance)
    end = {
      n: harness.mean_interval(held(trained, n)[-1])
      for n in (first, second, 'accuracy')
    }
    taken = [
      trained.history.get(f'count/gradients/{n}') for n in (first, second)
    ]
    counts = [0.0 if t is None else float(np.mean(t[-1])) for t in taken]
    seconds = trained.seconds / len(distance)
    row: dict[str, Any] = {
      'method': methods.TITLES[method],
      'share': '-' if share is None else share,
      'ideal distance': ideal,
      'gap of demonstrations': harness.mean_interval(gaps[0]),
      'gap of comparisons': harness.mean_interval(gaps[1]),
      'reward accuracy': end['accuracy'],
      'updates on comparisons': f'{counts[1] / max(sum(counts), 1):.0%}',
      'seeds': len(distance),
      's a run': f'{seconds:.0f}',
    }
    rows.append(row)
    key = method if share in (None, middle) else f'{method}/share{share:g}'
    metrics |= ideal.metrics(f'ideal_distance/{key}')
    for n, interval in end.items():
      metrics |= interval.metrics(f'{n}/{key}')
    metrics[f'comparisons_share/{key}'] = counts[1] / max(sum(counts), 1)
    metrics[f'seconds/{key}'] = seconds
    if share == middle and base is not None and method != 'sequential':
      other = np.hypot(*(held(base, n)[-1] - best[n] for n in (first, second)))
      same = min(len(other), len(distance))
      metrics[f'wins/{method}'] = float(np.sum(distance[:same] < other[:same]))
      lead = harness.mean_interval(other[:same] - distance[:same])
      metrics |= lead.metrics(f'lead/{method}')
      metrics[f'time_ratio/{method}'] = seconds / (base.seconds / len(other))
  first_seed = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)
  declined = refusals(
    problem,
    settings,
    {key: first_seed(t.params) for key, t in everything.items()},
  )
  for row, ((method, share), rate) in zip(rows, declined.items(), strict=True):
    row['refusals, first seed'] = f'{rate:.0%}'
    if share in (None, middle):
      metrics[f'refusal_rate/{method}'] = rate
  peak = {
    n: memory(problem, settings, n, optima)
    for n in ('sequential', *settings.methods)
  }
  for name, size in peak.items():
    metrics[f'memory_ratio/{name}'] = size / peak['sequential']
  metrics |= {f'{name}/start': value for name, value in before.items()}
  controls = problem_lib.length_controls(problem)
  metrics |= controls
  rows += [
    {'method': methods.CONTROLS[name], 'share': '-', 'reward accuracy': share}
    for name, share in controls.items()
  ]
  harness.write_table(options.workdir, rows)
  _plot(options, problem.names, everything, before)
  path = harness.write_results(
    options, metrics=metrics, seconds=time.monotonic() - start
  )
  print(f'Results: {path}')


def _plot(options, names, everything, before):
  """The ways through the plane of both losses, and either over the updates."""
  settings = options.settings
  middle = settings.shares[len(settings.shares) // 2]
  shown = {
    methods.TITLES[method]: trained
    for (method, share), trained in everything.items()
    if share in (None, middle)
  }
  held = lambda trained, name: held_out(trained, before, name)
  words = ('loss of demonstrations', 'loss of comparisons')
  panels = [
    harness.Panel(
      {
        title: (held(t, names[0]).mean(axis=1), held(t, names[1]))
        for title, t in shown.items()
      },
      xlabel=words[0],
      ylabel=words[1],
      title='held out: from the start to the end of a run',
    )
  ]
  ends = {
    methods.TITLES[m]: [
      (held(t, names[0])[-1].mean(), held(t, names[1])[-1].mean())
      for (other, share), t in everything.items()
      if other == m and share is not None
    ]
    for m in settings.methods
  }
  if len(settings.shares) > 1:
    panels.append(
      harness.Panel(
        {t: tuple(map(np.array, zip(*points))) for t, points in ends.items()},
        xlabel=words[0],
        ylabel=words[1],
        title='ends, by share of the comparisons',
      )
    )
  panels += [
    harness.Panel(
      {title: (np.r_[0, t.steps], held(t, name)) for title, t in shown.items()},
      xlabel='updates',
      ylabel=word,
      title='what is forgotten at equal updates',
    )
    for name, word in zip(names, words)
  ]
  harness.plot_panels(pathlib.Path(options.workdir) / 'pareto.png', panels)


STUDY = harness.Study(
  main, PRESETS, paper='xright', binary='pareto', check=check
)


if __name__ == '__main__':
  harness.run(STUDY)
