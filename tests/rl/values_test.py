"""Values, visits and gradients: walks in NumPy, identities, differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from tests import problems
from tests.rl import reference

GAMMA, HEAT = 0.9, 0.3
DTYPES = {'float64': 1e-9, 'float32': 3e-5}


def make_problem(dtype, seed=0, **fields):
  moves, rewards, first, policy = reference.process(seed)
  cast = lambda x: jnp.asarray(x, dtype)
  mdp = bj.rl.MDP(cast(moves), cast(rewards), cast(GAMMA), cast(first))
  return mdp._replace(**fields), cast(policy)


@pytest.mark.parametrize('dtype', DTYPES)
def test_values_and_visits_match_sums_over_walks(dtype):
  moves, rewards, first, policy = reference.process()
  with jax.enable_x64(dtype == 'float64'):
    mdp, pi = make_problem(dtype)

    @jax.jit
    def everything(mdp, pi):
      return (
        bj.rl.state_values(mdp, pi),
        bj.rl.state_values(mdp, pi, HEAT),
        bj.rl.action_values(mdp, pi, HEAT),
        bj.rl.expected_return(mdp, pi, HEAT),
        bj.rl.state_visits(mdp, pi),
        bj.rl.visits(mdp, pi),
      )

    results = everything(mdp, pi)
    assert {x.dtype for x in results} == {jnp.dtype(dtype)}
  plain = reference.values(moves, rewards, policy, GAMMA)
  warm = reference.values(moves, rewards, policy, GAMMA, HEAT)
  state_weights = reference.visits(moves, first, policy, GAMMA)
  expected = (
    plain,
    warm,
    rewards + GAMMA * moves @ warm,
    first @ warm,
    state_weights,
    state_weights[:, None] * policy,
  )
  for actual, reference_value in zip(results, expected, strict=True):
    np.testing.assert_allclose(
      actual, reference_value, rtol=DTYPES[dtype], atol=1e-6
    )


@pytest.mark.parametrize('chain', ['cycle', 'absorbing', 'split', 'one'])
def test_slowly_mixing_and_periodic_chains_are_exact(chain, x64):
  """The second eigenvalue is one; also with a discount of 0.999."""
  eye = np.eye(4)
  moves = {
    'cycle': np.roll(eye, 1, axis=1),
    'absorbing': np.vstack([eye[1:], eye[-1:]]),
    'split': np.kron(np.eye(2), [[0.9, 0.1], [0.1, 0.9]]),
    'one': np.ones((1, 1)),
  }[chain]
  states = len(moves)
  rewards = np.arange(1.0, states + 1)
  both = jax.jit(lambda *at: (bj.rl.state_values(*at), bj.rl.state_visits(*at)))
  for discount in (0.0, 0.5, 0.999):
    mdp = bj.rl.make_mdp(
      moves[:, None], rewards[:, None], discount=discount,
      initial=np.eye(states)[0],
    )  # fmt: skip
    pi = jnp.ones((states, 1))
    system = np.eye(states) - discount * moves
    values, state_weights = both(mdp, pi)
    np.testing.assert_allclose(
      values, np.linalg.solve(system, rewards), rtol=1e-9
    )
    np.testing.assert_allclose(
      state_weights,
      np.linalg.solve(system.T, (1 - discount) * np.eye(states)[0]),
      atol=1e-10,
    )


def test_zero_rewards_have_zero_values():
  mdp, pi = make_problem(jnp.float32)
  mdp = mdp._replace(rewards=jnp.zeros_like(mdp.rewards))
  np.testing.assert_array_equal(bj.rl.state_values(mdp, pi), 0)


@pytest.mark.parametrize('heat', [0, HEAT])
def test_policy_gradient_theorem(heat, x64):
  mdp, _ = make_problem(jnp.float64)
  logits = jnp.asarray(np.random.default_rng(3).normal(size=(5, 3)))
  value = lambda z: bj.rl.expected_return(mdp, jax.nn.softmax(z), heat)
  exact = jax.jit(bj.rl.policy_gradient, static_argnums=2)(mdp, logits, heat)
  np.testing.assert_allclose(
    jax.jit(jax.grad(value))(logits), exact, atol=1e-12
  )
  wanted = problems.by_differences(value, logits)
  np.testing.assert_allclose(exact, wanted, atol=1e-7)


def test_derivatives_in_all_fields_up_to_second_order(x64):
  """Derivatives of values and visits match central differences."""
  mdp, pi = make_problem(jnp.float64)
  mix = jnp.asarray(np.random.default_rng(4).normal(size=5))

  def scalar(mdp):
    values_ = bj.rl.state_values(mdp, pi, HEAT)
    return values_ @ bj.rl.state_visits(mdp, pi) + jnp.sin(mix @ values_)

  slope = jax.jit(jax.grad(scalar))
  wanted = problems.by_differences(scalar, mdp)
  for actual, reference_value in zip(slope(mdp), wanted, strict=True):
    np.testing.assert_allclose(actual, reference_value, rtol=1e-6, atol=1e-6)
  along = lambda r: jnp.vdot(slope(mdp._replace(rewards=r)).rewards, r)
  np.testing.assert_allclose(
    jax.jit(jax.grad(along))(mdp.rewards),
    problems.by_differences(along, mdp.rewards),
    atol=1e-5,
  )


@pytest.mark.parametrize('dtype', ['float64', 'float32'])
def test_derivatives_of_a_return_match_an_inverse_matrix(dtype):
  """In all arguments, up to second order, forward and reverse."""
  with jax.enable_x64(dtype == 'float64'):
    mdp, pi = make_problem(dtype)

    def exact(mdp, pi):
      moves, rewards = bj.rl.reward_process(mdp, pi, HEAT)
      system = jnp.eye(len(moves), dtype=dtype) - mdp.discount * moves
      return mdp.initial @ jnp.linalg.inv(system) @ rewards

    def actual(mdp, pi):
      return bj.rl.expected_return(mdp, pi, HEAT)

    rng = np.random.default_rng(6)
    way = jax.tree.map(
      lambda z: jnp.asarray(rng.normal(size=np.shape(z)) / 10, dtype), (mdp, pi)
    )

    @jax.jit
    def derivatives(mdp, pi):
      results = []
      for total in (actual, exact):
        slopes = jax.grad(total, (0, 1))
        value, forward = jax.jvp(total, (mdp, pi), way)
        _, hessian = jax.jvp(slopes, (mdp, pi), way)
        results.append((value, forward, slopes(mdp, pi), hessian))
      return results

    one, two = map(jax.tree.leaves, derivatives(mdp, pi))
    tolerance = 1e4 * float(jnp.finfo(dtype).eps)
    for a, b in zip(one, two, strict=True):
      assert a.dtype == dtype
      np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


def test_gradients_of_returns_and_visits_share_linear_systems():
  """One system for the visits serves all derivatives and divisions."""
  mdp, pi = make_problem(jnp.float32)

  def loops(function):
    text = jax.jit(function).lower(mdp.rewards).compile().as_text()
    return text.count(' while(')

  def slope(scale, rewards):
    total = lambda r: bj.rl.expected_return(mdp._replace(rewards=r), pi)
    return jax.grad(lambda r: scale * total(r))(rewards)

  def visits(rewards):
    return bj.rl.state_visits(mdp._replace(rewards=rewards), pi)

  both = lambda r: (slope(2.0, r), slope(3.0, r), visits(r))
  assert loops(both) == loops(visits)


def test_vmap_over_processes_and_policies():
  make = lambda key: bj.rl.random_mdp(key, states=20, actions=3)
  mdps = jax.vmap(make)(jax.random.split(jax.random.key(0), 4))
  logits = jax.random.normal(jax.random.key(1), (4, 20, 3))
  both = lambda mdp, z: (
    bj.rl.state_values(mdp, jax.nn.softmax(z), HEAT),
    bj.rl.policy_gradient(mdp, z),
  )
  together = jax.jit(jax.vmap(both))(mdps, logits)
  one = jax.jit(both)
  for i in range(4):
    alone = one(jax.tree.map(lambda x, i=i: x[i], mdps), logits[i])
    for actual, reference_value in zip(together, alone, strict=True):
      np.testing.assert_allclose(
        actual[i], reference_value, rtol=2e-5, atol=1e-5
      )


def test_entropy_and_its_derivative_for_zero_probabilities():
  policy = jnp.array([[1.0, 0.0], [0.25, 0.75]])
  np.testing.assert_allclose(
    bj.rl.entropy(policy), reference.entropy(np.asarray(policy)), rtol=1e-6
  )
  slope = jax.grad(lambda p: bj.rl.entropy(p).sum())(policy)
  assert np.all(np.isfinite(slope))
  # Logits with a difference that gives a zero probability in float32.
  mdp = bj.rl.random_mdp(0, states=2, actions=2)
  logits = jnp.array([[200.0, -200.0], [0.0, 0.0]])
  value = lambda z: bj.rl.expected_return(mdp, jax.nn.softmax(z), HEAT)
  assert np.all(np.isfinite(jax.jit(jax.grad(value))(logits)))


def test_errors():
  mdp, pi = make_problem(jnp.float32)
  with pytest.raises(ValueError, match=r'shape \(5, 3\), got \(5, 2\)'):
    bj.rl.state_values(mdp, pi[:, :2])
  with pytest.raises(ValueError, match='temperature is a finite number >= 0'):
    bj.rl.state_values(mdp, pi, -1.0)
