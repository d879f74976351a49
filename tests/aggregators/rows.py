"""The contract's rows of aggregators: three objectives, one variable."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from tests import contract
from tests.contract import COORDINATES, OBJECTIVES, RATE, Row


def _chain(name, copies=1, keyed=False, settings=(), **fixed):
  """Three objectives, and an aggregator with its hyperparameters."""

  def make(wrap, **hyper):
    aggregator = getattr(bj.aggregators, name)
    oracle = bj.multi_objective(
      contract.three_losses, OBJECTIVES, **dict(settings)
    )
    oracle = wrap(oracle)
    if copies > 1:
      oracle = bj.evaluation.independent(oracle, copies)
    key = {'key': jax.random.key(3)} if keyed else {}
    link = aggregator(OBJECTIVES, **key, **fixed, **hyper)
    return optax.chain(oracle, link, optax.sgd(RATE))

  return make


def row(
  name, make=None, *, samples=1, keyed=False, hyper=(), fixed=(), **flags
):
  """The row of one aggregator; its first word is the aggregator's name."""
  method = Row(name, None, {}).method
  return Row(
    name,
    make or _chain(method, samples, keyed, **dict(fixed)),
    {'gradients/objectives': OBJECTIVES * samples},
    params=flags.pop('params', contract.flat_params),
    # Only its own hyperparameters; the step size belongs to optax.
    hyper=dict(hyper),
    **flags,
  )


def _weighted(wrap):
  oracle = wrap(bj.multi_objective(contract.three_losses, OBJECTIVES))
  link = bj.aggregators.weighted([0.5, 0.3, 0.4])
  return optax.chain(oracle, link, optax.sgd(RATE))


def headed_losses(params, batch):
  """Three losses of a shared variable with one head each."""
  heads = [((head - batch['c']) ** 2).mean() for head in params.heads]
  shared = {'z': params.shared['z']}
  return contract.three_losses(shared, batch) + jnp.stack(heads)


def headed_params(seed, dtype=jnp.float32):
  return bj.sequences(
    shared=contract.flat_params(seed, dtype),
    heads=tuple(jnp.zeros(COORDINATES, dtype) for _ in range(OBJECTIVES)),
  )


def _headed(wrap):
  oracle = bj.multi_objective(headed_losses, OBJECTIVES, rest=('heads',))
  moco = bj.aggregators.moco(OBJECTIVES, tracking=0.5, rest=('heads',))
  sgd = optax.sgd(RATE)
  return bj.descend(optax.chain(wrap(oracle), moco), shared=sgd, heads=sgd)


def _two(wrap, tracking):
  """Two objectives: arrays of shape (2,) that are not variables."""
  losses = lambda params, batch: contract.three_losses(params, batch)[:2]
  oracle = wrap(bj.multi_objective(losses, ('one', 'two')))
  link = bj.aggregators.moco(2, tracking=tracking, weight_step=2.0)
  return optax.chain(oracle, link, optax.sgd(RATE))


def _averaged(wrap, decay):
  oracle = wrap(bj.multi_objective(contract.three_losses, OBJECTIVES))
  mgda = bj.aggregators.mgda(OBJECTIVES)
  link = bj.aggregators.cr_mogm(OBJECTIVES, mgda, decay=decay)
  return optax.chain(oracle, link, optax.sgd(RATE))


def _constrained(wrap, rate):
  """The third loss is the penalty."""
  oracle = wrap(bj.multi_objective(contract.three_losses, OBJECTIVES))
  link = bj.aggregators.constrained_mgda(OBJECTIVES - 1, rate=rate)
  return optax.chain(oracle, link, optax.sgd(RATE))


def _barrier(wrap, eta):
  oracle = wrap(bj.gradient_norm(contract.PROBLEM))
  barrier = bj.aggregators.dynamic_barrier(eta)
  return contract.by_descent(
    optax.chain(oracle, barrier), upper=RATE, lower=RATE
  )


def _penalty(wrap, penalty, rate):
  oracle = wrap(bj.value_gap(contract.PROBLEM))
  link = bj.aggregators.scale_by_penalty(penalty)
  return contract.by_descent(optax.chain(oracle, link), upper=rate, lower=rate)


MOCO = {'tracking': 0.5, 'weight_step': 2.0}
_SLOPE = {
  'gradients/upper': 1,
  'gradients/lower': 1,
  'hessian_vector_products/lower': 1,
}

ROWS = (
  row('mean', covers=('multi_objective',)),
  row(
    'mean, rows made at once',
    _chain('mean', settings={'by': 'vmap'}),
    same_as='mean',
    light=True,
  ),
  row('weighted', _weighted, light=True),
  row('mgda', devices=True),
  row('smg', same_as='mgda', light=True),
  row('pcgrad', keyed=True),
  row('grad_vac', keyed=True),
  row('grad_drop', keyed=True, devices=True),
  row('cagrad', hyper={'radius': 0.4}, schedules=()),
  row('imtl_g'),
  row('fair_grad'),
  row('config', devices=True),
  row('nash_mtl', fixed={'normalise': True}),
  row('aligned_mtl'),
  row('upgrad'),
  row('dual_proj'),
  row('stch', hyper={'smoothing': 0.1}),
  row('uncertainty_weighting'),
  row('grad_norm'),
  row('dwa'),
  row('imtl_l'),
  row('random_weights', keyed=True),
  row('geometric_mean'),
  row('db_mtl', hyper={'decay': 0.5}, devices=True),
  row('excess_mtl', hyper={'rate': 0.5}, devices=True),
  row('cr_mogm', _averaged, hyper={'decay': 0.5}),
  row('pcd', hyper={'progress': 1.0}),
  row('constrained_mgda', _constrained, hyper={'rate': 4.0}),
  row('pmgda', fixed={'preference': [1.0, 2.0, 3.0]}, hyper={'rate': 8.0}),
  row('moco', hyper=MOCO, devices=True),
  row(
    'moco, exact weights',
    fixed={'weight_step': None, 'regularisation': 0.1, 'radius': 9.0},
    hyper={'tracking': 0.5},
  ),
  row('moco, heads', _headed, params=headed_params, devices=True),
  row('moco, two objectives', _two, hyper={'tracking': 0.5})._replace(
    counts={'gradients/objectives': 2}
  ),
  row('modo', samples=2, fixed={'samples': 2}, hyper={'weight_step': 0.3}),
  row('sdmgrad', samples=2, fixed={'samples': 2}),
  Row(
    'dynamic_barrier',
    _barrier,
    _SLOPE,
    hyper={'eta': 1.0},
    parts='none',
  ),
  Row(
    'scale_by_penalty',
    _penalty,
    {'gradients/upper': 1, 'gradients/lower': 2},
    params=contract.with_sequence(value=np.linspace(-0.5, 1.0, COORDINATES)),
    hyper=contract.PENALISED,
  ),
)
