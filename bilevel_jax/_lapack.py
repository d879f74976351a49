"""A warning of batched factorisations that can deadlock on CPUs.

Before version 0.11.2, jaxlib splits batched factorisations into tasks for the
threads on which they wait. Two of them at once can wait for each other on few
cores, without a message and without load. The library cannot change a loss, so
it warns once. Its own factorisations do not run side by side.
"""

import os
import re
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax

FLAG = 'xla_cpu_enable_concurrency_optimized_scheduler'
_VERSION = tuple(map(int, re.findall(r'\d+', metadata.version('jaxlib'))[:3]))
AFFECTED = _VERSION < (0, 11, 2)
_FACTORISATIONS = frozenset(
  (
    *('cholesky', 'eig', 'eigh', 'geqrf', 'hessenberg', 'householder_product'),
    *('lu', 'qr', 'schur', 'svd', 'tridiagonal'),
  )
)
_warned = False


def watch(loss: Callable[..., Any], args: Any) -> bool:
  """Whether to call `notice` after each evaluation of a loss.

  It traces the loss once more, only where the deadlock is possible. It warns
  at once if the loss itself has batched factorisations.
  """
  if _warned or FLAG in os.environ.get('XLA_FLAGS', ''):
    return False
  if jax.default_backend() != 'cpu':
    return False
  dimensions = _factorisations(jax.make_jaxpr(lambda: loss(*args))().jaxpr)
  if sum(size > 2 for size in dimensions) > 1:
    _warn()
  return len(dimensions) > 1


@jax.custom_batching.custom_vmap
def notice(value: Any) -> Any:
  """Warns if `jax.vmap` batches the value of a loss, at any depth."""
  return value


@notice.def_vmap
def _(size, is_batched, value):
  del size
  if is_batched[0]:
    _warn()
  return value, is_batched[0]


def _factorisations(jaxpr: Any) -> list[int]:
  """The dimensions of all matrices that a jaxpr factors."""
  is_jaxpr = lambda node: hasattr(node, 'eqns') or hasattr(node, 'jaxpr')
  dimensions = []
  for eqn in jaxpr.eqns:
    if eqn.primitive.name in _FACTORISATIONS:
      dimensions.append(eqn.invars[0].aval.ndim)
    for node in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr):
      if is_jaxpr(node):
        dimensions += _factorisations(getattr(node, 'jaxpr', node))
  return dimensions


def _warn() -> None:
  global _warned
  if not _warned:
    _warned = True
    warnings.warn(
      'a loss has several batched factorisations (solve, qr, ... under '
      'jax.vmap), which can deadlock on CPUs with jaxlib before 0.11.2: set '
      f'the environment variable XLA_FLAGS=--{FLAG}=false before the program '
      'starts, or use a newer jaxlib.',
      RuntimeWarning,
      stacklevel=2,
    )
