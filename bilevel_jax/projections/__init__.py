"""Projections: sets, and links that keep sequences in them."""

from bilevel_jax.projections._affine import (
  AffineFactors,
  AffineSet,
  affine_factors,
  affine_operator_set,
  affine_set,
  consensus_set,
)
from bilevel_jax.projections._lazy import LazyProjectionState, lazy_projection
from bilevel_jax.projections._project import (
  Projection,
  ProjectState,
  check_set,
  project,
)

__all__ = [
  'AffineFactors',
  'AffineSet',
  'LazyProjectionState',
  'ProjectState',
  'Projection',
  'affine_factors',
  'affine_operator_set',
  'affine_set',
  'check_set',
  'consensus_set',
  'lazy_projection',
  'project',
]
