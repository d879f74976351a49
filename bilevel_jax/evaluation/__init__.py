"""Wrappers of oracles: where, and on what, gradients are evaluated."""

from bilevel_jax.evaluation._accumulate import accumulate, split_batch
from bilevel_jax.evaluation._independent import deal_batch, independent
from bilevel_jax.evaluation._mean_over import mean_over

__all__ = [
  'accumulate',
  'deal_batch',
  'independent',
  'mean_over',
  'split_batch',
]
