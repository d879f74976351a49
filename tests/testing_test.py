"""The installed contract, and methods written with public names only."""

import inspect
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import setuptools

import bilevel_jax as bj
from bilevel_jax import testing

ROOT = pathlib.Path(__file__).parents[1]


# Methods as a user would write them, with public names only.


def grad_norm(objectives, *, rate=0.025, alpha=1.5):
  bj.checks.within('grad_norm', 'rate', rate, 0)

  def choose(gramian, state):
    first, weights = state.inner
    first = jnp.where(state.count == 0, gramian.values, first)
    progress = gramian.values / first
    pull = (progress / jnp.mean(progress)) ** alpha
    norms = weights * gramian.lengths
    slope = gramian.lengths * jnp.sign(norms - jnp.mean(norms) * pull)
    step = bj.aggregators.current(rate, state) * slope
    after = jnp.maximum(weights - step, 0)
    after = objectives * after / jnp.sum(after)
    return weights, jnp.stack([first, after])

  start = lambda params, dtype: jnp.ones([2, objectives], dtype)
  return bj.aggregators.by_gramian(
    'grad_norm', objectives, choose, start, losses=True
  )


def srba(problem, *, period, upper, lower, wrap=lambda oracle: oracle):
  low = bj.types.as_sequence(lower, 'lower')
  directions = wrap(bj.implicit_directions(problem))
  return bj.descend(
    bj.evaluation.recursive(directions, period),
    upper=upper,
    lower=low,
    linear=bj.types.linear_sequence(None, low),
  )


def _grad_norm_row(wrap):
  oracle = wrap(bj.multi_objective(testing.three_losses, testing.OBJECTIVES))
  link = grad_norm(testing.OBJECTIVES, rate=0.1)
  return optax.chain(oracle, link, optax.sgd(testing.RATE))


def _srba_row(wrap, rate):
  sgd = optax.sgd(rate)
  return srba(testing.PROBLEM, period=2, upper=sgd, lower=sgd, wrap=wrap)


USER_ROWS = {
  'grad_norm': (
    testing.Row(
      'grad_norm',
      _grad_norm_row,
      {'gradients/objectives': testing.OBJECTIVES},
      params=testing.flat_params,
      hyper={},
    ),
    25,
    grad_norm,
  ),
  'srba': (
    testing.Row(
      'srba',
      _srba_row,
      {},
      random_counts=(
        'gradients/lower',
        'gradients/upper',
        'hessian_vector_products/lower',
      ),
    ),
    35,
    srba,
  ),
}


@pytest.mark.parametrize('name', USER_ROWS)
def test_user_methods_are_short_and_keep_all_promises(name):
  row, lines, method = USER_ROWS[name]
  code = [x for x in inspect.getsource(method).splitlines() if x.strip()]
  assert len(code) <= lines
  testing.check(row)


def test_user_methods_match_those_of_the_library():
  sgd = optax.sgd(0.1)
  toy = testing.coupled_problem()
  arguments = {'upper': sgd, 'lower': sgd, 'period': 3}
  ends = [
    testing.run(make(toy.problem, **arguments), toy.params, 8)[0]
    for make in (srba, bj.solvers.srba)
  ]
  jax.tree.map(np.testing.assert_array_equal, *ends)
  batch, params = testing.random_batch(0), testing.flat_params(0)
  oracle = bj.multi_objective(testing.three_losses, testing.OBJECTIVES)
  ends = [
    testing.run(optax.chain(oracle, make(3), sgd), params, 8, batch)[0]
    for make in (grad_norm, bj.aggregators.grad_norm)
  ]
  # Equal up to float32 rounding, since the operations differ.
  close = lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6)
  jax.tree.map(close, *ends)


def test_broken_promises_are_reported():
  """A wrong count breaks two promises."""

  def make(wrap, rate):
    oracle = wrap(bj.gradient(testing.flat_loss))
    return optax.chain(oracle, optax.sgd(rate))

  row = testing.Row(
    'sgd', make, {'gradients/loss': 2}, params=testing.flat_params
  )
  broken = testing.broken_promises(row, testing.QUICK)
  assert list(broken) == [
    'counts evaluations',
    'scan vmap schedules and accumulate',
  ]
  with pytest.raises(testing.Broken, match=r'sgd:\n\* counts eval'):
    testing.check(row, testing.LIGHT)
  testing.check(row._replace(counts={'gradients/loss': 1}), testing.LIGHT)


def test_known_solutions_are_solutions(x64):
  """By the hypergradient, finite differences and a solver."""
  for make in (testing.toy_problem, testing.coupled_problem):
    solved = make()
    x, y = solved.solution
    np.testing.assert_allclose(solved.hypergradient(x), 0, atol=1e-12)
    np.testing.assert_allclose(solved.minimiser(x), y, atol=1e-12)
    slope = jax.grad(solved.problem.lower, 1)(jnp.asarray(x), y, None)
    np.testing.assert_allclose(slope, 0, atol=1e-12)
    upper = lambda x, s=solved: float(
      s.problem.upper(jnp.asarray(x), jnp.asarray(s.minimiser(x)), None)
    )
    at = np.asarray(solved.params.upper)
    units = 1e-6 * np.eye(at.size)
    by_differences = [(upper(at + u) - upper(at - u)) / 2e-6 for u in units]
    np.testing.assert_allclose(
      solved.hypergradient(at), by_differences, rtol=1e-6
    )
    solver = bj.soba(
      solved.problem, upper=optax.sgd(0.05), lower=optax.sgd(0.2)
    )
    start = jax.tree.map(lambda z: jnp.asarray(z, jnp.float64), solved.params)
    params, _ = testing.run(solver, start, 4_000)
    np.testing.assert_allclose(params.upper, x, atol=1e-6)


def test_the_package_is_installed_and_needs_no_test_runner():
  packages = setuptools.find_packages(str(ROOT), include=['bilevel_jax*'])
  assert 'bilevel_jax.testing' in packages
  # A process that cannot import the packages of tests and experiments.
  code = (
    'import sys\n'
    "for name in ('pytest', 'hypothesis', 'orbax', 'scipy.optimize', 'flax'):\n"
    '  sys.modules[name] = None\n'
    'import bilevel_jax.testing as testing, jax, bilevel_jax as bj, optax\n'
    'assert not jax._src.xla_bridge._backends\n'
    'row = testing.Row(\n'
    "  'sgd',\n"
    '  lambda wrap, rate: optax.chain(\n'
    '    wrap(bj.gradient(testing.flat_loss)), optax.sgd(rate)\n'
    '  ),\n'
    "  {'gradients/loss': 1}, params=testing.flat_params)\n"
    'testing.check(row)\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True,
    text=True,
    check=False,
    cwd=ROOT,
  )
  assert done.returncode == 0, done.stderr
