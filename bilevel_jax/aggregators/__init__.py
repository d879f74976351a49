"""Aggregators: several gradients go in, one comes out."""

from bilevel_jax.aggregators._balance import (
  aligned_mtl,
  imtl_g,
  nash_mtl,
)
from bilevel_jax.aggregators._by_losses import (
  stch,
  uncertainty_weighting,
)
from bilevel_jax.aggregators._cagrad import (
  cagrad,
)
from bilevel_jax.aggregators._double import (
  modo,
  sdmgrad,
)
from bilevel_jax.aggregators._dual_cone import (
  dual_proj,
  upgrad,
)
from bilevel_jax.aggregators._dynamic_barrier import (
  DynamicBarrierState,
  dynamic_barrier,
)
from bilevel_jax.aggregators._min_norm import (
  mgda,
  smg,
)
from bilevel_jax.aggregators._moco import (
  MocoState,
  moco,
)
from bilevel_jax.aggregators._penalty import (
  ScaleByPenaltyState,
  scale_by_penalty,
)
from bilevel_jax.aggregators._surgery import (
  grad_drop,
  grad_vac,
  pcgrad,
)
from bilevel_jax.aggregators._weighted import (
  WeightsState,
  mean,
  weighted,
)

__all__ = [
  'DynamicBarrierState',
  'MocoState',
  'ScaleByPenaltyState',
  'WeightsState',
  'aligned_mtl',
  'cagrad',
  'dual_proj',
  'dynamic_barrier',
  'grad_drop',
  'grad_vac',
  'imtl_g',
  'mean',
  'mgda',
  'moco',
  'modo',
  'nash_mtl',
  'pcgrad',
  'scale_by_penalty',
  'sdmgrad',
  'smg',
  'stch',
  'uncertainty_weighting',
  'upgrad',
  'weighted',
]
