"""A lower model with batch normalisation, through losses' outputs."""

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj

MOMENTUM = 0.9


class Net(nnx.Module):
  """Linear, batch normalisation, linear."""

  def __init__(self, rngs):
    self.first = nnx.Linear(3, 4, rngs=rngs)
    self.norm = nnx.BatchNorm(4, momentum=MOMENTUM, rngs=rngs)
    self.last = nnx.Linear(4, 1, rngs=rngs)

  def __call__(self, inputs):
    return self.last(jax.nn.relu(self.norm(self.first(inputs))))[:, 0]


def test_a_model_with_running_statistics_trains():
  graph, weights, running = nnx.split(
    Net(nnx.Rngs(0)), nnx.Param, nnx.BatchStat
  )

  def apply(y, batch, train):
    model = nnx.merge(graph, y, batch['running'], copy=True)
    model.set_attributes(use_running_average=not train)
    predicted = model(batch['inputs'])
    error = jnp.mean((predicted - batch['targets']) ** 2)
    return error, nnx.state(model, nnx.BatchStat)

  def lower(x, y, batch):
    error, running = apply(y, batch, True)
    decay = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(y))
    return error + jnp.exp(x) * decay, {'running': running}

  problem = bj.BilevelProblem(
    upper=lambda x, y, batch: apply(y, batch, False)[0],
    lower=lower,
    outputs=lambda params: {'lower': {'running': running}},
  )
  sgd = optax.sgd(0.05)
  solver = bj.v_pbgd(problem, penalty=5.0, upper=sgd, lower=sgd)
  params = bj.BilevelParams(jnp.float32(-3.0), weights)
  state, step = solver.init(params), jax.jit(solver.update)
  rng = np.random.default_rng(0)
  mean, var, losses = np.zeros(4), np.ones(4), []
  for _ in range(60):
    inputs = rng.normal(size=(32, 3)).astype(np.float32) + 1
    targets = np.abs(inputs[:, 0]) - inputs[:, 1]
    batch = {'inputs': inputs, 'targets': targets}
    updates, state = step(batch | bj.outputs(state)['lower'], state, params)
    hidden = inputs @ params.lower['first']['kernel'][...]
    hidden += params.lower['first']['bias'][...]
    mean = MOMENTUM * mean + (1 - MOMENTUM) * hidden.mean(0)
    var = MOMENTUM * var + (1 - MOMENTUM) * hidden.var(0)
    losses.append(float(bj.values(state)['lower']))
    params = bj.apply_updates(params, updates)
  found = bj.outputs(state)['lower']['running']['norm']
  np.testing.assert_allclose(found['mean'][...], mean, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(found['var'][...], var, rtol=1e-4)
  assert np.mean(losses[-5:]) < 0.5 * losses[0]
