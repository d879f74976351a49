"""Oracles: a batch goes in, gradients come out."""

from bilevel_jax.oracles._gradient import gradient
from bilevel_jax.oracles._gradient_norm import gradient_norm
from bilevel_jax.oracles._oracle import OracleState, oracle
from bilevel_jax.oracles._prox_linear import ProxLinearState, prox_linear
from bilevel_jax.oracles._unrolled import unrolled
from bilevel_jax.oracles._value_gap import value_gap

__all__ = [
  'OracleState',
  'ProxLinearState',
  'gradient',
  'gradient_norm',
  'oracle',
  'prox_linear',
  'unrolled',
  'value_gap',
]
