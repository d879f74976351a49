"""BOME, F2SA: the nested problem's own solution, without second derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests import contract


def solve(solver, steps, batch=None):
  with jax.enable_x64(True):
    batch = contract.solved_batch(jnp.float64) if batch is None else batch
    batch = batch | {'d': batch['d'][:, 0]}
    params = contract.nested_params(0, jnp.float64)

    def step(_, carry):
      params, state = carry
      updates, state = solver.update(batch, state, params)
      return bj.apply_updates(params, updates), state

    start = (params, solver.init(params))
    run = jax.jit(lambda c: jax.lax.fori_loop(0, steps, step, c))
    params, state = run(start)
    return np.asarray(params.upper['a']), np.asarray(params.lower['b']), state


SOLUTION = contract.nested_solution()['upper']['a']


def falling(rate):
  slower = optax.scale_by_schedule(lambda k: 1 / (1 + k / 40))
  return optax.chain(optax.sgd(rate), slower)


def bome(inner_steps):
  return bj.bome(
    contract.PROBLEM,
    upper=falling(0.3),
    lower=falling(0.3),
    value=optax.sgd(0.5),
    eta=1.0,
    inner_steps=inner_steps,
  )


def test_bome_solves_the_nested_problem():
  x, y, _ = solve(bome(40), 20_000)
  np.testing.assert_allclose(x, SOLUTION, atol=1e-3)
  np.testing.assert_allclose(y, contract.A * x + contract.D, atol=1e-3)


def test_bias_of_bome_falls_geometrically_with_its_inner_steps():
  errors = [
    np.linalg.norm(solve(bome(steps), 5_000)[0] - SOLUTION) for steps in (3, 9)
  ]
  assert errors[1] < 0.3 * errors[0]
  slowest = (1 - 0.5 * contract.H.min()) ** 6
  assert errors[1] > 0.5 * slowest * errors[0]


@pytest.mark.parametrize('inner_steps', [10, None])
def test_f2sa_solves_the_nested_problem(inner_steps):
  one_loop = inner_steps is None
  ramp = optax.linear_schedule(1.0, 2000.0, 10_000 if one_loop else 500)
  solver = bj.f2sa(
    contract.PROBLEM,
    penalty=ramp,
    # In one loop, the step of x is rescaled as well.
    upper=optax.sgd(0.5),
    lower=optax.sgd(0.7),
    inner_steps=inner_steps,
  )
  x, _, _ = solve(solver, 40_000 if one_loop else 1_000)
  np.testing.assert_allclose(x, SOLUTION, atol=1e-3)


def test_f2sa_is_biased_as_the_inverse_of_its_penalty():
  errors = []
  for penalty in (50.0, 100.0):
    solver = bj.f2sa(
      contract.PROBLEM,
      penalty=penalty,
      upper=optax.sgd(0.5),
      lower=optax.sgd(0.7),
      inner_steps=10,
    )
    x, _, _ = solve(solver, 500)
    errors.append(np.linalg.norm(x - SOLUTION))
  np.testing.assert_allclose(errors[0] / errors[1], 2, rtol=0.05)


def test_f2sa_holds_its_penalty_within_an_update():
  seen = {}
  for name, penalty in {
    'schedule': lambda k: jnp.where(k < 1, 2.0, 30.0),
    'constant': 2.0,
  }.items():
    solver = bj.f2sa(
      contract.PROBLEM,
      penalty=penalty,
      upper=optax.sgd(0.1),
      lower=optax.sgd(0.1),
      inner_steps=5,
    )
    seen[name] = solve(solver, 1)[:2], solve(solver, 2)[:2]
  np.testing.assert_allclose(seen['schedule'][0], seen['constant'][0])
  assert not np.allclose(seen['schedule'][1], seen['constant'][1])


def test_f2sa_names_what_does_not_fit():
  with pytest.raises(ValueError, match='two loops'):
    bj.f2sa(
      contract.PROBLEM,
      penalty=1.0,
      upper=optax.sgd(0.1),
      lower=optax.sgd(0.1),
      inner_batch=lambda batch, t: batch,
    )


def test_bome_starts_its_value_sequence_from_the_lower_variable():
  solver = bome(1)
  with jax.enable_x64(True):
    batch = contract.solved_batch(jnp.float64)
    batch = batch | {'d': batch['d'][:, 0]}
    params = contract.nested_params(0, jnp.float64)
    state = solver.init(params)
    moved = params._replace(lower={'b': params.lower['b'] + 5})
    _, state = solver.update(batch, state, moved)
    y = moved.lower['b']
    slope = contract.H * (y - contract.A * moved.upper['a'] - contract.D)
    np.testing.assert_allclose(
      bj.auxiliaries(state)['value']['b'], y - 0.5 * slope, rtol=1e-12
    )
