"""Projections: sets, and how a sequence is kept in one."""

from bilevel_jax.projections._affine import (
  AffineFactors,
  AffineSet,
  affine_factors,
  affine_operator_set,
  affine_set,
  consensus_set,
)
from bilevel_jax.projections._joint_sets import budget, half_space
from bilevel_jax.projections._kept import Joint, Lazy, LazyState, Relaxed
from bilevel_jax.projections._set import Projection, check_set

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
