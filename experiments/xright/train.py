r"""Fine-tunes on demonstrations and on comparisons at once, at the cost of one.

Paper: Fernando, Shen, Ram, Zhou, Samulowitz, Baracaldo and Chen, Understanding
Forgetting in LLM Supervised Fine-Tuning and Preference Learning, 2024.

    python -m experiments.xright.train --model=DIR --output=OUT \
      --sft_data=A.jsonl --pref_data=B.jsonl

Expected: both held-out losses fall. Time: 1 minute on 2 cores for the preset
smoke; of the default model, some 10 seconds a step of 4 rows of 128 tokens.

A tool: any folder of Hugging Face or GGUF file of Llama's family, rows of one's
own (`experiments.lm.data` lists the keys), any method and losses by name
(`experiments.lm.objectives`). What is written to OUT is a folder of Hugging
Face. A method of one objective needs its rows only.
"""

import dataclasses
import itertools
import math
import pathlib
import time
from typing import Annotated, Any, Literal

import jax

from experiments import harness
from experiments.lm import config as config_lib
from experiments.lm import data as data_lib
from experiments.lm import (
  decoder,
  lora,
  objectives,
  precision,
  row_files,
  sharding,
  tokenizer,
  weights,
  written,
)
from experiments.lm import tuning as tuning_lib
from experiments.xright import methods, runs
from experiments.xright import problem as problem_lib


@dataclasses.dataclass(frozen=True)
class Settings(precision.Precision):
  """Settings of a run.

  Attributes:
    model: a folder of Hugging Face or a .gguf file; '' for
      SmolLM2-135M-Instruct, and in the preset smoke for a small random one.
    sft_data: a file of demonstrations.
    pref_data: a file of comparisons.
    output: a folder for the trained model, and for its adapters alone, in
      `adapters`; '' for `model` in the workdir, or for nothing of a made-up
      model.
    method: how the two objectives are trained.
    demonstrations: the loss of demonstrations.
    comparisons: the loss of comparisons.
    share: the weight lambda of the comparisons.
    steps: updates. May be raised later, but not of stages, which are parts of
      them; the model is then written again.
    chunk: updates between two looks at held-out rows.
    batch_size: rows of an update.
    parts: micro-batches into which a batch is divided, for memory.
    learning_rate: of Adam; the paper has 5e-5 for its larger models.
    clip: the largest norm of a gradient.
    rank: of the adapters; 0 trains all weights.
    alpha: adapters count alpha / rank.
    weights: which weights of each layer get adapters: q, k, v, o, gate, up,
      down, also with _proj behind.
    layers: how many layers are trained, the last ones; 0 for all. What the
      others give is then computed once for each row.
    remat: whether to trade time for memory in the backward pass.
    mesh: of devices, 'fsdp=4,tp=2' for instance; '' for one device.
    buckets: lengths to which rows are padded, tokens.
    pack: whether demonstrations that are trained on stand side by side in rows
      of the longest bucket; `batch_size` counts these rows then.
    held_out: rows of each kind that are not trained on.
    refresh: further rows of each kind by which MAXRIGHT compares.
    overlap: the published rule: report on the first rows of the training data.
    refresh_every: updates between two of MAXRIGHT's looks.
    memo: how far a training loss moves what MAXRIGHT knows.
    optima: the least loss of each kind, from runs of `--method=demonstrations`
      and `comparisons`, 1.9,0.6 for instance; `running` for the least seen.
    beta: of the losses with a reference.
    smoothing: of dpo: the share of comparisons that may be wrong.
    orpo_weight: of orpo: of the odds ratio beside fine-tuning.
    uft_distance: of uft and uft_pairs: how far a reward is from its score.
    teacher: of distillation: a folder or file as `model`, with the same words.
    divergence: of distillation: forward covers what the teacher may say,
      reverse keeps to it.
    skip: whether to leave out invalid rows; otherwise the first one ends the
      run.
    seeds: runs, of which the first is written.
  """

  model: str = ''
  sft_data: str = ''
  pref_data: str = ''
  output: str = ''
  method: str = 'alright'
  demonstrations: str = 'sft'
  comparisons: str = 'dpo'
  share: Annotated[float, harness.Allowed(high=1.0)] = 0.5
  steps: int = 200
  chunk: int = 20
  batch_size: int = 4
  parts: int = 1
  learning_rate: float = 2e-4
  clip: float = 1.0
  rank: Annotated[int, harness.Allowed(low=0)] = 16
  alpha: float = 16.0
  weights: tuple[str, ...] = ('q', 'v')
  layers: Annotated[int, harness.Allowed(low=0)] = 0
  remat: bool = False
  mesh: str = ''
  buckets: tuple[int, ...] = (128, 256, 512)
  pack: bool = False
  held_out: int = 64
  refresh: int = 16
  overlap: bool = False
  refresh_every: int = 10
  memo: Annotated[float, harness.Allowed(low=0, high=1)] = 0.1
  optima: str = 'running'
  beta: float = 0.1
  smoothing: Annotated[float, harness.Allowed(low=0, high=0.5)] = 0.0
  orpo_weight: Annotated[float, harness.Allowed(low=0)] = 0.1
  uft_distance: Literal['squared', 'cross_entropy'] = 'squared'
  teacher: str = ''
  divergence: Literal['forward', 'reverse'] = 'forward'
  skip: bool = False
  seeds: int = 1


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    method='maxright',
    steps=20,
    chunk=10,
    learning_rate=1e-2,
    buckets=(16,),
    held_out=8,
    refresh=8,
    rank=4,
  ),
  # Llama-3-8B of the paper: 24,000 and 6,000 rows, 4 epochs of the larger set.
  'paper': Settings(
    steps=24_000,
    chunk=500,
    learning_rate=5e-5,
    buckets=(128, 256, 512, 1_024),
    held_out=512,
    remat=True,
  ),
}


def check(settings: Settings) -> None:
  """Raises SettingsError for settings that no run can have."""
  methods.check(settings.method)
  for given, known in (
    (settings.demonstrations, objectives.DEMONSTRATIONS),
    (settings.comparisons, objectives.COMPARISONS),
  ):
    if given not in known:
      raise harness.SettingsError(
        f'unknown loss {given!r}; known here: {", ".join(known)}.'
      )
  if settings.batch_size % settings.parts:
    raise harness.SettingsError(
      f'batches of {settings.batch_size} do not divide into '
      f'parts={settings.parts}.'
    )
  if any(a >= b for a, b in itertools.pairwise(settings.buckets)):
    raise harness.SettingsError(
      f'buckets are rising lengths, got {settings.buckets}.'
    )
  if settings.method in methods.STAGES and settings.steps < 2:
    raise harness.SettingsError(
      f'{settings.method} has an update of each stage at least, got '
      f'steps={settings.steps}.'
    )
  if settings.method == 'maxright' and settings.refresh % settings.parts:
    raise harness.SettingsError(
      f'refresh={settings.refresh} rows do not divide into '
      f'parts={settings.parts}.'
    )
  optima_of(settings)
  lora.names_of(settings.weights)
  files = {n: getattr(settings, n) for n in ('sft_data', 'pref_data')}
  missing = [f'--{n}' for n in needed(settings.method) if not files[n]]
  if missing and any(files.values()):
    raise harness.SettingsError(
      f'the method {settings.method} needs {" and ".join(missing)} too; '
      'without any file, the preset smoke has made-up rows.'
    )
  distilled = settings.demonstrations == 'distillation'
  if settings.teacher and not distilled:
    raise harness.SettingsError(
      '--teacher is of the loss --demonstrations=distillation, got '
      f'{settings.demonstrations}.'
    )
  if distilled and settings.sft_data and not settings.teacher:
    raise harness.SettingsError(
      '--demonstrations=distillation needs --teacher=DIR, a model whose words '
      'are those of --model.'
    )
  if settings.pack and settings.demonstrations not in objectives.OF_TOKENS:
    raise harness.SettingsError(
      f'--pack is of losses that see each token for itself, '
      f'{", ".join(objectives.OF_TOKENS)}; got {settings.demonstrations}.'
    )


def needed(method: str) -> tuple[str, ...]:
  """The files that a method needs."""
  of = {'demonstrations': ('sft_data',), 'comparisons': ('pref_data',)}
  return of.get(method, ('sft_data', 'pref_data'))


def optima_of(settings: Settings) -> str | tuple[float, ...]:
  """The least losses that MAXRIGHT is given, or 'running'."""
  if settings.optima == 'running':
    return 'running'
  try:
    first, second = map(float, settings.optima.split(','))
    if not math.isfinite(first + second):
      raise ValueError('not finite')
  except ValueError as error:
    raise harness.SettingsError(
      "optima are 'running' or two finite numbers, of the demonstrations and "
      f'of the comparisons, got {settings.optima!r}.'
    ) from error
  return first, second


def read(
  settings: Settings, names: tuple[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
  """The examples of the files that are given, and the files, by objective.

  Raises:
    UserError: if a file cannot be read; without `skip`, if a row is invalid or
      of the other kind.
  """
  examples, sources = {}, {}
  for name, path in zip(names, (settings.sft_data, settings.pref_data)):
    if not path:
      continue
    content = data_lib.read(
      path,
      skip=settings.skip,
      flag='--skip=True',
      comparisons=name in objectives.COMPARISONS,
    )
    if content.wrong:
      print(row_files.describe(path, content.wrong))
    examples[name], sources[name] = content.examples, path
  return examples, sources


def teacher_of(
  settings: Settings, model: weights.Model, words: tokenizer.Tokenizer
) -> weights.Model:
  """The model to distil: of a made-up model, another one.

  Raises:
    UserError: if its words are not those of the model.
  """
  if settings.teacher:
    return weights.teacher(
      settings.teacher, model, words, settings.stored_dtype
    )
  config = config_lib.tiny(width=16)
  return weights.Model(config, dict(decoder.init(config, 1)), None)


def prepare(
  options: harness.Options,
) -> tuple[problem_lib.Problem, harness.Layout | None, objectives.Shape]:
  """Reads the rows, and then the model, that the settings name."""
  settings = options.settings
  names = (settings.demonstrations, settings.comparisons)
  made_up = options.preset == 'smoke' and not settings.model
  examples, sources = read(settings, names)
  if not examples and not made_up:
    files = ' and '.join(f'--{n}=FILE' for n in needed(settings.method))
    raise harness.MissingDataError(
      f'give your rows: {files}, .jsonl or .json; experiments/lm/data.py lists '
      'the keys. --sft_data is of demonstrations, --pref_data of comparisons.'
    )
  if made_up:
    model, words, small = problem_lib.made_up(dtype=settings.stored_dtype)
    examples = examples or dict(zip(names, small.values()))
  else:
    path = settings.model or weights.smollm2()
    model = weights.load(path, settings.stored_dtype)
    words = tokenizer.load(model.vocabulary, model.config)
  shape = objectives.Shape(
    settings.beta,
    settings.smoothing,
    settings.orpo_weight,
    settings.divergence,
    settings.uft_distance,
  )
  teacher = None
  if 'distillation' in examples:
    told = teacher_of(settings, model, words)
    teacher, shape = told.params, shape._replace(teacher=told.config)
  layout, on_mesh = None, None
  if settings.mesh:
    layout, on_mesh = sharding.layout_of(model.config, settings.mesh)
  tuning = tuning_lib.Tuning(
    model.config,
    rank=settings.rank,
    weights=lora.names_of(settings.weights),
    alpha=settings.alpha,
    layers=settings.layers or None,
    remat=settings.remat,
    dtype=settings.compute_dtype,
    rows=on_mesh,
  )
  sizes = problem_lib.Sizes(
    settings.batch_size,
    settings.buckets,
    settings.held_out,
    settings.refresh,
    parts=settings.parts,
    overlap=settings.overlap,
    pack=settings.pack,
  )
  problem = problem_lib.prepare(
    model,
    words,
    tuning,
    examples,
    sizes,
    folder=f'{options.workdir}/kept',
    sources=sources,
    skip=settings.skip,
    teacher=teacher,
  )
  for name in problem.names:
    parts = problem.tables['train'][name].parts
    count = sum(len(p['index']) for p in parts)
    side = ', demonstrations side by side' if 'segments' in parts[0] else ''
    print(
      f'{name}: {count} rows to train on{side}; {problem.left[name]} examples '
      f'are left out: longer than {settings.buckets[-1]} tokens, nothing to '
      'learn from, or refused by the template.'
    )
  return problem, layout, shape


def main(options: harness.Options) -> None:
  """Trains, writes results, and the model."""
  start = time.monotonic()
  settings = options.settings
  folder = pathlib.Path(settings.output or f'{options.workdir}/model')
  # A made-up model is written where that is asked for.
  made_up = options.preset == 'smoke' and not settings.model
  if settings.output or not made_up:
    written.require_own(options.workdir, folder)
  problem, layout, shape = prepare(options)
  plan = methods.Plan(
    share=settings.share,
    steps=settings.steps,
    optima=optima_of(settings),
    refresh_every=settings.refresh_every,
    memo=settings.memo,
    parts=settings.parts,
  )
  trained = runs.run(
    problem,
    settings.method,
    plan,
    shape=shape,
    rate=settings.learning_rate,
    clip=settings.clip,
    chunk=settings.chunk,
    name=settings.method,
    options=options,
    seeds=options.seeds,
    # A run may go on on another mesh. Stages are parts of the steps: with more
    # of them, it is another run.
    settings=harness.settings_of(
      dataclasses.replace(settings, weights=problem.tuning.weights),
      'output',
      'mesh',
      'dtype',  # Stored weights are compared by themselves.
      *(() if settings.method in methods.STAGES else ('steps',)),
    ),
    layout=layout,
  )
  metrics, rows = {}, []
  pairs = set(problem.names) & set(objectives.COMPARISONS)
  for name in (*problem.names, *(['accuracy'] if pairs else [])):
    history = trained.history[f'held_out/{name}']
    last = harness.mean_interval(history[-1])
    metrics |= last.metrics(name)
    first = harness.mean_interval(history[0])
    rows.append({'held out': name, 'before': first, 'after': last})
  if pairs:
    controls = problem_lib.length_controls(problem)
    metrics |= controls
    for name, share in controls.items():
      row = {'held out': methods.CONTROLS[name], 'before': share}
      rows.append(row | {'after': share})
  harness.write_table(options.workdir, rows)
  harness.write_results(
    options, metrics=metrics, seconds=time.monotonic() - start
  )
  harness.plot_curves(
    f'{options.workdir}/held_out.png',
    {
      name: (trained.steps, trained.history[f'held_out/{name}'])
      for name in problem.names
    },
    xlabel='updates',
    ylabel='loss on held-out rows',
  )
  if made_up and not settings.output:
    return

  model = problem.model
  dtype = settings.export_dtype(model.dtype)

  def make(folder):
    first = jax.tree.map(lambda leaf: leaf[0], harness.whole(trained.params))
    weights.export(
      folder,
      model.config,
      problem.tuning.merged(first, model.params),
      problem.words,
      dtype=dtype,
      generation=model.generation,
    )
    if settings.rank:
      weights.export_adapters(
        folder / 'adapters',
        model.config,
        first,
        alpha=settings.alpha,
        base=settings.model,
      )

  stamp = f'{trained.step} {dtype.name}'
  written.write(options.workdir, folder, stamp, make)
  print(f'Model: {folder}')


STUDY = harness.Study(
  main, PRESETS, paper='xright', binary='train', check=check
)


if __name__ == '__main__':
  harness.run(STUDY)
