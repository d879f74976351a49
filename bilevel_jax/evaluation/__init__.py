"""Wrappers of oracles: at which point and on which batch they are evaluated.

- Means over samples: `accumulate`, `mean_over`, `independent` and `saga` need
  an oracle that is linear in its samples. The first two also accept one whose
  losses can be averaged inside (see `bilevel_jax.oracles.base`).
- Any oracle: `storm`, `recursive` and `delayed`.
- Several oracles: `together` evaluates them at one point, `mixed` adds them by
  weights, and `select` evaluates one of them, chosen by a rule: `at_random`,
  `largest_gap`, `in_sequence` or `as_given`.
- Solvers: `wrapped` wraps each oracle of a solver, `unmeasured` drops its
  losses and counts.
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
