"""The contract's rows of oracles that a whole solver is the row of, too."""

import functools

import optax

import bilevel_jax as bj
from tests import contract
from tests.contract import COORDINATES, INNER, RATE, Row

_INSIDE = {
  'gradients/upper': 1,
  'gradients/lower': INNER,
  'hessian_vector_products/lower': INNER,
}


def _unrolled(wrap, rate, inner, **given):
  oracle = bj.unrolled(
    contract.PROBLEM,
    lower=bj.Sequence(
      optax.sgd(inner), steps=INNER, batch_at=contract.inner_batch
    ),
    **given,
  )
  return contract.by_descent(wrap(oracle), upper=rate, lower=1.0)


def _implicit(wrap, rate):
  """The lower variable stays: the hypergradient alone."""
  solve = bj.linear_solvers.conjugate_gradient(COORDINATES)
  oracle = wrap(bj.implicit(contract.PROBLEM, solve=solve))
  return contract.by_descent(oracle, upper=rate)


_NUMBERS = {'hyper': {'rate': RATE, 'inner': RATE}, 'parts': 'none'}

ROWS = (
  Row('unrolled', _unrolled, _INSIDE, same_as='rhg', light=True, **_NUMBERS),
  Row(
    'unrolled, forward',
    functools.partial(_unrolled, mode='forward'),
    _INSIDE | {'hessian_vector_products/lower': INNER * COORDINATES},
    same_as='rhg',
    **_NUMBERS,
  ),
  Row(
    'implicit',
    _implicit,
    {'gradients/upper': 1},
    random_counts=('hessian_vector_products/lower',),
    parts='none',
    light=True,
  ),
)
