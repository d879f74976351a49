"""Problems of both sides of a comparison, in JAX only."""

import jax
import jax.numpy as jnp

CLASSES, BATCHES = 10, 16


def digits(width, rows):
  """Makes a network that learns from weighted digits.

  Args:
    width: width of the inputs and of both hidden layers.
    rows: number of random digits of each loss.

  Returns:
    Losses `lower` and `upper` of (x, y, batch), the network y, the weights x of
    the digits, and the batch.
  """
  widths = (width, width, width, CLASSES)
  keys = jax.random.split(jax.random.key(0), len(widths) + 3)
  y = [
    {'w': jax.random.normal(key, (i, o)) / i**0.5, 'b': jnp.zeros(o)}
    for key, i, o in zip(keys, widths[:-1], widths[1:])
  ]

  def cross_entropy(y, images, labels):
    for layer in y[:-1]:
      images = jnp.tanh(images @ layer['w'] + layer['b'])
    nats = jax.nn.log_softmax(images @ y[-1]['w'] + y[-1]['b'])
    return -jnp.take_along_axis(nats, labels[:, None], axis=1)[:, 0]

  def upper(x, y, batch):
    del x
    return jnp.mean(cross_entropy(y, *batch['validation']))

  def lower(x, y, batch):
    losses = cross_entropy(y, *batch['train'])
    decay = sum(jnp.sum(z**2) for z in jax.tree.leaves(y)) / 2
    return jnp.mean(jax.nn.sigmoid(x) * losses) + decay

  def draw(key):
    one, two = jax.random.split(key)
    images = jax.random.normal(one, (rows, width))
    return images, jax.random.randint(two, (rows,), 0, CLASSES)

  batch = {'train': draw(keys[-1]), 'validation': draw(keys[-2])}
  return lower, upper, y, jnp.zeros(rows), batch


def quadratics(form, size, batch_size):
  """Makes quadratics with 16 fixed batches of samples.

  Args:
    form: 'dense' for full Hessians of samples, 'factorised' for rank one.
    size: dimension of each variable.
    batch_size: samples in a batch.

  Returns:
    Losses `upper` and `lower` of (x, y, index of a batch), and the start.
  """

  def draw(key, *shape):
    return jax.random.normal(key, (2, BATCHES, batch_size, *shape))

  keys = jax.random.split(jax.random.key(0), 4)
  linear = draw(keys[0], 2, size)
  if form == 'dense':
    square = jnp.eye(size) + 0.1 * draw(keys[1], 3, size, size) / size**0.5
  else:
    factors = draw(keys[1], 4, size) / size**0.5

  def make_loss(level):
    def loss(x, y, batch):
      p, q = jnp.moveaxis(linear[level, batch], 1, 0)
      if form == 'dense':
        inner, outer, cross = jnp.moveaxis(square[level, batch], 1, 0)
        terms = (
          (inner @ y) @ y / 2 + (outer @ x) @ x / 2 + 0.1 * (cross @ y) @ x
        )
        return jnp.mean(terms + p @ x + q @ y)
      a, b, left, right = jnp.moveaxis(factors[level, batch], 1, 0)
      terms = ((a @ x) ** 2 + (b @ y) ** 2) / 2 + (left @ x) * (right @ y)
      return jnp.mean(terms + p @ x + q @ y)

    return loss

  x, y = jax.random.normal(keys[2], (2, size))
  return make_loss(0), make_loss(1), (x, y)
