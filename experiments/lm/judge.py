"""A reward model that judges answers, trained on comparisons.

The reward of an answer is linear in hidden states of a frozen language model:
the last one, and the mean over the answer's tokens. Weights maximise the
likelihood of Bradley and Terry,

    P(chosen preferred to rejected) = sigmoid(r(chosen) - r(rejected)),

with a quadratic penalty that is chosen by cross-validation.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import sklearn.linear_model
import sklearn.model_selection

import bilevel_jax as bj
from experiments import harness
from experiments.lm import array_cache, batches, decoder, weights
from experiments.lm import data as data_lib
from experiments.lm import tokenizer as tokenizer_lib

# Strengths of the penalty, as in scikit-learn: smaller is stronger.
_STRENGTHS = tuple(10.0**k for k in range(-5, 2))
_FOLDS = 5


class Judge(NamedTuple):
  """A trained judge.

  Attributes:
    direction: weights of the reward, (features,).
    scale: divides the features, (features,).
    accuracy: whether each comparison kept apart is ordered rightly, 0.5 for a
      tie, (comparisons,).
    by_length: the same for the rule that prefers the longer answer.
  """

  direction: np.ndarray
  scale: np.ndarray
  accuracy: np.ndarray
  by_length: np.ndarray

  def rewards(self, features: np.ndarray) -> np.ndarray:
    """Rewards of answers, (answers,)."""
    return (features / self.scale) @ self.direction


def read_features(
  model: weights.Model,
  tokenizer: tokenizer_lib.Tokenizer,
  examples: Sequence[data_lib.Example],
  *,
  max_length: int,
  folder: Any = None,
  rows: int = 8,
) -> np.ndarray:
  """Computes the features of answers.

  Args:
    model: the frozen model.
    tokenizer: its tokeniser.
    examples: prompts with answers; their rejected answers are not read.
    max_length: tokens that are read; of longer ones the last, so that the
      answer's end is seen.
    folder: folder of stored arrays, see `array_cache.load_or_compute`.
    rows: answers per batch.

  Returns:
    float32 (examples, 2 * width).
  """
  pairs = [
    batches.encode_answer(tokenizer, one.prompt, one.answer) for one in examples
  ]
  tokens = np.zeros((len(pairs), max_length), np.int32)
  mask = np.zeros((len(pairs), max_length), np.int32)
  for i, (own, answer) in enumerate(pairs):
    own, answer = own[-max_length:], answer[-max_length:]
    tokens[i, : len(own)], mask[i, : len(own)] = own, answer

  @functools.partial(jax.jit, static_argnames='length')
  def run(params, tokens, mask, length):
    tokens, mask = tokens[:, :length], mask[:, :length]
    x = decoder.run_layers(
      model.config, params['layers'], decoder.embed(params, tokens)
    )
    x = decoder.rms_norm(x, params['norm'], model.config.norm_epsilon)
    last = jnp.max(jnp.where(mask > 0, jnp.arange(length), 0), axis=1)
    at_last = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
    mean = jax.vmap(bj.losses.masked_mean, (1, None), 1)
    return jnp.concatenate([at_last, mean(x.mT, mask)], axis=1)

  def compute():
    lengths = (tokens.shape[1] - np.argmax(mask[:, ::-1], axis=1)).astype(int)
    output = np.zeros((len(pairs), 2 * model.config.width), np.float32)
    order = np.argsort(lengths, kind='stable')
    for start in range(0, len(order), rows):
      at = np.resize(order[start : start + rows], rows)
      needed = max(32, 1 << (int(lengths[at].max()) - 1).bit_length())
      length = min(needed, max_length)
      output[at] = run(model.params, tokens[at], mask[at], length)
    return {'features': output}

  inputs = {'tokens': tokens, 'mask': mask, 'params': model.params}
  return np.asarray(
    array_cache.load_or_compute(
      folder,
      'judge',
      f'{model.config}',
      inputs,
      compute,
      names=['features'],
      count=len(pairs),
    )['features']
  )


def fit(
  chosen: np.ndarray,
  rejected: np.ndarray,
  lengths: np.ndarray,
  held_out: np.ndarray,
) -> Judge:
  """Fits a judge to comparisons.

  Args:
    chosen: features of chosen answers, (comparisons, features).
    rejected: features of rejected answers, of the same shape.
    lengths: lengths of both answers, (comparisons, 2).
    held_out: which comparisons are kept apart, bool (comparisons,).

  Returns:
    The judge.

  Raises:
    UserError: if there are too few comparisons.
  """
  train = ~held_out
  if train.sum() < 2 * _FOLDS or held_out.sum() < 2:
    raise harness.UserError(
      f'the judge has {train.sum()} comparisons to learn from and '
      f'{held_out.sum()} kept apart, expected at least {2 * _FOLDS} and 2: '
      'give more comparisons.'
    )
  both = np.concatenate([chosen[train], rejected[train]])
  scale = np.maximum(both.std(axis=0), 1e-6)
  differences = (chosen - rejected) / scale
  # Each pair occurs in both orders, so that no order is preferred.
  x = np.concatenate([differences[train], -differences[train]])
  y = np.repeat([1, 0], train.sum())
  fold = np.tile(np.arange(train.sum()) % _FOLDS, 2)
  folds = [
    (np.flatnonzero(fold != k), np.flatnonzero(fold == k))
    for k in range(_FOLDS)
  ]
  search = sklearn.model_selection.GridSearchCV(
    sklearn.linear_model.LogisticRegression(
      fit_intercept=False, max_iter=1_000
    ),
    {'C': _STRENGTHS},
    cv=folds,
    scoring='neg_log_loss',
  )
  direction = search.fit(x, y).best_estimator_.coef_[0]
  return Judge(
    direction,
    scale,
    preference(differences[held_out] @ direction),
    preference(lengths[held_out, 0] - lengths[held_out, 1]),
  )


def preference(difference: np.ndarray) -> np.ndarray:
  """1 for a positive difference, 0 for a negative one, 0.5 for a tie."""
  return (1 + np.sign(difference)) / 2
