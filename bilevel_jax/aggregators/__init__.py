"""Aggregators: several gradients go in, one comes out."""

from bilevel_jax.aggregators._penalty import (
  ScaleByPenaltyState,
  scale_by_penalty,
)

__all__ = ['ScaleByPenaltyState', 'scale_by_penalty']
