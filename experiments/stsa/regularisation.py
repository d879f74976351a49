"""Tunes one penalty per feature of a logistic regression."""

import itertools
import json
import pathlib
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

import bilevel_jax as bj
from experiments import harness
from experiments.harness.app import progress
from experiments.harness.store import files
from experiments.stsa import zoo_problem

CURVATURE = 2.0  # Maximum curvature of the loss without its penalty.
INITIAL_PENALTY = 0.1
_START = float(np.log(INITIAL_PENALTY / (1 - INITIAL_PENALTY)))
RESOLUTION = 1e-7  # Smallest gap that float32 resolves.
MAX_NEWTON_STEPS = 100
# Search for the reference value: initial and smallest penalties, and steps.
STARTS, MIN_PENALTY, STEPS = (0.5, 0.1, 0.01), 3e-7, 1_500


class Parts(NamedTuple):
  """Inputs multiplied by their labels -1 or 1, in fixed batches.

  Attributes:
    train: (batches, size, features).
    validation: (batches, size, features).
    test: (samples, features).
  """

  train: chex.Array
  validation: chex.Array
  test: chex.Array


def split(
  table: harness.Table, *, train: int, validation: int, batch_size: int
) -> Parts:
  """Standardises, scales and splits a table.

  Adds a column of ones, and scales all inputs so that the lower loss without
  its penalty has a curvature of at most `CURVATURE`.

  Args:
    table: the samples.
    train: approximate number of samples of the lower loss.
    validation: approximate number of samples of the upper loss; the rest are
      test samples.
    batch_size: batch size of both losses.

  Returns:
    The three parts.

  Raises:
    SettingsError: if a part would be empty.
  """
  order = np.random.default_rng(0).permutation(len(table.inputs))
  rows = np.split(order, [train, train + validation])
  if min(len(rows[0]), len(rows[1])) < batch_size or not len(rows[2]):
    raise harness.SettingsError(
      f'{train} + {validation} of {len(order)} samples in batches of '
      f'{batch_size} leave no test data.'
    )
  known = table.inputs[rows[0]]
  spread = known.std(0)
  inputs = (table.inputs - known.mean(0)) / np.where(spread > 1e-6, spread, 1)
  inputs = np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1)
  moment = inputs[rows[0]].T @ inputs[rows[0]] / len(rows[0])
  # The curvature of the logistic loss in its logit is at most 1/4.
  inputs = inputs * (CURVATURE * 4 / np.linalg.eigvalsh(moment)[-1]) ** 0.5
  signed = inputs * table.targets
  return Parts(
    *(zoo_problem.in_batches(signed[r], batch_size) for r in rows[:2]),
    jnp.asarray(signed[rows[2]], jnp.float32),
  )


def logistic(y: chex.Array, signed: chex.Array) -> chex.Array:
  """The mean logistic loss of inputs multiplied by their labels."""
  return jnp.mean(jax.nn.softplus(-(signed @ y)))


def minimiser(
  penalty: chex.Array, train: chex.Array, start: chex.Array | None = None
) -> chex.Array:
  """Solves the lower problem on all data by Newton's method with line search.

  Stops two steps after the predicted decrease falls below rounding; the last
  steps converge quadratically.

  Args:
    penalty: penalty per feature, (features,).
    train: inputs multiplied by their labels, (samples, features).
    start: initial y; zero if None.

  Returns:
    The minimiser, (features,), to the precision of its type.
  """
  lengths = 0.5 ** jnp.arange(16, dtype=penalty.dtype)
  rounding = jnp.finfo(penalty.dtype).eps

  def newton(carry):
    y, steps, last = carry
    step, slope = _newton_step(penalty, y, train)
    along = lambda t: _penalised(penalty, y - t * step, train)
    losses = jax.vmap(along)(lengths)
    # The longest step whose loss equals the best one up to rounding.
    near = losses <= jnp.min(losses) * (1 + 4 * rounding)
    small = ~(slope @ step > rounding * losses[-1])
    y = y - lengths[jnp.argmax(near)] * step
    return y, steps + 1, jnp.where(small, last + 1, 0)

  first = (jnp.zeros_like(penalty) if start is None else start, 0, 0)
  more = lambda carry: (carry[1] < MAX_NEWTON_STEPS) & (carry[2] < 2)
  return jax.lax.while_loop(more, newton, first)[0]


def _penalised(penalty, y, train):
  return logistic(y, train) + jnp.sum(penalty * y**2) / 2


def _hessian(penalty, y, train):
  share = jax.nn.sigmoid(-(train @ y))
  curved = train.T @ (train * (share * (1 - share))[:, None]) / len(train)
  return curved + jnp.diag(penalty)


def _newton_step(penalty, y, train):
  slope = jax.grad(_penalised, 1)(penalty, y, train)
  return jnp.linalg.solve(_hessian(penalty, y, train), slope), slope


def value_and_slope(
  penalty: chex.Array, parts: Parts, start: chex.Array | None = None
) -> tuple[chex.Array, chex.Array, chex.Array]:
  """Computes the validation loss at the lower solution, and its gradient.

  Args:
    penalty: penalty per feature, (features,).
    parts: the samples.
    start: initial y of the lower solution.

  Returns:
    The loss, its gradient by the implicit function theorem, and the lower
    solution.
  """
  train, validation = (_flat(z) for z in parts[:2])
  y = minimiser(penalty, train, start)
  loss, slope = jax.value_and_grad(logistic)(y, validation)
  pulled = jnp.linalg.solve(_hessian(penalty, y, train), slope)
  return loss, -y * pulled, y


def _flat(z):
  return z.reshape(-1, z.shape[-1])


def best_value(parts: Parts, cache: pathlib.Path | None = None) -> float:
  """Searches for the smallest validation loss, by L-BFGS in float64.

  The problem is not convex, so the result is an upper bound of the minimum.
  Each start is searched over penalties and over their logarithms.

  Args:
    parts: the samples.
    cache: file for the results of finished searches, which are not repeated.

  Returns:
    The smallest validation loss of all searches.
  """
  digest = harness.identify_source('', parts, otherwise='').digest
  values = _read_cache(cache, digest)
  searches = list(itertools.product(STARTS, (True, False)))
  bar = progress.Progress('reference value', len(searches) * STEPS, 0)
  with jax.enable_x64(True):
    exact = jax.tree.map(lambda z: jnp.asarray(np.asarray(z), float), parts)
    evaluate = jax.jit(lambda p, y: value_and_slope(p, exact, y))
    for i in range(len(values), len(searches)):
      steps = itertools.count(i * STEPS)
      report = lambda _, steps=steps: bar.update(next(steps))
      values.append(
        _search(evaluate, exact.train.shape[-1], *searches[i], report)
      )
      if cache is not None:
        files.write_text(cache, json.dumps({'data': digest, 'least': values}))
  bar.close()
  return min(values)


def _search(evaluate, size, start, by_logarithm, report):
  """Smallest validation loss from one start."""
  y = jnp.zeros(size)
  encode, decode = (np.log, np.exp) if by_logarithm else (np.array, np.array)

  def value_and_gradient(z):
    nonlocal y
    penalty = decode(z)
    loss, slope, y = evaluate(penalty, y)
    return float(loss), np.asarray(slope) * (penalty if by_logarithm else 1)

  result = scipy.optimize.minimize(
    value_and_gradient,
    encode([start] * size),
    jac=True,
    method='L-BFGS-B',
    # Tight tolerances, because gradients of unimportant penalties are small.
    options={'ftol': 1e-13, 'gtol': 1e-10, 'maxiter': STEPS, 'maxcor': 30},
    bounds=[(encode(MIN_PENALTY), encode(1))] * size,
    callback=report,
  )
  return float(result.fun)


def _read_cache(path, digest):
  """Reads the results of earlier searches on the same data."""
  try:
    cached = json.loads(path.read_text())
    if cached['data'] != digest:
      return []
    return [float(value) for value in cached['least']]
  except (AttributeError, OSError, ValueError, KeyError, TypeError):
    return []


def make_regularisation(
  name: str,
  table: harness.Table,
  *,
  train: int,
  validation: int,
  batch_size: int,
  workdir: str | None = None,
) -> zoo_problem.Problem:
  r"""Makes the problem of one table.

  .. math::
    \min_x \frac{1}{m} \sum_j \ell(b_j^\top y), \qquad
    y = \arg\min \frac{1}{n} \sum_i \ell(a_i^\top y)
      + \frac{1}{2} \sum_k \sigma(x_k) y_k^2

  Penalties are at most 1, so that stable step sizes stay stable.

  Args:
    name: name of the problem.
    table: a table of two classes.
    train: approximate number of samples of the lower loss.
    validation: approximate number of samples of the upper loss.
    batch_size: batch size of both losses.
    workdir: folder for the cache of `best_value`.

  Returns:
    The problem.
  """
  parts = split(
    table, train=train, validation=validation, batch_size=batch_size
  )
  size = parts.train.shape[-1]
  cache = pathlib.Path(workdir) / f'{name}_least.json' if workdir else None
  best = best_value(parts, cache)

  def upper(x, y, batch):
    del x
    return logistic(y, batch['data'].validation[batch['upper']])

  def lower(x, y, batch):
    fit = logistic(y, batch['data'].train[batch['lower']])
    return fit + jnp.sum(jax.nn.sigmoid(x) * y**2) / 2

  def measure(params: bj.BilevelParams, data: Parts) -> dict[str, Any]:
    y = minimiser(jax.nn.sigmoid(params.upper), _flat(data.train))
    loss = logistic(y, _flat(data.validation))
    error = jnp.mean((data.test @ y) <= 0)
    return {'gap': jnp.maximum(loss - best, RESOLUTION), 'test_error': error}

  def start(key):
    x = _START + 0.1 * jax.random.normal(key, (size,))
    return bj.BilevelParams(x, jnp.zeros(size))

  return zoo_problem.Problem(
    name=name,
    title=f'Penalties of a logistic regression, {name}',
    losses=bj.BilevelProblem(upper, lower),
    data=parts,
    batches=(len(parts.validation), len(parts.train)),
    start=start,
    measure=measure,
    tune_by='gap',
    judge_by='gap',
    label='validation loss above the reference',
    lower_size=size,
    upper_scale=3000.0,
    curvature=0.01,
  )
