"""Compares the answers of two language models by a judge.

    python -m experiments.lm.compare A.jsonl B.jsonl --judge_data=PAIRS.jsonl

Expected: the win rate of A over B, with and without the influence of length.
Time: 10 minutes on 2 cores for 600 comparisons and 200 answers of the default
model.

A and B are files of `experiments.lm.generate` for the same prompts. The judge
is a reward model trained on the comparisons of PAIRS, other than those that A
or B were trained on. A fifth of them is kept apart: the share that the judge
orders rightly is reported, with that of the rule "the longer answer". Nothing
follows from a judge that is no better than this rule.

`length-controlled` is the win rate at equal lengths, by logistic regression of
the judgements on the difference of the lengths (Dubois, Galambosi, Liang and
Hashimoto, Length-controlled AlpacaEval, COLM 2024). With
`--models=DIR_A,DIR_B --reference=FILE.jsonl`, the mean log-probability of the
reference answers under both models is reported, too.
"""

import dataclasses
import pathlib
from typing import Annotated, Any, Literal

import jax
import numpy as np
import scipy.optimize
import scipy.special

from experiments import harness
from experiments.lm import (
  batches,
  generate,
  judge,
  log_probs,
  row_files,
  weights,
)
from experiments.lm import data as data_lib

_EVERY = 5  # Every fifth comparison is kept apart.
# Regularises the regression on lengths, which separable judgements need.
_PENALTY = 1e-3


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    judge: model whose hidden states the judge reads: folder of Hugging Face or
      .gguf file; '' for SmolLM2-135M, 'random' for a small random model.
    judge_data: file of comparisons, on which the judge is trained.
    bad_rows: whether invalid comparisons are refused or skipped.
    judge_rows: largest number of comparisons, the first ones; 0 for all.
    max_length: tokens of a prompt with its answer that the judge reads, the
      last ones.
    models: two models, for the log-probabilities; empty for none.
    reference: file of prompts with answers, for the log-probabilities.
  """

  judge: str = ''
  judge_data: str = ''
  bad_rows: Literal['refuse', 'skip'] = 'refuse'
  judge_rows: Annotated[int, harness.Allowed(low=0)] = 600
  max_length: int = 512
  models: Annotated[tuple[str, ...], harness.Allowed(empty=True)] = ()
  reference: str = ''


PRESETS = {'user': Settings()}


def read_pair(path_a: str, path_b: str) -> list[list[data_lib.Example]]:
  """Reads two files of answers.

  Raises:
    UserError: if they have no answers to the same prompts.
  """
  a, b = ({one.row: one for one in _answers(path)} for path in (path_a, path_b))
  shared = sorted(a.keys() & b.keys())
  for row in shared:
    if a[row].prompt != b[row].prompt:
      raise harness.UserError(
        f'{path_a} and {path_b} have other prompts in row {row}: give answers '
        'to the same file of prompts.'
      )
  if not shared:
    raise harness.UserError(
      f'{path_a} and {path_b} have no row in common: give answers to the same '
      'file of prompts.'
    )
  return [[side[row] for row in shared] for side in (a, b)]


def _answers(path: str) -> list[data_lib.Example]:
  """Reads the answers of a file; empty answers count."""
  examples = []
  for place, row in enumerate(row_files.read_rows(path)):
    number, text = row.get('row', place), row.get('response')
    if not isinstance(number, int) or not isinstance(text, str):
      raise harness.UserError(
        f'{path}, row {place} (from 0) has no text under response: give a file '
        'that experiments.lm.generate has written.'
      )
    examples.append(data_lib.Example(number, data_lib.as_prompt(row), text))
  return examples


def at_equal_length(wins: np.ndarray, lengths: np.ndarray) -> float:
  r"""Estimates the win rate at equal lengths.

  .. math:: P(win) = \sigma(a + b \tanh(d / s))

  with the difference d of the lengths and its deviation s; the rate is
  :math:`\sigma(a)`.

  Args:
    wins: 1, 0 or 0.5, (answers,).
    lengths: difference of the lengths, (answers,).

  Returns:
    The rate, in (0, 1).
  """
  z = np.tanh(lengths / max(float(np.std(lengths)), 1e-9))

  def loss(w):
    logits = w[0] + w[1] * z
    fit = np.mean(np.logaddexp(0, logits) - wins * logits)
    error = scipy.special.expit(logits) - wins
    slope = np.array([np.mean(error), np.mean(error * z)])
    return fit + _PENALTY * w @ w / 2, slope + _PENALTY * w

  minimum = scipy.optimize.minimize(loss, np.zeros(2), jac=True, method='BFGS')
  return float(scipy.special.expit(minimum.x[0]))


def _train(
  settings: Settings, model: Any, tokenizer: Any, folder: pathlib.Path
) -> judge.Judge:
  """Trains the judge."""
  content = data_lib.read(
    settings.judge_data,
    skip=settings.bad_rows == 'skip',
    flag='--bad_rows=skip',
    kind='comparisons',
  )
  if content.wrong:
    print(row_files.describe(settings.judge_data, content.wrong))
  examples = content.examples
  examples = examples[: settings.judge_rows or None]
  chosen, rejected = (
    judge.read_features(
      model, tokenizer, side, max_length=settings.max_length, folder=folder
    )
    for side in (
      examples,
      [one._replace(answer=one.rejected or '') for one in examples],
    )
  )
  lengths = [(len(one.answer), len(one.rejected or '')) for one in examples]
  held_out = np.arange(len(examples)) % _EVERY == _EVERY - 1
  return judge.fit(chosen, rejected, np.array(lengths), held_out)


def reference_log_probs(path: str, file: str, max_length: int) -> np.ndarray:
  """Mean log-probability of each reference answer under a model, nats."""
  model, tokenizer = weights.load_both(path)
  encoded = batches.encode(
    tokenizer,
    data_lib.read(file, kind='demonstrations').examples,
    max_length=max_length,
    source=file,
    flag='--max_length',
  )
  rows = batches.stacked(encoded, max_length)
  run = jax.jit(
    lambda tokens, mask: log_probs.from_tokens(
      model.config, model.params, tokens[None], mask[None]
    ).mean[0]
  )
  return np.array([run(*row) for row in zip(rows['tokens'], rows['mask'])])


def check(settings: Settings) -> None:
  """Raises SettingsError for incomplete settings."""
  if len(settings.models) not in (0, 2) or (
    bool(settings.models) != bool(settings.reference)
  ):
    raise harness.SettingsError(
      'the log-probabilities need two --models=A,B and a file --reference.'
    )


def main(options: harness.Options, a: str, b: str) -> harness.Report:
  """Judges the answers of two files."""
  settings = options.settings
  if not settings.judge_data:
    raise harness.MissingDataError(
      '--judge_data is missing: give a file of comparisons, such as a .jsonl '
      'file with lines {"prompt": "...", "chosen": "...", "rejected": "..."}.'
    )
  sides = read_pair(a, b)
  model, tokenizer = generate.load(generate.Settings(model=settings.judge))
  folder = pathlib.Path(options.workdir) / 'kept'
  judged = _train(settings, model, tokenizer, folder)
  rewards = [
    judged.rewards(
      judge.read_features(
        model, tokenizer, side, max_length=settings.max_length, folder=folder
      )
    )
    for side in sides
  ]
  wins = judge.preference(rewards[0] - rewards[1])
  lengths = np.subtract(*[[len(one.answer) for one in side] for side in sides])
  results = harness.Results()
  results.add(
    win_rate=harness.mean_interval(wins),
    length_controlled=harness.jackknife_interval(
      lambda at: at_equal_length(wins[at], lengths[at]), len(wins)
    ),
    judge_accuracy=harness.mean_interval(judged.accuracy),
    longer_is_better=harness.mean_interval(judged.by_length),
    length_difference=harness.mean_interval(lengths),
  )
  if settings.models:
    first, second = (
      reference_log_probs(path, settings.reference, settings.max_length)
      for path in settings.models
    )
    results.add(
      log_prob=float(first.mean()),
      log_prob_difference=harness.mean_interval(first - second),
    )
  return harness.Report(results, rows=())


STUDY = harness.Study(main, PRESETS, check=check)


if __name__ == '__main__':
  harness.run(STUDY)
