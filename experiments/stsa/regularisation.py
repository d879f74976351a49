"""One penalty a feature of a logistic regression, by its loss on other data."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

import bilevel_jax as bj
from experiments import harness
from experiments.stsa import tables, zoo_problem

# Of the loss without its penalty, at most; and where penalties start.
CURVATURE = 2.0
FIRST = 0.1
# Of a loss in float32: no gap below it can be told from none.
RESOLUTION = 1e-7
_START = float(np.log(FIRST / (1 - FIRST)))


class Parts(NamedTuple):
  """Samples times their signs, in fixed batches.

  Attributes:
    train: (batches, size, features).
    validation: likewise.
    test: (samples, features).
  """

  train: chex.Array
  validation: chex.Array
  test: chex.Array


def split(
  table: tables.Table, *, train: int, validation: int, batch_size: int
) -> Parts:
  """Standardises, scales and splits a table.

  A column of ones is added; all is divided by one number, so that the lower
  loss without its penalty has a curvature of at most one.

  Args:
    table: the samples.
    train: samples of the lower loss, about.
    validation: of the upper loss, about; what is left is for the test.
    batch_size: of both.

  Returns:
    The three parts.

  Raises:
    SettingsError: if a part would be empty.
  """
  order = np.random.default_rng(0).permutation(len(table.signs))
  rows = np.split(order, [train, train + validation])
  if min(len(rows[0]), len(rows[1])) < batch_size or not len(rows[2]):
    raise harness.SettingsError(
      f'{train} + {validation} samples in batches of {batch_size} leave no '
      f'test data of {len(order)}.'
    )
  seen = table.inputs[rows[0]]
  spread = seen.std(0)
  inputs = (table.inputs - seen.mean(0)) / np.where(spread > 1e-6, spread, 1)
  inputs = np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1)
  moment = inputs[rows[0]].T @ inputs[rows[0]] / len(rows[0])
  # A logistic loss curves by at most a quarter.
  inputs = inputs * (CURVATURE * 4 / np.linalg.eigvalsh(moment)[-1]) ** 0.5
  signed = inputs * table.signs[:, None]
  return Parts(
    *(zoo_problem.in_batches(signed[r], batch_size) for r in rows[:2]),
    jnp.asarray(signed[rows[2]], jnp.float32),
  )


def logistic(y: chex.Array, signed: chex.Array) -> chex.Array:
  """The mean loss of samples times their signs."""
  return jnp.mean(jax.nn.softplus(-(signed @ y)))


def minimiser(x: chex.Array, train: chex.Array, steps: int = 8) -> chex.Array:
  """The lower solution on all data, by Newton's method from zero.

  Args:
    x: logits of the penalties, (features,).
    train: (samples, features), times signs.
    steps: of the method; its errors square.

  Returns:
    (features,).
  """
  penalty = jax.nn.sigmoid(x)

  def newton(y, _):
    share = jax.nn.sigmoid(-(train @ y))
    slope = penalty * y - train.T @ share / len(train)
    curved = train.T @ (train * (share * (1 - share))[:, None]) / len(train)
    return y - jnp.linalg.solve(curved + jnp.diag(penalty), slope), None

  return jax.lax.scan(newton, jnp.zeros_like(x), length=steps)[0]


def value(x: chex.Array, parts: Parts) -> chex.Array:
  """What is minimised: the validation loss of the lower solution."""
  train, validation = (_flat(z) for z in parts[:2])
  return logistic(minimiser(x, train), validation)


def _flat(z):
  return z.reshape(-1, z.shape[-1])


def best_value(parts: Parts) -> float:
  """The least value that L-BFGS finds with exact gradients, in float64."""
  with jax.enable_x64(True):
    exact = jax.tree.map(
      lambda z: jnp.asarray(np.asarray(z, np.float64)), parts
    )
    both = jax.jit(jax.value_and_grad(lambda x: value(x, exact)))
    size = parts.train.shape[-1]
    found = []
    for start in (_START, _START - 3):
      least = scipy.optimize.minimize(
        lambda x: tuple(np.asarray(z, np.float64) for z in both(x)),
        np.full(size, start),
        jac=True,
        method='L-BFGS-B',
        # Slopes are small where a penalty hardly matters.
        options={'ftol': 1e-13, 'gtol': 1e-8, 'maxiter': 300},
        bounds=[(-15, 15)] * size,
      )
      found.append(float(least.fun))
  return min(found)


def make_regularisation(
  name: str,
  data_dir: str | None,
  *,
  train: int,
  validation: int,
  batch_size: int,
) -> tuple[zoo_problem.Problem, str]:
  r"""Makes the problem of one table.

  .. math::
    \min_x \frac{1}{m} \sum_j \ell(b_j^\top y), \qquad
    y = \arg\min \frac{1}{n} \sum_i \ell(a_i^\top y)
      + \frac{1}{2} \sum_k \sigma(x_k) y_k^2

  A penalty is at most one, so that a step that is stable stays it.

  Args:
    name: of the table.
    data_dir: folder of data sets.
    train: samples of the lower loss, about.
    validation: samples of the upper loss, about.
    batch_size: of both.

  Returns:
    The problem, and one line on its data.
  """
  table = tables.read(name, data_dir)
  parts = split(
    table, train=train, validation=validation, batch_size=batch_size
  )
  size = parts.train.shape[-1]
  best = best_value(parts)

  def upper(x, y, batch):
    del x
    return logistic(y, batch['data'].validation[batch['upper']])

  def lower(x, y, batch):
    fit = logistic(y, batch['data'].train[batch['lower']])
    return fit + jnp.sum(jax.nn.sigmoid(x) * y**2) / 2

  def measure(params: bj.BilevelParams, data: Parts) -> dict[str, Any]:
    y = minimiser(params.upper, _flat(data.train))
    loss = logistic(y, _flat(data.validation))
    error = jnp.mean((data.test @ y) <= 0)
    return {'gap': jnp.maximum(loss - best, RESOLUTION), 'test_error': error}

  def start(key):
    x = _START + 0.1 * jax.random.normal(key, (size,))
    return bj.BilevelParams(x, jnp.zeros(size))

  problem = zoo_problem.Problem(
    name=name,
    title=f'Penalties of a logistic regression, {name}',
    losses=bj.BilevelProblem(upper, lower),
    data=parts,
    batches=(len(parts.validation), len(parts.train)),
    start=start,
    measure=measure,
    tune_by='gap',
    judge_by='gap',
    label='validation loss, solved, above the least',
    lower_size=size,
    upper_scale=3000.0,
    curvature=0.01,
  )
  return problem, table.source
