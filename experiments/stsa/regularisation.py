"""One penalty a feature of a logistic regression, by its loss on other data."""

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

# Of the loss without its penalty, at most; and where penalties start.
CURVATURE = 2.0
FIRST = 0.1
# Of a loss in float32: no gap below it can be told from none.
RESOLUTION = 1e-7
_START = float(np.log(FIRST / (1 - FIRST)))
# Of Newton's method, at most.
MOST_STEPS = 100
# The search for the least value: where it starts, the least penalty, and steps.
STARTS, LEAST, STEPS = (0.5, 0.1, 0.01), 3e-7, 1_500


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
  table: harness.Table, *, train: int, validation: int, batch_size: int
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
  order = np.random.default_rng(0).permutation(len(table.inputs))
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
  signed = inputs * table.targets
  return Parts(
    *(zoo_problem.in_batches(signed[r], batch_size) for r in rows[:2]),
    jnp.asarray(signed[rows[2]], jnp.float32),
  )


def logistic(y: chex.Array, signed: chex.Array) -> chex.Array:
  """The mean loss of samples times their signs."""
  return jnp.mean(jax.nn.softplus(-(signed @ y)))


def minimiser(
  penalty: chex.Array, train: chex.Array, start: chex.Array | None = None
) -> chex.Array:
  """The lower solution on all data, by Newton's method with a line search.

  It ends two steps after the decrease that a step promises is below rounding,
  so that the last ones square an error that is small already.

  Args:
    penalty: of each feature, (features,).
    train: (samples, features), times signs.
    start: of the search; zero if None.

  Returns:
    (features,), as exact as its type allows.
  """
  lengths = 0.5 ** jnp.arange(16, dtype=penalty.dtype)
  rounding = jnp.finfo(penalty.dtype).eps

  def newton(carry):
    y, steps, last = carry
    step, slope = _newton_step(penalty, y, train)
    along = lambda t: _penalised(penalty, y - t * step, train)
    losses = jax.vmap(along)(lengths)
    # The longest of the steps that rounding cannot tell from the best.
    near = losses <= jnp.min(losses) * (1 + 4 * rounding)
    small = ~(slope @ step > rounding * losses[-1])
    y = y - lengths[jnp.argmax(near)] * step
    return y, steps + 1, jnp.where(small, last + 1, 0)

  first = (jnp.zeros_like(penalty) if start is None else start, 0, 0)
  more = lambda carry: (carry[1] < MOST_STEPS) & (carry[2] < 2)
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
  """What is minimised, the validation loss of the lower solution.

  Args:
    penalty: of each feature, (features,).
    parts: the samples.
    start: of the search for the lower solution.

  Returns:
    The loss, its derivative by the implicit function theorem, and the lower
    solution.
  """
  train, validation = (_flat(z) for z in parts[:2])
  y = minimiser(penalty, train, start)
  loss, slope = jax.value_and_grad(logistic)(y, validation)
  pulled = jnp.linalg.solve(_hessian(penalty, y, train), slope)
  return loss, -y * pulled, y


def _flat(z):
  return z.reshape(-1, z.shape[-1])


def best_value(parts: Parts, kept: pathlib.Path | None = None) -> float:
  """The least value that L-BFGS finds from some starts, in float64.

  The problem is not convex: another start may lead lower. From each, a search
  is over penalties and one over their logarithms: either is ahead at times.

  Args:
    parts: the samples.
    kept: a file in which what each start led to is kept, so that a search that
      was killed goes on and one that has ended is not done again.

  Returns:
    The value.
  """
  digest = harness.source_of('', parts, otherwise='').digest
  found = _kept(kept, digest)
  searches = list(itertools.product(STARTS, (True, False)))
  bar = progress.Progress('reference value', len(searches) * STEPS, 0)
  with jax.enable_x64(True):
    exact = jax.tree.map(lambda z: jnp.asarray(np.asarray(z), float), parts)
    evaluate = jax.jit(lambda p, y: value_and_slope(p, exact, y))
    for i in range(len(found), len(searches)):
      steps = itertools.count(i * STEPS)
      report = lambda _, steps=steps: bar.update(next(steps))
      found.append(
        _search(evaluate, exact.train.shape[-1], *searches[i], report)
      )
      if kept is not None:
        files.write_text(kept, json.dumps({'data': digest, 'least': found}))
  bar.close()
  return min(found)


def _search(evaluate, size, start, by_logarithm, report):
  """The least value that is found from one start."""
  y = jnp.zeros(size)
  there, back = (np.log, np.exp) if by_logarithm else (np.array, np.array)

  def both(at):
    nonlocal y
    penalty = back(at)
    loss, slope, y = evaluate(penalty, y)
    return float(loss), np.asarray(slope) * (penalty if by_logarithm else 1)

  least = scipy.optimize.minimize(
    both,
    there([start] * size),
    jac=True,
    method='L-BFGS-B',
    # Slopes are small where a penalty hardly matters.
    options={'ftol': 1e-13, 'gtol': 1e-10, 'maxiter': STEPS, 'maxcor': 30},
    bounds=[(there(LEAST), there(1))] * size,
    callback=report,
  )
  return float(least.fun)


def _kept(path, digest):
  """What a file has of a search on the same data."""
  try:
    found = json.loads(path.read_text())
    return [float(v) for v in found['least']] if found['data'] == digest else []
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

  A penalty is at most one, so that a step that is stable stays it.

  Args:
    name: of the problem.
    table: of two classes.
    train: samples of the lower loss, about.
    validation: samples of the upper loss, about.
    batch_size: of both.
    workdir: where the search for the least value is kept.

  Returns:
    The problem.
  """
  parts = split(
    table, train=train, validation=validation, batch_size=batch_size
  )
  size = parts.train.shape[-1]
  kept = workdir and pathlib.Path(workdir) / f'{name}_least.json'
  best = best_value(parts, kept or None)

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
    label='validation loss, solved, above the least',
    lower_size=size,
    upper_scale=3000.0,
    curvature=0.01,
  )
