"""Digits of clients, and communication rounds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from experiments.aipod import client_digits, clients, fednest, tasks

CLIENTS = 8


def load(**changes):
  sizes = {'clients': 10, 'pooling': 4, 'selection': 100, 'test': 200}
  split = client_digits.Split(**(sizes | changes))
  return client_digits.load_digits(None, split)


def test_clients_have_few_classes_and_disjoint_parts():
  digits, source = load()
  assert '5,000' in source.words
  assert digits.train.images.shape[0] == 10
  assert digits.train.images.shape[-1] == 49
  # Standardised pixels, and means over 4 x 4 of them that keep the norm.
  size = float(jnp.mean(jnp.sum(digits.train.images**2, axis=-1)))
  assert 300 < size < 784
  share = digits.validation.labels.shape[1] / digits.train.labels.shape[1]
  assert 0.2 < share < 0.3
  classes = [len(np.unique(row)) for row in np.asarray(digits.train.labels)]
  assert max(classes) <= 4
  assert set(np.unique(digits.train.labels)) == set(range(10))
  rows = np.concatenate([np.asarray(p.images).reshape(-1, 49) for p in digits])
  # Nearly all packaged digits differ, so overlapping parts would show.
  assert len(np.unique(rows, axis=0)) > 0.99 * len(rows)


def test_imbalance_is_exponential():
  labels = np.repeat(np.arange(10), 100)
  counts = np.bincount(labels[client_digits.imbalance(labels, 10.0)])
  assert counts[0] == 100 and counts[9] == 10
  np.testing.assert_allclose(counts[1:] / counts[:-1], 10 ** (-1 / 9), rtol=0.1)


def test_too_many_clients_are_an_error():
  with pytest.raises(ValueError, match='too few for 2,000 clients'):
    load(clients=2_000)


def test_batches_are_drawn_for_each_client_and_time():
  digits, _ = load()
  batch = client_digits.draw_batch(jax.random.key(0), digits, 7, 3)
  assert batch.rows.shape == (10, 4, 7)
  one = jax.tree.map(lambda z: z[0], batch)
  first, second = (client_digits.batch_at(one, t).now for t in (0, 1))
  assert first.shape == (7,) and np.any(first != second)
  assert (
    client_digits.draw_batch(jax.random.key(0), digits, 10_000, 3).rows is None
  )


def test_balanced_accuracy_is_the_mean_over_classes():
  logits = jax.nn.one_hot(jnp.array([0, 0, 0, 0]), 10)
  labels = jnp.array([0, 0, 0, 1])
  assert float(tasks.accuracy(logits, labels, balanced=False)) == 0.75
  # Eight classes have no digit and count as 0.
  balanced = tasks.accuracy(logits, labels, balanced=True)
  np.testing.assert_allclose(balanced, 0.1)


# Quadratics with different curvatures and targets per client.

CURVATURE = jnp.linspace(0.5, 2.0, CLIENTS)
TARGET = jnp.linspace(-1.0, 2.0, CLIENTS)
PROBLEM = bj.BilevelProblem(
  upper=lambda x, y, b: jnp.sum((y - b[1]) ** 2) / 2 + jnp.sum(x**2) / 8,
  lower=lambda x, y, b: b[0] * jnp.sum((y - x - b[1]) ** 2) / 2,
)


def solution():
  """Closed-form x and y of the mean losses."""
  h, p = np.asarray(CURVATURE), np.asarray(TARGET)
  shift = (h * p).mean() / h.mean()  # y = x + shift
  x = (p.mean() - shift) / 1.25
  return x, x + shift


def solve(solver, steps):
  params = bj.BilevelParams(*(jnp.zeros((CLIENTS, 2)),) * 2)
  state, step = solver.init(params), jax.jit(solver.update)
  for _ in range(steps):
    updates, state = step((CURVATURE, TARGET), state, params)
    params = bj.apply_updates(params, updates)
  return params, state


def e_aipod(axis_name, probability=0.4):
  consensus = bj.projections.consensus_set(axis_name)
  return bj.e_aipod(
    PROBLEM,
    upper=bj.Sequence(optax.sgd(0.2), set=consensus),
    lower=bj.Sequence(
      optax.sgd(0.2),
      set=bj.projections.Lazy(consensus, probability, key=1),
      steps=5,
    ),
    solve=bj.linear_solvers.neumann(5, 0.5),
  )


def nest(axis_name):
  return fednest.fednest(
    PROBLEM,
    axis_name,
    upper_rate=0.05,
    lower_rate=0.1,
    loops=fednest.Loops(lower_rounds=2, local_steps=4, upper_steps=3),
    solve=bj.linear_solvers.neumann(5, 0.5),
    batch_at=lambda batch, t: batch,
  )


@pytest.mark.parametrize(('make', 'steps'), [(e_aipod, 150), (nest, 60)])
def test_solves_the_problem_of_the_mean_losses(make, steps):
  params, _ = solve(clients.over_clients(make), steps)
  x, y = solution()
  np.testing.assert_allclose(params.upper, x, atol=2e-3)
  np.testing.assert_allclose(params.lower, y, atol=2e-3)


def test_each_mean_over_clients_is_a_round():
  _, state = solve(clients.over_clients(nest), 2)
  counts = bj.counts(state)
  rounds = {k: n for k, n in counts.items() if k.startswith('rounds')}
  # 2 T + (N' + 1) + 2 in each of two updates.
  assert rounds == {'rounds/lower': 8, 'rounds/linear': 12, 'rounds/upper': 4}
  always = lambda axis: e_aipod(axis, probability=1.0)
  _, state = solve(clients.over_clients(always), 2)
  counts = bj.counts(state)
  rounds = {k: n for k, n in counts.items() if k.startswith('rounds')}
  # S p + (N' + 1) + 1.
  assert rounds == {'rounds/lower': 10, 'rounds/linear': 12, 'rounds/upper': 2}
  _, state = solve(clients.over_clients(e_aipod), 20)
  drawn = bj.counts(state)['rounds/lower']
  assert drawn == bj.counts(state)['projections/lower']
  assert 20 < drawn < 60


@pytest.mark.parametrize('make', [e_aipod, nest])
def test_eight_devices_and_one_give_the_same_iterates(make):
  mesh = jax.make_mesh(
    (8,), (clients.DEVICES,), axis_types=(jax.sharding.AxisType.Auto,)
  )
  one, one_state = solve(clients.over_clients(make), 10)
  many, many_state = solve(clients.over_clients(make, mesh), 10)
  for a, b in zip(one, many, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  assert bj.counts(one_state) == bj.counts(many_state)
  for name, value in bj.values(one_state).items():
    np.testing.assert_allclose(value, bj.values(many_state)[name], rtol=1e-4)


def test_a_few_clients_in_each_update():
  def make(taking_part):
    return clients.sampled_clients(
      clients.over_clients(lambda axis: e_aipod(axis, 1.0)), taking_part, 0
    )

  everyone, state = solve(make(CLIENTS), 60)
  np.testing.assert_allclose(everyone.upper, solution()[0], atol=2e-3)
  # One more round for the mean at the end of an update.
  assert bj.counts(state)['rounds/lower'] == 60 * 6
  few, _ = solve(make(3), 60)
  assert float(jnp.ptp(few.lower)) < 1e-6
  np.testing.assert_allclose(few.upper, solution()[0], atol=1.0)
  assert float(jnp.max(jnp.abs(few.upper - everyone.upper))) > 1e-3
