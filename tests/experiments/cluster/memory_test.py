"""Tests of memory from compiled steps of shapes."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest

from experiments.cluster import memory
from experiments.lm import config as config_lib

CONFIG = dataclasses.replace(
  config_lib.tiny(64), vocabulary=512, tied=False, heads=8, kv_heads=4
)
SIZES = memory.Sizes(rows=8, length=40, answer=16)


@pytest.mark.parametrize(
  'name', ['XRIGHT', pytest.param('SEAL', marks=pytest.mark.slow)]
)
def test_weights_and_rows_are_split_over_the_devices(name):
  step = memory.abstract_step(name, CONFIG, SIZES)
  compiled = memory.compile_step(step)
  used = memory.per_device(step, compiled)
  frozen, batch = step.arguments[2:]
  size = lambda tree: sum(
    x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )
  # The norms are on each device.
  norms = size([x for x in jax.tree.leaves(frozen) if x.ndim < 3])
  assert used['weights'] * 2**30 <= size(frozen) / 8 + norms
  assert used['batch'] * 2**30 == pytest.approx(size(batch) / 8)
  parts = [used[n] for n in ('adapters', 'state', 'weights', 'batch')]
  # Up to the alignment of arguments.
  np.testing.assert_allclose(
    used['total'] - used['temporaries'], sum(parts), rtol=0.05
  )
  # Attention scores of a device are those of its own rows.
  largest = SIZES.rows // 8 * CONFIG.heads * SIZES.length**2
  kinds = 2 if name == 'XRIGHT' else 1  # Comparisons have two answers.
  shapes = re.findall(r'(?:f32|bf16)\[([\d,]+)\]', compiled.as_text())
  shapes = [tuple(map(int, shape.split(','))) for shape in set(shapes)]
  scores = [s for s in shapes if s.count(SIZES.length) == 2]
  assert scores
  assert max(map(math.prod, scores)) <= kinds * largest
