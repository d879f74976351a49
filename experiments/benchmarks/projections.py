"""Projections of the library and of optax, compared with jaxopt's."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

import bilevel_jax as bj
from experiments.benchmarks import measure

BOUND = 1.0
_onto = optax.projections


def sets(size: int) -> dict[str, tuple[Any, list[Any]]]:
  """Returns our projection and jaxopt's arguments, by jaxopt's name."""
  rng = np.random.default_rng(0)
  few = min(10, size // 2)
  normal = rng.normal(size=size).astype(np.float32)
  matrix = rng.normal(size=(few, size)).astype(np.float32)
  target = rng.normal(size=few).astype(np.float32)
  plane = bj.projections.affine_set(normal[None], np.ones(1, np.float32))
  affine = bj.projections.affine_set(matrix, target)
  as_lists = lambda *arrays: [np.asarray(a).tolist() for a in arrays]
  return {
    'simplex': (_onto.projection_simplex, []),
    'l1_ball': (lambda z: _onto.projection_l1_ball(z, 1.0), [1.0]),
    'l2_ball': (lambda z: _onto.projection_l2_ball(z, 1.0), [1.0]),
    'box': (lambda z: _onto.projection_box(z, -1.0, 1.0), [-1.0, 1.0]),
    'hyperplane': (plane, as_lists(normal, 1.0)),
    'affine_set': (affine, as_lists(matrix, target)),
  }


def _peer(name, size, context):
  context.peers.require('jaxopt')
  project, options = sets(size)[name]
  start = jax.random.normal(jax.random.key(0), (size,))
  measured = measure.Program(lambda z, shift: project(z + shift), start, start)
  arguments = {'name': name, 'size': size, 'options': options}
  with context.peers.process('jax_steps', 'projection', **arguments) as peer:
    return measure.compare(measured, peer.run, context)


def rows(preset: str) -> Sequence[measure.Row]:
  """Returns the comparisons."""
  size = 20 if preset == 'smoke' else 1_000
  return [
    measure.Row(
      f'projections/jaxopt/{name}',
      f'{name}, {size:,} numbers / jaxopt',
      functools.partial(_peer, name, size),
      {'wall': BOUND},
    )
    for name in sets(size)
  ]
