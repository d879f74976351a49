"""Losses of sequence models, as pure functions of log-probabilities.

No model and no tokeniser: a model gives the log-probability of each token
(`token_log_probs`), `masked_sum` or `masked_mean` that of a response, and a
loss is a scalar of these. What the reference model says is constant, and is
computed once for each row of the data.

| loss | of a row | log-probabilities | reference |
|---|---|---|---|
| `sft` | a response | of tokens | no |
| `distillation` | a response, a teacher | of the vocabulary | no |
| `dpo` | two responses | summed | yes |
| `ipo` | two responses | means | yes |
| `orpo` | two responses | means | no |
| `kto` | a response, wanted or not | summed | yes |
| `uft` | a response, a score | summed | yes |

Each is the loss of one objective: `bj.evaluation.select` takes several, each
with data of its own, at the cost of one.

Minus infinity, of a response that a model rules out, gives no NaN: sums are
bounded from below at the fourth root of the largest number, where derivatives
become zero.
"""

from bilevel_jax.losses._preference import (
  dpo,
  ipo,
  kto,
  log_odds,
  orpo,
  preference_margin,
  uft,
)
from bilevel_jax.losses._supervised import chord_weights, distillation, sft
from bilevel_jax.losses._tokens import masked_mean, masked_sum, token_log_probs

__all__ = [
  'chord_weights',
  'distillation',
  'dpo',
  'ipo',
  'kto',
  'log_odds',
  'masked_mean',
  'masked_sum',
  'orpo',
  'preference_margin',
  'sft',
  'token_log_probs',
  'uft',
]
