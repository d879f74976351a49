"""Projections: sets, and links that keep sequences in them."""

from bilevel_jax.projections._project import (
  Projection,
  ProjectState,
  check_set,
  project,
)

__all__ = ['ProjectState', 'Projection', 'check_set', 'project']
