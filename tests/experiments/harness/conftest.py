"""A small problem and a run of it, for the tests of the harness."""

import jax
import jax.numpy as jnp
import optax
import pytest

import bilevel_jax as bj
from experiments import harness


def energy(params, batch):
  upper, lower = params
  return jnp.sum((lower - batch) ** 2) + jnp.sum((upper - lower) ** 2)


def solver(context=None, rate=0.1):
  rate = rate if context is None else context.hyper['rate']
  return optax.chain(bj.gradient(energy, name='energy'), optax.adam(rate))


def init(context):
  del context
  return bj.BilevelParams(upper=jnp.zeros(3), lower=jnp.ones(3))


def batch(context):
  # Uniform, not normal: it takes a third of the time to compile.
  return jax.random.uniform(context.key, (3,))


def evaluate(context, params, state):
  del context, state
  return {'score': -jnp.sum((params.upper - 0.5) ** 2)}


@pytest.fixture
def train(tmp_path):
  """`harness.train` on the problem; fields of its records replace these."""

  def run(**arguments):
    defaults = {
      'solver': solver(),
      'init': init,
      'batch': batch,
      'evaluate': evaluate,
      'steps': 40,
      'chunk': 10,
      'seeds': 2,
      'workdir': tmp_path,
      'save_seconds': 0,
    }
    given = defaults | arguments
    method = given.pop('solver')
    records = [
      kind(**{name: given.pop(name) for name in kind._fields if name in given})
      for kind in (harness.Task, harness.Training, harness.Measure)
    ]
    assert not given, f'{given} are of no record'
    return harness.train(method, *records)

  return run


@pytest.fixture
def grid_solver():
  """The solver, from `hyper['rate']` of a context, or from `rate`."""
  return solver
