"""Oracles: transformations from a batch to gradients."""

from bilevel_jax.oracles._compositional import compositional
from bilevel_jax.oracles._coupled import coupled
from bilevel_jax.oracles._fused_moco import fused_moco
from bilevel_jax.oracles._gradient import (
  gradient,
  lower_gradient,
  penalised_lower_gradient,
)
from bilevel_jax.oracles._gradient_norm import gradient_norm
from bilevel_jax.oracles._implicit import ImplicitState, Solve, implicit
from bilevel_jax.oracles._implicit_directions import implicit_directions
from bilevel_jax.oracles._multi_objective import jacobian_like, multi_objective
from bilevel_jax.oracles._multi_objective_gap import multi_objective_gap
from bilevel_jax.oracles._nikaido_isoda import best_responses, nikaido_isoda
from bilevel_jax.oracles._prox_linear import ProxLinearState, prox_linear
from bilevel_jax.oracles._unrolled import unrolled
from bilevel_jax.oracles._value_gap import value_gap
from bilevel_jax.oracles.base import Oracle, aggregated, oracle
from bilevel_jax.states import OracleState

__all__ = [
  'ImplicitState',
  'Oracle',
  'OracleState',
  'ProxLinearState',
  'Solve',
  'aggregated',
  'best_responses',
  'compositional',
  'coupled',
  'fused_moco',
  'gradient',
  'gradient_norm',
  'implicit',
  'implicit_directions',
  'jacobian_like',
  'lower_gradient',
  'multi_objective',
  'multi_objective_gap',
  'nikaido_isoda',
  'oracle',
  'penalised_lower_gradient',
  'prox_linear',
  'unrolled',
  'value_gap',
]
