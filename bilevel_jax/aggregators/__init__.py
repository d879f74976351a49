"""Aggregators: they combine several gradients into one.

Aggregators whose weights depend on the gradients' lengths and cosines work for
lengths from 1e-30 to 1e30 in float32. The direction is NaN if the lengths of
two nonzero gradients differ by a factor above 1e31, or a gradient is not
finite.
"""

from bilevel_jax.aggregators._aligned_mtl import aligned_mtl
from bilevel_jax.aggregators._by_weights import (
  WeightsState,
  by_gramian,
  by_weights,
  current,
)
from bilevel_jax.aggregators._cagrad import cagrad
from bilevel_jax.aggregators._config import config
from bilevel_jax.aggregators._constrained_mgda_pmgda import (
  constrained_mgda,
  pmgda,
)
from bilevel_jax.aggregators._cr_mogm import cr_mogm
from bilevel_jax.aggregators._db_mtl import db_mtl
from bilevel_jax.aggregators._dwa import dwa
from bilevel_jax.aggregators._dynamic_barrier import (
  DynamicBarrierState,
  dynamic_barrier,
)
from bilevel_jax.aggregators._excess_mtl import excess_mtl
from bilevel_jax.aggregators._geometric_mean import geometric_mean
from bilevel_jax.aggregators._grad_drop import grad_drop
from bilevel_jax.aggregators._grad_norm import grad_norm
from bilevel_jax.aggregators._imtl_g import imtl_g
from bilevel_jax.aggregators._imtl_l import imtl_l
from bilevel_jax.aggregators._mean_weighted import mean, weighted
from bilevel_jax.aggregators._mgda import mgda, smg
from bilevel_jax.aggregators._moco import MocoState, moco
from bilevel_jax.aggregators._modo_sdmgrad import modo, sdmgrad
from bilevel_jax.aggregators._nash_mtl_fair_grad import fair_grad, nash_mtl
from bilevel_jax.aggregators._pcd import pcd
from bilevel_jax.aggregators._pcgrad_grad_vac import grad_vac, pcgrad
from bilevel_jax.aggregators._penalty import (
  ScaleByPenaltyState,
  scale_by_penalty,
)
from bilevel_jax.aggregators._random_weights import random_weights
from bilevel_jax.aggregators._stch import stch
from bilevel_jax.aggregators._uncertainty_weighting import (
  uncertainty_weighting,
)
from bilevel_jax.aggregators._upgrad_dual_proj import dual_proj, upgrad

__all__ = [
  'DynamicBarrierState',
  'MocoState',
  'ScaleByPenaltyState',
  'WeightsState',
  'aligned_mtl',
  'by_gramian',
  'by_weights',
  'cagrad',
  'config',
  'constrained_mgda',
  'cr_mogm',
  'current',
  'db_mtl',
  'dual_proj',
  'dwa',
  'dynamic_barrier',
  'excess_mtl',
  'fair_grad',
  'geometric_mean',
  'grad_drop',
  'grad_norm',
  'grad_vac',
  'imtl_g',
  'imtl_l',
  'mean',
  'mgda',
  'moco',
  'modo',
  'nash_mtl',
  'pcd',
  'pcgrad',
  'pmgda',
  'random_weights',
  'scale_by_penalty',
  'sdmgrad',
  'smg',
  'stch',
  'uncertainty_weighting',
  'upgrad',
  'weighted',
]
