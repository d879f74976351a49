"""Projections: sets, and how a solver keeps a sequence in its set."""

from bilevel_jax.projections._affine import (
  AffineFactors,
  AffineSet,
  affine_factors,
  affine_operator_set,
  affine_set,
  consensus_set,
)
from bilevel_jax.projections._joint_sets import budget, half_space
from bilevel_jax.projections._set import Projection, check_set
from bilevel_jax.projections._set_handlers import (
  Joint,
  Lazy,
  LazyState,
  Relaxed,
)

__all__ = [
  'AffineFactors',
  'AffineSet',
  'Joint',
  'Lazy',
  'LazyState',
  'Projection',
  'Relaxed',
  'affine_factors',
  'affine_operator_set',
  'affine_set',
  'budget',
  'check_set',
  'consensus_set',
  'half_space',
]
