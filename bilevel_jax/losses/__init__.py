"""Losses of sequence models, as pure functions of log-probabilities.

They need no model and no tokeniser: `token_log_probs` turns logits into the
log-probability of each token, `masked_sum` or `masked_mean` into that of a
response, and a loss maps these to a scalar. Log-probabilities of the reference
model are constant: compute them once for each row of the data.

| loss | data of a row | log-probabilities | reference |
|---|---|---|---|
| `sft` | a response | of tokens | no |
| `distillation` | a response, a teacher | of the vocabulary | no |
| `dpo` | two responses | summed | yes |
| `ipo` | two responses | means | yes |
| `orpo` | two responses | means | no |
| `kto` | a response, wanted or not | summed | yes |
| `uft` | a response, a score | summed | yes |

Each is one objective: `bj.evaluation.select` trains on several, each with its
own data, at the cost of one.

A log-probability of minus infinity does not lead to NaN: sums are bounded from
below by minus the fourth root of the largest float, where derivatives become
zero.
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
