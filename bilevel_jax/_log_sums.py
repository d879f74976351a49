"""The softmax normaliser of a table, kept up to date for a few changed rows.

A tree of partial sums: each node is the logarithm of the sum of exponentials of
its children, and the leaves are the table. When some rows change, only their
ancestors are summed again, in every update: no pass over a large table, no
branch (which `jax.vmap` would turn into evaluating both sides), and no rounding
carried from update to update. The depth grows with the logarithm of the rows.
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
    The levels of the tree between the table and the root, from below, and the
    root, a scalar: the logarithm of the sum of all exponentials.
  """
  levels = []
  while table.shape[0] > AT_ONCE:
    padding = (0, -table.shape[0] % CHILDREN)
    children = jnp.pad(table, padding, constant_values=-jnp.inf)
    table = jax.nn.logsumexp(children.reshape(-1, CHILDREN), axis=1)
    levels.append(table)
  return tuple(levels), jax.nn.logsumexp(table)


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
  changed = []
  for level in levels:
    index = index // CHILDREN
    children = index[:, None] * CHILDREN + jnp.arange(CHILDREN)
    numbers = table.at[children].get(mode='fill', fill_value=-jnp.inf)
    sums = jax.nn.logsumexp(numbers, axis=1)
    table = level.at[index].set(sums, mode='drop')
    changed.append(table)
  return tuple(changed), jax.nn.logsumexp(table)
