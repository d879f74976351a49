"""The contract's rows of wrappers around an oracle of one loss."""

import functools

import jax
import optax

import bilevel_jax as bj
from tests import contract
from tests.contract import OBJECTIVES, RATE, Row


def _gradient():
  return bj.gradient(contract.flat_loss)


def _accumulate(wrap):
  return optax.chain(
    bj.evaluation.accumulate(wrap(_gradient()), 2), optax.sgd(RATE)
  )


def _storm(wrap, decay):
  return optax.chain(
    bj.evaluation.storm(wrap(_gradient()), decay), optax.sgd(RATE)
  )


def _recursive(wrap):
  """Two differences after each fresh estimate."""
  oracle = bj.evaluation.recursive(wrap(_gradient()), 3)
  return optax.chain(oracle, optax.sgd(RATE))


def _saga(wrap):
  return optax.chain(bj.evaluation.saga(wrap(_gradient()), 2), optax.sgd(RATE))


def _delayed(wrap, **kwargs):
  """A delay of two updates in a run of three."""
  oracle = bj.evaluation.delayed(wrap(_gradient()), 3, **kwargs)
  return optax.chain(oracle, optax.sgd(RATE))


def _mean_over(wrap):
  """The axis is one of parts, so that it also runs on one device."""
  oracle = bj.evaluation.mean_over(wrap(_gradient()), 'parts')

  def update_fn(batch, state, params=None, **extra_args):
    over = jax.vmap(
      lambda part: oracle.update(part, state, params, **extra_args),
      axis_name='parts',
      out_axes=None,
    )
    return over(bj.evaluation.split_batch(batch, 2))

  mapped = optax.GradientTransformationExtraArgs(oracle.init, update_fn)
  return optax.chain(mapped, optax.sgd(RATE))


def _independent(wrap):
  oracle = wrap(bj.multi_objective(contract.three_losses, OBJECTIVES))
  rows = bj.evaluation.independent(oracle, 2)
  return optax.chain(rows, bj.aggregators.mean(2 * OBJECTIVES), optax.sgd(RATE))


def _together(wrap):
  """The gradients of both variables at one point."""
  above = bj.gradient(
    lambda p, batch: contract.upper_loss(p.upper, p.lower, batch),
    name='above',
    of='upper',
  )
  below = bj.lower_gradient(contract.PROBLEM)
  oracle = bj.evaluation.together(wrap(above), wrap(below))
  return contract.by_descent(oracle, upper=RATE, lower=RATE)


# Their own hyperparameters; the step size belongs to optax.
_FLAT = {'params': contract.flat_params, 'hyper': {}}

ROWS = (
  Row(
    'accumulate',
    _accumulate,
    {'gradients/loss': 2},
    same_as='gradient, sgd',
    devices=True,
    **_FLAT,
  ),
  Row(
    'storm',
    _storm,
    {'gradients/loss': 2},
    devices=True,
    **_FLAT | {'hyper': {'decay': 0.4}},
  ),
  Row(
    'recursive',
    _recursive,
    {},
    random_counts=('gradients/loss',),
    devices=True,
    **_FLAT,
  ),
  Row('saga', _saga, {'gradients/loss': 1}, devices=True, **_FLAT),
  Row('delayed', _delayed, {'gradients/loss': 1}, devices=True, **_FLAT),
  Row(
    'delayed, at random',
    functools.partial(_delayed, bound=5, service='random', key=0),
    {'gradients/loss': 1},
    **_FLAT,
  ),
  Row(
    'delayed, sampled',
    functools.partial(_delayed, bound=4, service='sampled', key=0),
    {'gradients/loss': 1},
    light=True,
    **_FLAT,
  ),
  Row(
    'mean_over',
    _mean_over,
    {'gradients/loss': 1},
    same_as='gradient, sgd',
    **_FLAT,
  ),
  Row(
    'independent',
    _independent,
    {'gradients/objectives': 2 * OBJECTIVES},
    same_as='mean',
    devices=True,
    **_FLAT,
  ),
  Row(
    'together',
    _together,
    {'gradients/above': 1, 'gradients/lower': 1},
    hyper={},
  ),
)
