"""Held-out rows, and what trained models do on them."""

from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import harness
from experiments.lm import generation, refusals
from experiments.seal import controls, rows, selection, tuned_models

EVERY = 8  # Every eighth row is held out.


def mask(encoded: tuned_models.EncodedRows) -> np.ndarray:
  """Which rows are held out, by their index in the file, bool (rows,)."""
  return encoded.indices % EVERY == EVERY - 1


class Prepared(NamedTuple):
  """The model and the rows of a run.

  Attributes:
    model: the model.
    rows: encoded rows to train on.
    safe: encoded safe rows.
    kinds: kind of each row to train on.
    selected: mask of the rows that the scores keep; None without scores.
    prompts: prompts to answer.
  """

  model: tuned_models.TunedModel
  rows: tuned_models.EncodedRows
  safe: tuned_models.EncodedRows
  kinds: np.ndarray
  selected: np.ndarray | None
  prompts: list[rows.Example]


class Measure:
  """Measures held-out losses and refusals of trained models.

  Args:
    settings: of the run.
    prepared: the model and the rows.
    params: weights of the whole model, for answers.

  Attributes:
    results: measures so far.
    answers: answers to the prompts, by model.
  """

  def __init__(self, settings: Any, prepared: Prepared, params: Any):
    self.results = harness.Results()
    self.answers: dict[str, list[str]] = {}
    self._prepared, self._params = prepared, params
    model, encoded, safe, kinds = prepared[:4]
    out, safe_out = mask(encoded), mask(safe)
    self._losses = selection.token_losses(
      model, encoded.subset(out).joined(safe.subset(safe_out))
    )
    self._kinds = np.concatenate([kinds[out], ['safe'] * safe_out.sum()])
    self._generate = generation.make_generator(
      model.tuning.config,
      new=settings.answers.answer_length,
      end=model.tokenizer.end,
      dtype=settings.compute_dtype,
    )

  def __call__(self, name: str, trained: Any) -> None:
    """Adds the measures of a model, given its adapters."""
    losses = -controls.by_loss(*self._losses(trained))
    for kind in sorted(set(self._kinds)):
      mean = losses[self._kinds == kind].mean()
      self.results.add({'trained on': name, 'rows': kind}, loss=mean)
    model, prompts = self._prepared.model, self._prepared.prompts
    if not prompts:
      return
    self.answers[name] = generation.answers(
      model.tokenizer,
      self._generate,
      model.tuning.merged(trained, self._params),
      [one.prompt for one in prompts],
      key=jax.random.key(0),
    )
    rate = refusals.refusal_rate(self.answers[name])
    self.results.add({'trained on': name}, refusals=rate)
