"""MoCo+: what it is a chain of, on a step by hand."""

import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from tests import contract
from tests.contract import OBJECTIVES, RATE, Row


def _row(wrap, decay):
  solver = bj.solvers.moco_plus(contract.three_losses, OBJECTIVES, decay=decay)
  return optax.chain(bj.evaluation.wrapped(solver, wrap), optax.sgd(RATE))


ROWS = (
  Row(
    'moco_plus',
    _row,
    {'gradients/objectives': 2 * OBJECTIVES},
    params=contract.flat_params,
    hyper={'decay': 0.5},
    devices=True,
  ),
)


def test_weights_move_along_corrected_gradients():
  losses = lambda x, batch: jnp.stack([batch * x**2 / 2, 3 * x + 0 * batch])
  solver = bj.solvers.moco_plus(losses, 2, decay=0.25, weight_step=0.1)
  weights, tracked, before = np.full(2, 0.5), None, None
  state = solver.init(jnp.float32(0.0))
  for x, batch in ((2.0, 1.0), (1.0, 3.0), (0.5, 2.0)):
    slopes = lambda z, b=batch: np.array([b * z, 3.0])
    if tracked is None:
      tracked = slopes(x)
    else:
      tracked = slopes(x) + 0.75 * (tracked - slopes(before))
    before = x
    weights = weights - 0.1 * tracked * (tracked @ weights)
    weights = weights + (1 - weights.sum()) / 2
    weights = np.clip(weights, 0, 1)  # Of two, the simplex is this segment.
    found, state = solver.update(jnp.float32(batch), state, jnp.float32(x))
    np.testing.assert_allclose(found, weights @ tracked, rtol=1e-5)
