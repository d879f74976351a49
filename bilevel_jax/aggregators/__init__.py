"""Aggregators: several gradients go in, one comes out."""

from bilevel_jax.aggregators._dynamic_barrier import (
  DynamicBarrierState,
  dynamic_barrier,
)
from bilevel_jax.aggregators._penalty import (
  ScaleByPenaltyState,
  scale_by_penalty,
)

__all__ = [
  'DynamicBarrierState',
  'ScaleByPenaltyState',
  'dynamic_barrier',
  'scale_by_penalty',
]
