"""Error bounds from a dtype and a number of operations, for any processor."""

from typing import Any

import jax.numpy as jnp


def tolerance(dtype: Any, roundings: int) -> float:
  """An upper bound on the relative error of a sequence of roundings.

  Each rounding is half a float spacing, 2^-8 in bfloat16 and 2^-24 in float32.
  The bound holds for any order of sums and for processors with wider products;
  a tolerance measured on one processor does not.

  Args:
    dtype: the dtype of the results.
    roundings: the number of rounding operations on the longest path from an
      input to the result, without cancellation. To compare two results, add
      both numbers.
  """
  return roundings * float(jnp.finfo(dtype).eps) / 2
