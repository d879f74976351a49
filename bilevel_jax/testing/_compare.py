"""Comparisons whose errors name what differs."""

import traceback
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax import diagnostics, states, types

# Tolerances for float32 sums in a different order.
RTOL, ATOL = 2e-5, 2e-6


class Broken(AssertionError):
  """A promise that a method does not keep."""


def require(condition: Any, message: str) -> None:
  if not condition:
    raise Broken(message)


def is_key(leaf):
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def data(tree):
  """Converts a tree to NumPy arrays, PRNG keys to their key data."""
  return jax.tree.map(
    lambda x: np.asarray(jax.random.key_data(x) if is_key(x) else x), tree
  )


def differences(actual, expected, *, exact=False):
  """Describes each leaf that differs between two trees, one line per leaf."""
  one, two = (
    jax.tree_util.tree_leaves_with_path(t) for t in (actual, expected)
  )
  kinds: list[Any] = [jax.tree.structure(tree) for tree in (actual, expected)]
  if kinds[0] != kinds[1]:
    names = lambda leaves: {jax.tree_util.keystr(path) for path, _ in leaves}
    differing = names(one) ^ names(two)
    return [f'the structures differ: {sorted(differing) or "node types"}']
  lines = []
  for (path, a), (_, b) in zip(one, two, strict=True):
    a, b = data(a), data(b)
    if a.shape != b.shape or a.dtype != b.dtype:
      what = f'{a.dtype}{list(a.shape)} instead of {b.dtype}{list(b.shape)}'
    elif exact or not jnp.issubdtype(a.dtype, jnp.floating):
      if np.array_equal(a, b, equal_nan=a.dtype.kind == 'f'):
        continue
      what = f'{a} instead of {b}'
    elif np.allclose(a, b, RTOL, ATOL, equal_nan=True):
      continue
    else:
      at = np.unravel_index(np.argmax(np.abs(a - b)), a.shape)
      what = f'{a[at]} instead of {b[at]} at {[int(i) for i in at]}'
    lines.append(f'{jax.tree_util.keystr(path) or "leaf"}: {what}')
  return lines


def require_same(what, actual, expected, hint='', *, exact=False):
  lines = differences(actual, expected, exact=exact)
  shown = '\n    '.join(lines[:6] + ['...'] * (len(lines) > 6))
  require(not lines, f'{what}:\n    {shown}\n  {hint}')


def without_losses(tree):
  """Removes the measured losses from a (params, state) pair."""

  def drop(node):
    if isinstance(node, types.Numbers):
      return node.counts
    return node._replace(values=None) if states.is_oracle_state(node) else node

  is_leaf = lambda node: (
    states.is_oracle_state(node) or isinstance(node, types.Numbers)
  )
  return jax.tree.map(drop, tree, is_leaf=is_leaf)


def all_sequences(point):
  """The sequences of the parameters and of the solver's state, by name."""
  params, state = point
  named = params._asdict() if hasattr(params, '_asdict') else {'params': params}
  return named | diagnostics.auxiliaries(state)


def moved(one, two):
  pairs = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
  return any(not np.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in pairs)


def leaf_types(tree):
  """Shape, dtype and weak type of each leaf, by path."""

  def kind(leaf):
    aval = leaf if hasattr(leaf, 'weak_type') else jax.typeof(leaf)
    weak = ' weak' if getattr(aval, 'weak_type', False) else ''
    return f'{aval.dtype}{list(aval.shape)}{weak}'

  return {
    jax.tree_util.keystr(path): kind(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def require_types(what, actual, expected):
  one, two = leaf_types(actual), leaf_types(expected)
  differing = [
    f'{name}: {one.get(name)} became {two.get(name)}'
    for name in one | two
    if one.get(name) != two.get(name)
  ]
  require(not differing, f'{what}:\n    ' + '\n    '.join(differing[:6]))


def describe(error):
  """The message of a broken promise; any other error with its traceback."""
  if isinstance(error, Broken):
    return str(error)
  return ''.join(traceback.format_exception(error, limit=-6))
