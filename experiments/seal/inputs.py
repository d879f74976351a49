"""Models and rows of the binaries: a user's own, or known ones."""

import dataclasses
from typing import Annotated, Literal

from experiments import harness
from experiments.lm import (
  batches,
  lora,
  objectives,
  precision,
  tokenizer,
  tuning,
  weights,
)
from experiments.seal import rows, subjects

SETS = ('shuffled', 'harmless', 'made_up')


@dataclasses.dataclass(frozen=True)
class Files:
  """Rows of a user's own, and what is written.

  Attributes:
    finetune_data: rows to rank or to train on; '' for known rows.
    safe_data: safe rows; '' for known rows.
    unsafe_data: unsafe rows, if there are any, for the score that takes them.
    bad_rows: whether invalid rows are refused or skipped.
    output: a folder for what is written; '' for the workdir, or for no model.
  """

  finetune_data: str = ''
  safe_data: str = ''
  unsafe_data: str = ''
  bad_rows: Literal['refuse', 'skip'] = 'refuse'
  output: str = ''

  @property
  def skip(self) -> bool:
    """Whether invalid rows are skipped."""
    return self.bad_rows == 'skip'


@dataclasses.dataclass(frozen=True)
class Known:
  """Known rows, by which scores are judged.

  Attributes:
    safe_of: what is safe for 'harmless': 'chosen' answers or 'instructions'.
    benign: ordinary rows of 'harmless' and of 'made_up'.
    chosen: chosen answers among the ordinary rows.
    unsafe: unsafe rows; by default a fifth of all rows, as in the paper.
    safe: safe rows.
    anchors: further unsafe rows, for the score that takes them.
    shuffled_share: 'shuffled' has this share of all numbers of rows.
  """

  safe_of: Literal['chosen', 'instructions'] = 'chosen'
  benign: int = 384
  chosen: Annotated[int, harness.Allowed(low=0)] = 128
  unsafe: int = 128
  safe: int = 192
  anchors: Annotated[int, harness.Allowed(low=0)] = 32
  shuffled_share: Annotated[float, harness.Allowed(high=1.0)] = 0.375


# The published sizes; their rows and models are larger than what is here.
PAPER_ROWS = Known(benign=1_200, unsafe=300)


@dataclasses.dataclass(frozen=True)
class Adapters:
  """What is trained of a model.

  Attributes:
    layers: how many layers have adapters, the last ones; 0 for all, as in the
      paper. The output of the others is kept, for all rows.
    rank: of the adapters; the paper's is 16.
    rate: step size of Adam.
  """

  layers: Annotated[int, harness.Allowed(low=0)] = 4
  rank: int = 8
  rate: float = 4e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(precision.Precision):
  """Settings of all binaries that run a model.

  Attributes:
    model: a folder of Hugging Face or a .gguf file; '' for SmolLM2-135M, and
      'random' for a few random weights that read bytes.
    max_length: tokens of a prompt with its answer; longer rows are left out.
    score: by which of the scores rows are kept.
    keep: the share of the rows that is kept; the paper's.
    seeds: of data and order; one is run.
    files: rows of a user's own, and what is written.
    known: known rows.
    adapters: what is trained.
  """

  model: str = ''
  max_length: int = 96
  score: str = 'seal'
  keep: Annotated[float, harness.Allowed(high=1.0)] = 0.8
  seeds: int = 1
  files: Files = Files()
  known: Known = Known()
  adapters: Adapters = Adapters()


# Fields on which no run depends, or whose content is compared by itself.
NO_IDENTITY = ('model', 'dtype', 'score', 'keep', 'files')
RENAMED = {'longest': 'max_length'}


def check(settings: Settings) -> None:
  """Raises SettingsError for settings that no run can have."""
  if bool(settings.files.finetune_data) != bool(settings.files.safe_data):
    raise harness.SettingsError(
      "a user's rows are two files: --finetune_data and --safe_data, rows that "
      'are safe.'
    )


def load_model(settings: Settings) -> tuple[weights.Model, tokenizer.Tokenizer]:
  """A model by its path: '' for SmolLM2, 'random' for a few weights."""
  dtype = settings.stored_dtype
  if settings.model == 'random':
    return weights.make_random(16, dtype=dtype)
  return weights.load_both(settings.model, dtype)


def load_subject(
  settings: Settings, *, beta: float = 0.1, teacher: str = ''
) -> subjects.Subject:
  """The model of the settings, with adapters of its last layers.

  Args:
    settings: of the binary.
    beta: of the losses that have a reference.
    teacher: of distillation: a folder or file; '' for none.
  """
  model, words = load_model(settings)
  how = tuning.Tuning(
    model.config,
    rank=settings.adapters.rank,
    alpha=float(settings.adapters.rank),
    weights=lora.WEIGHTS if settings.model == 'random' else ('q', 'v'),
    layers=min(settings.adapters.layers, model.config.layers) or None,
    dtype=settings.compute_dtype,
  )
  below, frozen = how.split(model.params)
  shape = objectives.Shape(beta)
  if teacher:
    loaded = weights.teacher(teacher, model, words, settings.stored_dtype)
    shape = shape._replace(teacher=loaded.config)
    frozen = {**frozen, 'teacher': loaded.params}
  return subjects.Subject(how, frozen, below, words, shape)


def compose(
  options: harness.Options, name: str, words: tokenizer.Tokenizer
) -> rows.Sets:
  """Known rows of a set, those that fit into the length."""
  settings, seed = options.settings, options.seeds[0]
  known = settings.known
  sizes = rows.Sizes(
    known.benign, known.chosen, known.unsafe, known.safe, known.anchors
  )
  if name == 'made_up':
    return rows.made_up(sizes, seed=seed)
  require_data(options, name)

  def fits(example):
    tokens, _ = batches.encode_answer(words, example.prompt, example.answer)
    return len(tokens) <= settings.max_length

  if name == 'harmless':
    return rows.harmless(
      options.data_dir, sizes, fits, seed=seed, safe_of=known.safe_of
    )
  # All of its ordinary rows are instructions.
  sizes = sizes._replace(benign=sizes.benign + sizes.chosen, chosen=0)
  part = [round(known.shuffled_share * count) for count in sizes]
  return rows.control(options.data_dir, rows.Sizes(*part), fits, seed=seed)


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
  rows.require(options.data_dir, name, options.settings.known.safe_of)
