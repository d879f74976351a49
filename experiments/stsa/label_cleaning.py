"""Data cleaning in batches: weights of polluted digits by a clean loss."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness, vision
from experiments.stsa import zoo_problem
from experiments.vision import classifiers

PARTS = ('train', 'validation', 'selection', 'test')
CURVATURE = 2.0


def _scaled(
  parts: dict[str, vision.DigitPart],
) -> dict[str, vision.DigitPart]:
  """Centres images, and scales them for a curvature of at most about 2."""
  images = np.asarray(parts['train'].images, np.float64)
  mean = images.mean(0)
  centred = images - mean
  moment = centred.T @ centred / len(centred)
  # The curvature of the cross-entropy in the logits is at most 1/2.
  factor = (CURVATURE * 2 / np.linalg.eigvalsh(moment)[-1]) ** 0.5
  return {
    name: part._replace(images=(part.images - mean.astype(np.float32)) * factor)
    for name, part in parts.items()
  }


def make_cleaning(
  data_dir: str | None,
  *,
  corruption: float,
  sizes: dict[str, int],
  batch_size: int,
  penalty: float = 0.01,
) -> tuple[zoo_problem.Problem, harness.Source]:
  r"""Makes the problem of one fraction of wrong labels.

  .. math::
    \min_x \frac{1}{m} \sum_j \ell_j(y), \qquad
    y = \arg\min \frac{1}{n} \sum_i \sigma(x_i) \ell_i(y)
      + \frac{c}{2} \|y\|^2

  Args:
    data_dir: a folder with MNIST; None for the packaged digits.
    corruption: fraction of training digits with a random wrong label.
    sizes: digits in the parts train, validation, selection and test.
    batch_size: batch size of both losses, a divisor of their sizes.
    penalty: weight decay c.

  Returns:
    The problem, and the source of its data.
  """
  classifier = classifiers.make_classifier('linear')
  parts, source = vision.load_digits(data_dir, sizes)
  parts = _scaled({name: part.pixels() for name, part in parts.items()})
  labels, _ = vision.pollute_labels(
    jax.random.key(0),
    parts['train'].labels,
    fraction=corruption,
    rule='exclude',
  )
  split = lambda part: jax.tree.map(
    lambda z: zoo_problem.in_batches(z, batch_size), part
  )
  data = {
    'train': split(parts['train']._replace(labels=labels)),
    'validation': split(parts['validation']),
    'selection': parts['selection'],
    'test': parts['test'],
  }
  batches = tuple(len(data[n].labels) for n in ('validation', 'train'))
  count = batches[1] * batch_size

  def losses(weights, part, i):
    logits = classifier.apply(weights, part.images[i])
    return classifiers.cross_entropy(logits, part.labels[i])

  def upper(x, y, batch):
    del x
    return jnp.mean(losses(y, batch['data']['validation'], batch['upper']))

  def lower(x, y, batch):
    i = batch['lower']
    weights = jax.nn.sigmoid(x.reshape(batches[1], batch_size)[i])
    fit = jnp.mean(weights * losses(y, batch['data']['train'], i))
    return fit + penalty / 2 * optax.tree.vdot(y, y)

  def measure(params: bj.BilevelParams, data: Any) -> dict[str, Any]:
    def error(part):
      logits = classifier.apply(params.lower, part.images)
      predicted = jnp.argmax(logits, axis=-1)
      return jnp.mean(predicted != part.labels)

    return {
      'selection_error': error(data['selection']),
      'test_error': error(data['test']),
    }

  def start(key):
    return bj.BilevelParams(jnp.zeros(count), classifier.init(key))

  def on_clean_digits(x, y, batch):
    """Loss of the control: training on the clean digits only."""
    every = {'upper': jnp.arange(batches[0]), 'data': batch}
    return upper(x, y, every) + penalty / 2 * optax.tree.vdot(y, y)

  first = start(jax.random.key(0))
  control = bj.diagnostics.lower_minimiser(
    bj.BilevelProblem(upper, on_clean_digits), first, data, steps=100
  )
  reference = measure(first._replace(lower=control), data)['test_error']
  problem = zoo_problem.Problem(
    name=f'corruption{corruption:g}',
    title=f'Cleaning digits, {corruption:.0%} wrong labels',
    losses=bj.BilevelProblem(upper, lower),
    data=data,
    batches=batches,
    start=start,
    measure=measure,
    tune_by='selection_error',
    judge_by='test_error',
    label='test error of the classifier',
    lower_size=sum(z.size for z in jax.tree.leaves(first.lower)),
    upper_scale=4.0 * count,
    curvature=penalty,
    logarithmic=False,
    references={'clean_part': float(reference)},
  )
  return problem, source
