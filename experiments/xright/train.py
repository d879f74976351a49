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
import math
import pathlib
from typing import Annotated, Any, Literal

import jax

from experiments import harness
from experiments.lm import (
  adapter_files,
  hugging_face,
  objectives,
  output_folders,
  row_files,
  sharding,
  tokenizer,
  weights,
)
from experiments.lm import data as data_lib
from experiments.xright import methods, runs
from experiments.xright import problem as problem_lib


@dataclasses.dataclass(frozen=True)
class Files:
  """What is read and written.

  Attributes:
    sft_data: a file of demonstrations.
    pref_data: a file of comparisons.
    output: a folder for the trained model, and for its adapters alone, in
      `adapters`; '' for `model` in the workdir, or for nothing of a made-up
      model.
    skip: whether to leave out invalid rows; otherwise the first one ends the
      run.
  """

  sft_data: str = ''
  pref_data: str = ''
  output: str = ''
  skip: bool = False


@dataclasses.dataclass(frozen=True)
class Losses:
  """Both objectives.

  Attributes:
    demonstrations: the loss of demonstrations.
    comparisons: the loss of comparisons.
    beta: of the losses with a reference.
    smoothing: of dpo: the share of comparisons that may be wrong.
    orpo_weight: of orpo: of the odds ratio beside fine-tuning.
    uft_distance: of uft and uft_pairs: how far a reward is from its score.
    teacher: of distillation: a folder or file as `model`, with the same words.
    divergence: of distillation: forward covers what the teacher may say,
      reverse keeps to it.
    optima: the least loss of each kind, from runs of `--method=demonstrations`
      and `comparisons`, 1.9,0.6 for instance; `running` for the least seen.
  """

  demonstrations: Annotated[str, harness.Among(objectives.DEMONSTRATIONS)] = (
    'sft'
  )
  comparisons: Annotated[str, harness.Among(objectives.COMPARISONS)] = 'dpo'
  beta: float = 0.1
  smoothing: Annotated[float, harness.Allowed(low=0, high=0.5)] = 0.0
  orpo_weight: Annotated[float, harness.Allowed(low=0)] = 0.1
  uft_distance: Literal['squared', 'cross_entropy'] = 'squared'
  teacher: str = ''
  divergence: Literal['forward', 'reverse'] = 'forward'
  optima: str = 'running'

  @property
  def names(self) -> tuple[str, str]:
    """Both, demonstrations first."""
    return self.demonstrations, self.comparisons

  def shape(self) -> objectives.Shape:
    """Their numbers."""
    return objectives.Shape(
      self.beta,
      self.smoothing,
      self.orpo_weight,
      self.divergence,
      self.uft_distance,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(runs.Settings):
  """Settings of a run, of which the first seed's model is written.

  Attributes:
    method: how the two objectives are trained.
    share: the weight lambda of the comparisons.
    mesh: of devices, 'fsdp=4,tp=2' for instance; '' for one device.
    files: what is read and written.
    losses: both objectives.
  """

  method: Annotated[str, harness.Among(methods.TITLES)] = 'alright'
  share: Annotated[float, harness.Allowed(high=1.0)] = 0.5
  mesh: str = ''
  files: Files = Files()
  losses: Losses = Losses()


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    method='maxright',
    steps=20,
    chunk=10,
    optimiser=runs.Optimiser(learning_rate=1e-2),
    rows=problem_lib.Sizes(buckets=(16,), held_out=8, refresh=8),
    adapters=runs.Adapters(rank=4),
  ),
  # Llama-3-8B of the paper: 24,000 and 6,000 rows, 4 epochs of the larger set.
  'paper': Settings(
    steps=24_000,
    chunk=500,
    optimiser=runs.Optimiser(learning_rate=5e-5),
    rows=problem_lib.Sizes(buckets=(128, 256, 512, 1_024), held_out=512),
    adapters=runs.Adapters(remat=True),
  ),
}


def check(settings: Settings) -> None:
  """Raises SettingsError for settings that no run can have."""
  runs.check(settings)
  sizes, losses = settings.rows, settings.losses
  if settings.method in methods.STAGES and settings.steps < 2:
    raise harness.SettingsError(
      f'{settings.method} has an update of each stage at least, got '
      f'steps={settings.steps}.'
    )
  if settings.method == 'maxright' and sizes.refresh % sizes.parts:
    raise harness.SettingsError(
      f'refresh={sizes.refresh} rows do not divide into parts={sizes.parts}.'
    )
  optima_of(settings)
  files = {n: getattr(settings.files, n) for n in ('sft_data', 'pref_data')}
  missing = [f'--{n}' for n in needed(settings.method) if not files[n]]
  if missing and any(files.values()):
    raise harness.SettingsError(
      f'the method {settings.method} needs {" and ".join(missing)} too; '
      'without any file, the preset smoke has made-up rows.'
    )
  distilled = losses.demonstrations == 'distillation'
  if losses.teacher and not distilled:
    raise harness.SettingsError(
      '--teacher is of the loss --demonstrations=distillation, got '
      f'{losses.demonstrations}.'
    )
  if distilled and files['sft_data'] and not losses.teacher:
    raise harness.SettingsError(
      '--demonstrations=distillation needs --teacher=DIR, a model whose words '
      'are those of --model.'
    )
  if sizes.pack and losses.demonstrations not in objectives.TOKEN_LOSSES:
    raise harness.SettingsError(
      f'--pack is of losses that see each token for itself, '
      f'{", ".join(objectives.TOKEN_LOSSES)}; got {losses.demonstrations}.'
    )


def needed(method: str) -> tuple[str, ...]:
  """The files that a method needs."""
  of = {'demonstrations': ('sft_data',), 'comparisons': ('pref_data',)}
  return of.get(method, ('sft_data', 'pref_data'))


def optima_of(settings: Settings) -> str | tuple[float, ...]:
  """The least losses that MAXRIGHT is given, or 'running'."""
  if settings.losses.optima == 'running':
    return 'running'
  try:
    first, second = map(float, settings.losses.optima.split(','))
    if not math.isfinite(first + second):
      raise ValueError('not finite')
  except ValueError as error:
    raise harness.SettingsError(
      "optima are 'running' or two finite numbers, of the demonstrations and "
      f'of the comparisons, got {settings.losses.optima!r}.'
    ) from error
  return first, second


def read(settings: Settings) -> tuple[dict[str, Any], dict[str, str]]:
  """The examples of the files that are given, and the files, by objective.

  Raises:
    UserError: if a file cannot be read; without `skip`, if a row is invalid or
      of the other kind.
  """
  examples, sources, files = {}, {}, settings.files
  for name, path in zip(
    settings.losses.names, (files.sft_data, files.pref_data), strict=True
  ):
    if not path:
      continue
    content = data_lib.read(
      path,
      skip=files.skip,
      flag='--skip=True',
      comparisons=name in objectives.COMPARISONS,
    )
    if content.wrong:
      print(row_files.describe(path, content.wrong))
    examples[name], sources[name] = content.examples, path
  return examples, sources


def load_teacher(
  settings: Settings, model: weights.Model, words: tokenizer.Tokenizer
) -> weights.Model:
  """The model to distil: of a made-up model, another one.

  Raises:
    UserError: if its words are not those of the model.
  """
  if path := settings.losses.teacher:
    return weights.teacher(path, model, words, settings.stored_dtype)
  return weights.make_random(16, seed=1)[0]


def is_made_up(options: harness.Options) -> bool:
  """Whether the model is a small random one."""
  return options.preset == 'smoke' and not options.settings.model


def prepare(
  options: harness.Options,
) -> tuple[problem_lib.Problem, harness.Layout | None]:
  """Reads the rows, and then the model, that the settings name."""
  settings = options.settings
  examples, sources = read(settings)
  if is_made_up(options):
    model, words, small = problem_lib.made_up(dtype=settings.stored_dtype)
    names = settings.losses.names
    examples = examples or dict(zip(names, small.values(), strict=True))
  elif not examples:
    files = ' and '.join(f'--{n}=FILE' for n in needed(settings.method))
    raise harness.MissingDataError(
      f'give your rows: {files}, .jsonl or .json; experiments/lm/data.py lists '
      'the keys. --sft_data is of demonstrations, --pref_data of comparisons.'
    )
  else:
    model, words = weights.load_both(settings.model, settings.stored_dtype)
  shape, teacher = settings.losses.shape(), None
  if 'distillation' in examples:
    teacher = load_teacher(settings, model, words)
    shape = shape._replace(teacher=teacher.config)
  layout, on_mesh = None, None
  if settings.mesh:
    layout, on_mesh = sharding.parse_layout(model.config, settings.mesh)
  problem = problem_lib.prepare(
    model,
    words,
    settings.tuning(model.config, on_mesh),
    examples,
    settings.rows,
    folder=f'{options.workdir}/kept',
    sources=sources,
    skip=settings.files.skip,
  )._replace(shape=shape)
  if teacher is not None:
    frozen = {**problem.frozen, 'teacher': teacher.params}
    problem = problem._replace(frozen=frozen)
  for name in problem.names:
    parts = problem.tables['train'][name].parts
    count = sum(len(p['index']) for p in parts)
    side = ', demonstrations side by side' if 'segments' in parts[0] else ''
    print(
      f'{name}: {count} rows to train on{side}; {problem.left[name]} examples '
      f'are left out: longer than {settings.rows.buckets[-1]} tokens, nothing '
      'to learn from, or refused by the template.'
    )
  return problem, layout


def export(
  options: harness.Options,
  folder: pathlib.Path,
  problem: problem_lib.Problem,
  trained: harness.Trained,
) -> None:
  """Writes the first seed's model, and its adapters alone."""
  settings, model = options.settings, problem.model
  dtype = settings.export_dtype(model.dtype)

  def make(folder):
    first = jax.tree.map(lambda leaf: leaf[0], harness.as_numpy(trained.params))
    hugging_face.export(
      folder,
      model.config,
      problem.tuning.merged(first, model.params),
      problem.words,
      dtype=dtype,
      generation=model.generation,
    )
    if settings.adapters.rank:
      alpha, base = settings.adapters.alpha, settings.model
      adapter_files.export(
        folder / 'adapters', model.config, first, alpha=alpha, base=base
      )

  output_folders.write(
    options.workdir, folder, f'{trained.step} {dtype.name}', make
  )
  print(f'Model: {folder}')


def main(options: harness.Options) -> harness.Report:
  """Trains, and writes the model."""
  settings = options.settings
  folder = pathlib.Path(settings.files.output or f'{options.workdir}/model')
  # A made-up model is written where that is asked for.
  exported = settings.files.output or not is_made_up(options)
  if exported:
    output_folders.require_own(options.workdir, folder)
  problem, layout = prepare(options)
  # Whatever the spelling of the weights.
  adapters = dataclasses.replace(
    settings.adapters, weights=problem.tuning.weights
  )
  trained = runs.run(
    options,
    problem,
    settings.method,
    settings.plan(settings.share, optima_of(settings)),
    name=settings.method,
    # A run may go on on another mesh. Stages are parts of the steps: with more
    # of them, it is another run.
    identity=harness.settings_of(
      dataclasses.replace(settings, adapters=adapters),
      *('files.output', 'mesh'),
      'dtype',  # Stored weights are compared by themselves.
      *(() if settings.method in methods.STAGES else ('steps',)),
    ),
    layout=layout,
  )
  results = harness.Results()
  curves = {}
  for name in problem.names:
    start, at = {'objective': name, 'at': 'start'}, {'objective': name}
    history = trained.history[f'held_out/{name}']
    curves[name] = trained.steps, history
    results.add(start, loss=history[0])
    results.add(at, loss=history[-1])
    if name in objectives.COMPARISONS:
      history = trained.history['held_out/accuracy']
      results.add(start, accuracy=history[0])
      results.add(at, accuracy=history[-1])
  for name, share in problem_lib.length_controls(problem).items():
    results.add({'objective': name}, accuracy=share)
  if exported:
    export(options, folder, problem, trained)
  figure = harness.draw_curves(
    curves, xlabel='updates', ylabel='loss on held-out rows'
  )
  return harness.Report(
    results,
    rows='objective',
    columns=[
      harness.Column(measure, f'{measure} {when}', at)
      for measure in ('loss', 'accuracy')
      for when, at in (('before', {'at': 'start'}), ('after', {}))
    ],
    plots={'held_out.png': figure},
  )


STUDY = harness.Study(
  main, PRESETS, paper='xright', binary='train', check=check
)


if __name__ == '__main__':
  harness.run(STUDY)
