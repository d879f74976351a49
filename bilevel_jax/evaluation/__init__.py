"""Wrappers of oracles: where, and on what, gradients are evaluated.

Wrappers that take means over samples (`accumulate`, `mean_over`, `independent`,
`saga`) need an oracle that is linear in them; the first two also take one whose
losses can be averaged within (see `bilevel_jax.oracles.base`), `storm` and
`delayed` any.
"""

from bilevel_jax.evaluation._accumulate import accumulate
from bilevel_jax.evaluation._delayed import DelayedState, delayed
from bilevel_jax.evaluation._independent import independent
from bilevel_jax.evaluation._mean_over import mean_over
from bilevel_jax.evaluation._parts import deal_batch, split_batch
from bilevel_jax.evaluation._saga import SagaState, saga
from bilevel_jax.evaluation._storm import StormState, storm
from bilevel_jax.evaluation._together import together

__all__ = [
  'DelayedState',
  'SagaState',
  'StormState',
  'accumulate',
  'deal_batch',
  'delayed',
  'independent',
  'mean_over',
  'saga',
  'split_batch',
  'storm',
  'together',
]
