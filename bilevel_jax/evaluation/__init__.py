"""Wrappers of oracles: where, and on what, gradients are evaluated."""

from bilevel_jax.evaluation._accumulate import accumulate, split_batch
from bilevel_jax.evaluation._independent import deal_batch, independent
from bilevel_jax.evaluation._mean_over import mean_over
from bilevel_jax.evaluation._saga import SagaState, saga
from bilevel_jax.evaluation._storm import StormState, storm
from bilevel_jax.evaluation._together import together

__all__ = [
  'SagaState',
  'StormState',
  'accumulate',
  'deal_batch',
  'independent',
  'mean_over',
  'saga',
  'split_batch',
  'storm',
  'together',
]
