"""The softmax normaliser of a table, kept up to date for a few changed rows.

A tree of partial sums: each node sums the exponentials of its children, and the
leaves are the table. When some rows change, only their ancestors are summed
again, in every update: no pass over a large table, no branch (which `jax.vmap`
would turn into evaluating both sides), and no rounding carried from update to
update. The depth grows with the logarithm of the rows.

A node is a pair, the largest entry below it and the logarithm of the sum of
exponentials relative to that entry. One number, their sum, would round to the
spacing of floats at the largest entry: in float32 and at entries of 1e8, that
loses the whole logarithm.
"""

import chex
import jax
import jax.numpy as jnp

# Children of a node: few levels, each a gather and a scatter.
CHILDREN = 32
# Numbers that are summed in one go: cheaper than another level.
AT_ONCE = 4096


def init(table: chex.Array) -> tuple[tuple[chex.Array, ...], chex.Array]:
  """Sums up a table.

  Args:
    table: log-weights, (rows,).

  Returns:
    The levels of the tree between the table and the root, from below, each
    (nodes, 2), and the root, (2,): the largest log-weight, and the logarithm of
    the sum of all exponentials less that.
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
  """Sums up again where rows have changed.

  Args:
    levels: of the table before.
    table: the table now, (rows,).
    index: the rows that changed, (changed,), at or above 0; repeated rows and
      rows past the end do no harm.

  Returns:
    The levels and the root of the table now.
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
  # Of padding alone, the difference would not be a number.
  base = jnp.where(largest == -jnp.inf, 0, largest)
  sums = jax.nn.logsumexp(
    nodes[..., 0] - base + nodes[..., 1], axis=-1, keepdims=True
  )
  return jnp.concatenate([largest, sums], axis=-1)
