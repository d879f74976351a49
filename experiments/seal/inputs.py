"""Settings of models and rows, shared by the binaries, and how both load."""

import dataclasses
from typing import Annotated, Literal

from experiments import harness
from experiments.lm import (
  batches,
  lora,
  objectives,
  precision,
  tuning,
  weights,
)
from experiments.lm import tokenizer as tokenizer_lib
from experiments.seal import rows, tuned_models

SETS = ('shuffled', 'harmless', 'made_up')
SETS_MEANINGS = {
  'shuffled': 'answers to other prompts among ordinary rows.',
  'harmless': 'rejected answers among ordinary rows.',
  'made_up': 'short random rows, which need no data.',
}


@dataclasses.dataclass(frozen=True)
class Files:
  """A user's files.

  Attributes:
    finetune_data: file of rows to rank or to train on; '' for known rows.
    safe_data: file of safe rows; '' for known rows.
    unsafe_data: file of unsafe rows, for the score distance_both; '' for none.
    bad_rows: whether invalid rows are refused or skipped.
    output: folder of the results; '' for the workdir, or for no model.
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
  """Numbers of rows whose kind is known.

  Attributes:
    safe_source: safe rows of 'harmless': 'chosen' answers or 'instructions'.
    benign: ordinary rows of 'harmless' and 'made_up'.
    chosen: chosen answers to rank.
    unsafe: unsafe rows to rank; a fifth of all rows, as in the paper.
    safe: safe rows.
    reference_rows: further unsafe rows, for the score distance_both.
    shuffled_share: 'shuffled' has this fraction of all these numbers.
  """

  safe_source: Literal['chosen', 'instructions'] = 'chosen'
  benign: int = 384
  chosen: Annotated[int, harness.Allowed(low=0)] = 128
  unsafe: int = 128
  safe: int = 192
  reference_rows: Annotated[int, harness.Allowed(low=0)] = 32
  shuffled_share: Annotated[float, harness.Allowed(high=1.0)] = 0.375


# The published sizes as far as the data goes.
PAPER_ROWS = Known(benign=1_200, unsafe=300)


@dataclasses.dataclass(frozen=True)
class Adapters:
  """Adapters of low rank (LoRA).

  Attributes:
    layers: number of layers with adapters, the last ones; 0 for all, as in the
      paper. Outputs of the layers below are computed once per row.
    rank: rank of the adapters; 16 in the paper.
    rate: step size of Adam.
  """

  layers: Annotated[int, harness.Allowed(low=0)] = 4
  rank: int = 8
  rate: float = 4e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(precision.Precision):
  """Settings of all binaries that run a model.

  Attributes:
    model: folder of Hugging Face or .gguf file; '' for SmolLM2-135M, 'random'
      for a small random model of bytes.
    max_length: tokens of a prompt with its answer; longer rows are left out.
    score: the score by which rows are kept.
    keep: fraction of the rows that is kept, as in the paper.
    seeds: of data and order; only the first is run.
    files: a user's files.
    known: numbers of known rows.
    adapters: of the model.
  """

  model: str = ''
  max_length: int = 96
  score: str = 'seal'
  keep: Annotated[float, harness.Allowed(high=1.0)] = 0.8
  seeds: int = 1
  files: Files = Files()
  known: Known = Known()
  adapters: Adapters = Adapters()


# Settings on which no training run depends, or whose content is compared.
NO_IDENTITY = ('model', 'dtype', 'score', 'keep', 'files')
RENAMED = {
  'longest': 'max_length',
  'anchors': 'known.reference_rows',
  'known.anchors': 'known.reference_rows',
  'safe_of': 'known.safe_source',
  'known.safe_of': 'known.safe_source',
}


def check(settings: Settings) -> None:
  """Raises SettingsError for settings that no run can have."""
  if bool(settings.files.finetune_data) != bool(settings.files.safe_data):
    raise harness.SettingsError(
      'give two files, --finetune_data and --safe_data, or none.'
    )


def load_model(
  settings: Settings,
) -> tuple[weights.Model, tokenizer_lib.Tokenizer]:
  """Loads the model of the settings, and its tokenizer."""
  dtype = settings.stored_dtype
  if settings.model == 'random':
    return weights.make_random(16, dtype=dtype)
  return weights.load_both(settings.model, dtype)


def load_tuned_model(
  settings: Settings, *, beta: float = 0.1, teacher: str = ''
) -> tuned_models.TunedModel:
  """Loads the model of the settings, with adapters in its last layers.

  Args:
    settings: of the binary.
    beta: of the losses with a reference.
    teacher: folder or file of the teacher of distillation; '' for none.
  """
  model, tokenizer = load_model(settings)
  tuned = tuning.Tuning(
    model.config,
    rank=settings.adapters.rank,
    alpha=float(settings.adapters.rank),
    weights=lora.WEIGHTS if settings.model == 'random' else ('q', 'v'),
    layers=min(settings.adapters.layers, model.config.layers) or None,
    dtype=settings.compute_dtype,
  )
  below, frozen = tuned.split(model.params)
  shape = objectives.Shape(beta)
  if teacher:
    loaded = weights.teacher(teacher, model, tokenizer, settings.stored_dtype)
    shape = shape._replace(teacher=loaded.config)
    frozen = {**frozen, 'teacher': loaded.params}
  return tuned_models.TunedModel(tuned, frozen, below, tokenizer, shape)


def compose(
  options: harness.Options, name: str, tokenizer: tokenizer_lib.Tokenizer
) -> rows.Sets:
  """Composes a set of known rows that fit into the length."""
  settings, seed = options.settings, options.seeds[0]
  known = settings.known
  sizes = rows.Sizes(
    known.benign, known.chosen, known.unsafe, known.safe, known.reference_rows
  )
  if name == 'made_up':
    return rows.made_up(sizes, seed=seed)
  require_data(options, name)

  def fits(example):
    tokens, _ = batches.encode_answer(tokenizer, example.prompt, example.answer)
    return len(tokens) <= settings.max_length

  if name == 'harmless':
    return rows.harmless(
      options.data_dir, sizes, fits, seed=seed, safe_source=known.safe_source
    )
  # This set has no chosen answers.
  sizes = sizes._replace(benign=sizes.benign + sizes.chosen, chosen=0)
  part = [round(known.shuffled_share * count) for count in sizes]
  return rows.ordinary_and_shuffled(
    options.data_dir, rows.Sizes(*part), fits, seed=seed
  )


def require_data(options: harness.Options, name: str) -> None:
  """Raises MissingDataError if files of known rows are missing."""
  if name == 'made_up':
    return
  if options.data_dir is None:
    raise harness.MissingDataError(
      f'--data_dir is missing: give a folder with {rows.WHERE}; or your own '
      'files: --preset=user --finetune_data=F.jsonl --safe_data=S.jsonl.'
    )
  rows.require(options.data_dir, name, options.settings.known.safe_source)
