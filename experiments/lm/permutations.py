"""Random permutations whose entries are computed one at a time.

`jax.random.permutation` sorts all numbers, at each step of a compiled program:
0.56 s of CPU time for a million rows. Here, an entry takes a few operations
whatever the length, without memory or state, so that a resumed run has the same
order.
"""

import jax
import jax.numpy as jnp

# Number of rows up to which `jax.random.permutation` is quick, about 5 ms.
MOST_SORTED = 2**14
_ROUNDS = 8


def compute_entries(
  key: jax.Array, count: int, positions: jax.Array
) -> jax.Array:
  r"""Computes entries of a random permutation of `range(count)`.

  A Feistel network permutes numbers of as few bits as `count` needs. With a
  hash :math:`h_i` of each round and the high and low bits :math:`(a, b)`,

  .. math::
    (a, b) \to (a, b \oplus h_i(a)), \qquad (a, b) \to (a \oplus h_i(b), b)

  in turn. A result that is `count` or more is permuted again until it is less;
  this happens fewer than once per entry on average, and keeps a permutation.

  Args:
    key: PRNG key; each key has its own permutation.
    count: length of the permutation, between 1 and 2**31 - 1. Below about 100,
      not all orders are equally likely.
    positions: positions in the permutation, integers.

  Returns:
    The entries, int32, of the shape of `positions`.
  """
  bits = max(int(count - 1).bit_length(), 2)
  low = (bits + 1) // 2
  masks = (1 << low) - 1, (1 << (bits - low)) - 1
  keys = jax.random.bits(key, (_ROUNDS,))

  def permute(x):
    a, b = x >> low, x & masks[0]
    for i in range(0, _ROUNDS, 2):
      b = b ^ (_mix(a ^ keys[i]) & masks[0])
      a = a ^ (_mix(b ^ keys[i + 1]) & masks[1])
    return (a << low) | b

  def again(x):
    return jnp.where(x < count, x, permute(x))

  first = permute(jnp.asarray(positions, jnp.uint32))
  x = jax.lax.while_loop(lambda x: jnp.any(x >= count), again, first)
  return x.astype(jnp.int32)


def _mix(x: jax.Array) -> jax.Array:
  """Hashes uint32 numbers: a change of a bit changes half of the bits."""
  for factor in (0x7FEB352D, 0x846CA68B):
    x = (x ^ (x >> 16)) * jnp.uint32(factor)
  return x ^ (x >> 16)
