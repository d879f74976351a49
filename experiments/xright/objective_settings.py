"""Settings of both objectives: files of rows, and losses."""

import dataclasses
import math
from typing import Annotated, Any, Literal

from experiments import harness
from experiments.lm import data as data_lib
from experiments.lm import objectives, row_files, stored_examples


@dataclasses.dataclass(frozen=True)
class Files:
  """Files that are read and written.

  Attributes:
    sft_data: file of demonstrations.
    pref_data: file of comparisons.
    start_adapters: folder of adapters in the format of peft, of a first stage
      for instance; merged into the model before training. References of
      comparisons are those of the merged model. '' for none.
    output: folder of the trained model, with its adapters in `adapters`, except
      after start adapters: then only the merged model; '' for `model` in the
      workdir. A random model is written only if this is set.
    skip: whether to skip invalid rows instead of stopping at the first one.
    stream: whether rows and their tokens stay on disk and each batch is read
      when it is needed, for files that exceed the memory, .jsonl or .jsonl.gz,
      which is unpacked into the workdir.
    keep: which model is written, the last one, or the best one: the one with
      the least sum of held-out losses, weighted by the mixing ratio, among
      those measured every --chunk updates.
  """

  sft_data: str = ''
  pref_data: str = ''
  start_adapters: str = ''
  output: str = ''
  skip: bool = False
  stream: bool = False
  keep: Literal['last', 'best'] = 'last'


@dataclasses.dataclass(frozen=True)
class Losses:
  """Losses of both objectives.

  Attributes:
    demonstrations: loss of demonstrations.
    comparisons: loss of comparisons.
    beta: strength of the pull to the reference, for losses with one.
    smoothing: assumed fraction of wrong comparisons in dpo.
    orpo_weight: weight of the odds ratio in orpo.
    uft_distance: distance of rewards to scores in uft and uft_pairs.
    teacher: folder or file of the teacher of distillation, with the tokenizer
      of the model.
    divergence: divergence of distillation; forward covers the teacher's
      answers, reverse seeks its modes.
    optima: the least loss of each kind, from runs of `--method=demonstrations`
      and `comparisons`, such as 1.9,0.6; `running` for the least so far.
  """

  demonstrations: Annotated[
    str, harness.Among(objectives.DEMONSTRATIONS, objectives.MEANINGS)
  ] = 'sft'
  comparisons: Annotated[
    str,
    harness.Among(
      objectives.COMPARISONS + objectives.LABELLED, objectives.MEANINGS
    ),
  ] = 'dpo'
  beta: float = 0.1
  smoothing: Annotated[float, harness.Allowed(low=0, high=0.5)] = 0.0
  orpo_weight: Annotated[float, harness.Allowed(low=0)] = 0.1
  uft_distance: Literal['squared', 'cross_entropy'] = 'squared'
  teacher: str = ''
  divergence: Literal['forward', 'reverse'] = 'forward'
  optima: str = 'running'

  @property
  def names(self) -> tuple[str, str]:
    """Both names, demonstrations first."""
    return self.demonstrations, self.comparisons

  def shape(self) -> objectives.Shape:
    """Parameters of the losses."""
    return objectives.Shape(
      self.beta,
      self.smoothing,
      self.orpo_weight,
      self.divergence,
      self.uft_distance,
    )

  def parsed_optima(self) -> str | tuple[float, ...]:
    """Optima for MAXRIGHT: two numbers, or 'running'."""
    if self.optima == 'running':
      return 'running'
    try:
      first, second = map(float, self.optima.split(','))
      if not math.isfinite(first + second):
        raise ValueError('not finite')
    except ValueError as error:
      raise harness.SettingsError(
        "--optima takes 'running' or two finite numbers, for demonstrations "
        f'and comparisons, got {self.optima!r}.'
      ) from error
    return first, second


def required_files(method: str) -> tuple[str, ...]:
  """Flags of the files that a method needs."""
  single = {'demonstrations': ('sft_data',), 'comparisons': ('pref_data',)}
  return single.get(method, ('sft_data', 'pref_data'))


def check(method: str, files: Files, losses: Losses) -> None:
  """Raises SettingsError if method, files and losses contradict each other."""
  losses.parsed_optima()
  paths = {n: getattr(files, n) for n in ('sft_data', 'pref_data')}
  missing = [f'--{n}' for n in required_files(method) if not paths[n]]
  if missing and any(paths.values()):
    alone = 'comparisons' if paths['pref_data'] else 'demonstrations'
    raise harness.SettingsError(
      f'the method {method} needs {" and ".join(missing)} too; '
      f'--method={alone} trains on your file alone. The preset smoke needs no '
      'files, as it makes up rows.'
    )
  distilled = losses.demonstrations == 'distillation'
  if losses.teacher and not distilled:
    raise harness.SettingsError(
      '--teacher needs --demonstrations=distillation, got '
      f'{losses.demonstrations}.'
    )
  if distilled and paths['sft_data'] and not losses.teacher:
    raise harness.SettingsError(
      '--demonstrations=distillation needs --teacher=DIR, a model with the '
      'tokenizer of --model.'
    )


def read(
  files: Files, losses: Losses, folder: str
) -> tuple[dict[str, Any], dict[str, str]]:
  """Reads the files; gives examples and paths by objective.

  Args:
    files: the files.
    losses: the losses, which need kinds of rows.
    folder: folder of unpacked files, for `files.stream`.

  Raises:
    UserError: if a file cannot be read, or if a row is invalid and not skipped.
  """
  examples, sources = {}, {}
  for name, path in zip(
    losses.names, (files.sft_data, files.pref_data), strict=True
  ):
    if not path:
      continue
    store = None
    if files.stream:
      store = stored_examples.StoredExamples(path, folder)
    content = data_lib.read(
      path,
      skip=files.skip,
      flag='--skip=True',
      kind=objectives.kind(name),
      store=store,
    )
    if content.wrong:
      print(row_files.describe(path, content.wrong))
    examples[name], sources[name] = content.examples, path
  return examples, sources
