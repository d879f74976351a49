"""The softmax normaliser of a table, updated for a few changed rows.

The table is the leaves of a tree; each node sums the exponentials of its
children. When rows change, only their ancestors are summed again. So an update
needs no pass over a large table and no branch (under `jax.vmap`, both sides of
a branch are evaluated), and rounding errors do not accumulate over updates. The
depth grows with the logarithm of the number of rows.

A node is a pair: the largest entry below it, and the logarithm of the sum of
exponentials relative to that entry. Their sum in one number would be rounded to
the spacing of floats at the largest entry; for entries of 1e8 in float32, the
logarithm would be lost.
"""

import chex
import jax
import jax.numpy as jnp

# Children of a node. Each level takes a gather and a scatter.
CHILDREN = 32
# Up to this size, one sum is cheaper than another level.
AT_ONCE = 4096


def init(table: chex.Array) -> tuple[tuple[chex.Array, ...], chex.Array]:
  """Sums up a table.

  Args:
    table: log-weights, (rows,).

  Returns:
    The levels of the tree between the table and the root, from below, each
    (nodes, 2), and the root, (2,): the largest log-weight, and the logarithm of
    the sum of all exponentials minus the largest log-weight.
  """
  levels = []
  nodes = _leaves(table)
  while nodes.shape[0] > AT_ONCE:
    padding = ((0, -nodes.shape[0] % CHILDREN), (0, 0))
    nodes = jnp.pad(nodes, padding, constant_values=-jnp.inf)
    nodes = _sum(nodes.reshape(-1, CHILDREN, 2))
    levels.append(nodes)
  return tuple(levels), _sum(nodes)


def update(
  levels: tuple[chex.Array, ...], table: chex.Array, index: chex.Array
) -> tuple[tuple[chex.Array, ...], chex.Array]:
  """Updates the sums for changed rows.

  Args:
    levels: the levels of the former table.
    table: the new table, (rows,).
    index: the changed rows, (changed,), not negative. Rows may be repeated;
      rows past the end are ignored.

  Returns:
    The levels and the root of the new table.
  """
  changed: list[chex.Array] = []
  nodes = table
  for level in levels:
    index = index // CHILDREN
    children = index[:, None] * CHILDREN + jnp.arange(CHILDREN)
    below = nodes.at[children].get(mode='fill', fill_value=-jnp.inf)
    sums = _sum(below if changed else _leaves(below))
    nodes = level.at[index].set(sums, mode='drop')
    changed.append(nodes)
  return tuple(changed), _sum(nodes if changed else _leaves(nodes))


def _leaves(table: chex.Array) -> chex.Array:
  """Makes nodes of single entries, (..., 2)."""
  return jnp.stack([table, jnp.zeros_like(table)], axis=-1)


def _sum(nodes: chex.Array) -> chex.Array:
  """Sums nodes along their axis before the last one."""
  largest = jnp.max(nodes[..., 0], axis=-1, keepdims=True)
  # Avoids inf - inf in nodes of padding only.
  base = jnp.where(largest == -jnp.inf, 0, largest)
  sums = jax.nn.logsumexp(
    nodes[..., 0] - base + nodes[..., 1], axis=-1, keepdims=True
  )
  return jnp.concatenate([largest, sums], axis=-1)
