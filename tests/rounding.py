"""Tolerances from a dtype and the number of operations, for any processor."""

from typing import Any

import jax.numpy as jnp


def tolerance(dtype: Any, roundings: int) -> float:
  """The relative error that so many roundings in sequence make at most.

  Each is half a spacing of floats, 2^-8 in bfloat16 and 2^-24 in float32. The
  bound holds whatever the order of sums and whether a processor keeps products
  in a wider type; a tolerance measured on one processor does not.

  Args:
    dtype: in which results are rounded.
    roundings: operations that round, on the longest way from an input to the
      result, without a difference that cancels. Two results that are compared
      have two ways: give the sum.
  """
  return roundings * float(jnp.finfo(dtype).eps) / 2
