"""Wrappers of oracles: where, and on what, gradients are evaluated.

Wrappers that take means over samples (`accumulate`, `mean_over`, `independent`,
`saga`) need an oracle that is linear in them; the first two also take one whose
losses can be averaged within (see `bilevel_jax.oracles.base`), `storm`,
`recursive` and `delayed` any. Wrappers of several oracles: `together` at one
point, `mixed` for a weighted sum, and `select`, which evaluates one of them, by
one of the rules `at_random`, `largest_gap`, `in_sequence` and `as_given`. Of a
whole solver: `wrapped` puts a wrapper around each of its oracles, `unmeasured`
leaves out its losses and counts.
"""

from bilevel_jax.evaluation._accumulate import accumulate
from bilevel_jax.evaluation._delayed import DelayedState, delayed
from bilevel_jax.evaluation._independent import independent
from bilevel_jax.evaluation._mean_over import mean_over
from bilevel_jax.evaluation._mixed import MixedState, mixed
from bilevel_jax.evaluation._parts import deal_batch, split_batch
from bilevel_jax.evaluation._recursive import RecursiveState, recursive
from bilevel_jax.evaluation._rules import (
  GapState,
  Rule,
  as_given,
  at_random,
  in_sequence,
  largest_gap,
)
from bilevel_jax.evaluation._saga import SagaState, saga
from bilevel_jax.evaluation._select import SelectState, select
from bilevel_jax.evaluation._storm import StormState, storm
from bilevel_jax.evaluation._together import together
from bilevel_jax.evaluation._unmeasured import unmeasured
from bilevel_jax.evaluation._wrapped import wrapped

__all__ = [
  'DelayedState',
  'GapState',
  'MixedState',
  'RecursiveState',
  'Rule',
  'SagaState',
  'SelectState',
  'StormState',
  'accumulate',
  'as_given',
  'at_random',
  'deal_batch',
  'delayed',
  'in_sequence',
  'independent',
  'largest_gap',
  'mean_over',
  'mixed',
  'recursive',
  'saga',
  'select',
  'split_batch',
  'storm',
  'together',
  'unmeasured',
  'wrapped',
]
