"""The Jacobian of several losses: against finite differences, in all forms."""

import chex
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests import contract
from tests.contract import OBJECTIVES, RATE, Row


def _fused(wrap, **numbers):
  del wrap  # It sees the whole batch.
  fused = bj.oracles.fused_moco(contract.three_losses, OBJECTIVES, **numbers)
  return optax.chain(fused, optax.sgd(RATE))


ROWS = (
  Row(
    'fused_moco',
    _fused,
    {'gradients/objectives': OBJECTIVES},
    params=contract.flat_params,
    hyper={'tracking': 0.5, 'weight_step': 2.0},
    same_as='moco',
    wraps=False,
  ),
)

TASKS = 3


def features(params, batch):
  return jnp.tanh(batch['x'] @ params.shared['w'] + params.shared['b'])


def head_loss(index):
  def loss(params, hidden, batch):
    error = hidden @ params.heads[index] - batch['y'][:, index]
    return jnp.mean(error**2) / (index + 1)

  return loss


HEADS = tuple(head_loss(i) for i in range(TASKS))


def all_losses(params, batch):
  hidden = features(params, batch)
  return jnp.stack([loss(params, hidden, batch) for loss in HEADS])


def heads_at_once(params, hidden, batch):
  return tuple(loss(params, hidden, batch) for loss in HEADS)


def one_loss(index):
  return lambda params, batch: all_losses(params, batch)[index]


def draw(dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 5)
  normal = lambda i, *shape: jax.random.normal(keys[i], shape, dtype)
  params = bj.sequences(
    shared={'w': normal(0, 4, 5), 'b': normal(1, 5)},
    heads=tuple(normal(2, TASKS, 5)),
  )
  return params, {'x': normal(3, 8, 4), 'y': normal(4, 8, TASKS)}


FORMS = {
  'at once': {'losses': all_losses, 'objectives': TASKS},
  'at once by vmap': {'losses': all_losses, 'objectives': TASKS, 'by': 'vmap'},
  'one by one': {'losses': tuple(one_loss(i) for i in range(TASKS))},
  'heads': {'losses': HEADS, 'trunk': features},
  'heads by vmap': {'losses': HEADS, 'trunk': features, 'by': 'vmap'},
  'heads at once': {
    'losses': heads_at_once,
    'objectives': TASKS,
    'trunk': features,
  },
}


def test_rows_are_finite_differences_in_all_forms(x64):
  params, batch = draw(jnp.float64)
  shape = jax.eval_shape(all_losses, params, batch).shape
  steps = [jax.random.normal(jax.random.key(i), (25,)) for i in range(3)]
  unravel = jax.flatten_util.ravel_pytree(params.shared)[1]
  steps = [unravel(step) for step in steps]

  @jax.jit
  def found():
    rows = {}
    for form, given in FORMS.items():
      oracle = bj.multi_objective(**given, rest=('heads',))
      jacobian, state = oracle.update(batch, oracle.init(params), params)
      assert jacobian.rows.heads is None
      assert jacobian.values.shape == shape
      rows[form] = jacobian._replace(rows=jacobian.rows.shared), state
    total = jax.grad(lambda p: all_losses(p, batch).sum())(params)

    def moved(step, size):
      add = lambda p, d: p + size * d
      shared = jax.tree.map(add, params.shared, step)
      return all_losses(params._replace(shared=shared), batch)

    h = 1e-5
    changes = [(moved(d, h) - moved(d, -h)) / (2 * h) for d in steps]
    return rows, all_losses(params, batch), total.heads, changes

  rows, values, heads, changes = found()
  for form, (jacobian, state) in rows.items():
    np.testing.assert_allclose(jacobian.values, values, rtol=1e-12)
    np.testing.assert_allclose(list(bj.values(state).values()), values)
    assert bj.counts(state) == {'gradients/objectives': TASKS}, form
    for step, change in zip(steps, changes):
      along = sum(
        np.tensordot(row, d, d.ndim)
        for row, d in zip(
          jax.tree.leaves(jacobian.rows), jax.tree.leaves(step), strict=True
        )
      )
      np.testing.assert_allclose(along, change, rtol=1e-7, err_msg=form)
    chex.assert_trees_all_close(jacobian.rest['heads'], heads, rtol=1e-10)


@pytest.mark.slow
def test_gram_matrix_without_rows():
  """In all forms that know it, alone and before aggregators."""
  params, batch = draw()
  forms = ('at once', 'heads', 'heads at once')
  cases = [FORMS[form] | {'by': by} for form in forms for by in ('map', 'vmap')]

  @jax.jit
  def found():
    out = []
    for given in cases:
      given = given | {'rest': ('heads',)}
      plain = bj.multi_objective(**given)
      lean = bj.multi_objective(**given, gramian=True)
      jacobian, _ = plain.update(batch, plain.init(params), params)
      gramian, state = lean.update(batch, lean.init(params), params)
      leaves = jax.tree.leaves(jacobian.rows)
      rows = jnp.concatenate([x.reshape(TASKS, -1) for x in leaves], axis=1)
      link = bj.aggregators.mgda(TASKS)
      one, two = (
        link.update(given, link.init(params), params)[0]
        for given in (gramian, jacobian)
      )
      out.append((gramian.matrix, rows @ rows.T, one, two, state))
    return out

  for matrix, product, ours, theirs, state in found():
    np.testing.assert_allclose(matrix, product, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(ours, theirs, rtol=2e-4, atol=2e-5)
    assert bj.counts(state) == {
      'gradients/objectives': TASKS + 1,
      'jacobian_vector_products/objectives': TASKS,
    }


def test_losses_on_the_output_of_one_network():
  """A trunk without heads of parameters, and parameters of any structure."""
  network = lambda params, batch: batch @ params['w']
  losses = (
    lambda heads, out, batch: jnp.mean(out**2),
    lambda heads, out, batch: jnp.mean(jnp.abs(out)),
  )
  params = {'w': jnp.array([[1.0, 2.0]])}
  batch = jnp.array([[1.0], [-2.0]])
  oracle = bj.multi_objective(losses, trunk=network)
  jacobian, _ = jax.jit(oracle.update)(batch, oracle.init(params), params)
  expected = jax.jit(
    jax.jacobian(
      lambda p: jnp.stack([f(None, network(p, batch), batch) for f in losses])
    )
  )(params)
  chex.assert_trees_all_close(jacobian.rows, expected, rtol=1e-6)


def test_each_loss_has_its_own_batch():
  losses = [lambda x, b: jnp.mean(b * x), lambda x, b: jnp.mean(b * x**2)]
  params = jnp.float32(3.0)
  batches = (jnp.array([1.0, 3.0]), jnp.ones(5))
  oracle = bj.multi_objective(losses, per_task=True)
  jacobian, _ = oracle.update(batches, oracle.init(params), params)
  np.testing.assert_allclose(jacobian.rows, [2.0, 6.0])
  named = bj.multi_objective(losses, ('a', 'b'), per_task=True)
  by_name = dict(zip('ab', batches))
  jacobian, state = named.update(by_name, named.init(params), params)
  np.testing.assert_allclose(jacobian.rows, [2.0, 6.0])
  assert bj.values(state)['b'] == 9.0


def test_stacked_batches_of_one_loss():
  """Rows and heads are those of a sequence of losses with their batches."""
  params, _ = draw()
  batches = {
    'x': jax.random.normal(jax.random.key(7), (TASKS, 6, 4)),
    'y': jax.random.normal(jax.random.key(8), (TASKS, 6)),
  }
  params = params._replace(heads=jnp.stack(params.heads))

  def loss(params, batch, index):
    hidden = features(params, batch)
    return jnp.mean((hidden @ params.heads[index] - batch['y']) ** 2)

  one = lambda i: lambda params, batch: loss(params, batch, i)
  listed = bj.multi_objective(
    [one(i) for i in range(TASKS)], rest=('heads',), per_task=True
  )
  split = [jax.tree.map(lambda x, i=i: x[i], batches) for i in range(TASKS)]
  theirs, _ = jax.jit(listed.update)(split, listed.init(params), params)
  for by in ('map', 'vmap'):
    stacked = bj.multi_objective(
      loss, TASKS, rest=('heads',), per_task=True, by=by
    )
    ours, _ = jax.jit(stacked.update)(batches, stacked.init(params), params)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-6)
  wrong = jax.tree.map(lambda x: x[:2], batches)
  with pytest.raises(ValueError, match='leading axis of tasks'):
    stacked.update(wrong, stacked.init(params), params)


@pytest.mark.parametrize(
  'losses',
  [
    lambda x, b: (x**2, 3 * x),
    lambda x, b: [x**2, 3 * x],
    lambda x, b: (jnp.stack([x**2, 3 * x]), {'aux': b}),
    lambda x, b: ((x**2, 3 * x), b),
    [lambda x, b: (x**2, 'aux'), lambda x, b: 3 * x],
  ],
)
def test_losses_may_come_with_an_auxiliary(losses):
  params = jnp.float32(2.0)
  oracle = bj.multi_objective(losses, 2)
  jacobian, _ = oracle.update(None, oracle.init(params), params)
  np.testing.assert_allclose(jacobian.rows, [4.0, 3.0])


def test_a_head_cannot_reach_past_the_features():
  params, batch = draw()
  reaching = lambda p, hidden, b: jnp.sum(p.shared['w']) + jnp.sum(hidden)
  oracle = bj.multi_objective([reaching], trunk=features, rest=('heads',))
  with pytest.raises(TypeError, match='None'):
    oracle.update(batch, oracle.init(params), params)


@pytest.mark.parametrize(
  ('make', 'error', 'words'),
  [
    (lambda: bj.multi_objective(all_losses), TypeError, 'number of objectives'),
    (lambda: bj.multi_objective(HEADS, 2), ValueError, '3 losses, but 2'),
    (lambda: bj.multi_objective([]), ValueError, '>= 1, got 0'),
    (lambda: bj.multi_objective(all_losses, 'aa'), ValueError, "got 'aa'"),
    (
      lambda: bj.multi_objective(all_losses, ['a', 'a']),
      ValueError,
      'distinct',
    ),
    (lambda: bj.multi_objective(all_losses, 3, by='x'), ValueError, "'vmap'"),
    (
      lambda: bj.multi_objective(HEADS, per_task=True, trunk=features),
      ValueError,
      'a trunk cannot be shared',
    ),
    (
      lambda: bj.multi_objective(FORMS['one by one']['losses'], gramian=True),
      ValueError,
      'or a trunk',
    ),
  ],
)
def test_arguments_that_disagree(make, error, words):
  with pytest.raises(error, match=words):
    make()


@pytest.mark.parametrize(
  ('losses', 'words'),
  [
    (lambda x, b: x, r'shape \(\)'),
    (lambda x, b: jnp.ones((2, 2)) * x, r'shape \(2, 2\)'),
    (lambda x, b: jnp.arange(2), 'int32, expected floats'),
  ],
)
def test_losses_of_another_kind(losses, words):
  oracle = bj.multi_objective(losses, 2)
  params = jnp.float32(1.0)
  with pytest.raises(TypeError, match=words):
    oracle.update(None, oracle.init(params), params)


@pytest.mark.slow
def test_fused_form_gives_the_same_updates():
  params, batch = draw()
  cases = [
    (form, radius)
    for form in FORMS
    # By vmap or not is nothing to the fused form.
    for radius in ((None, 0.05) if 'vmap' not in form else ())
  ]

  def run(solver):
    def body(state, _):
      updates, state = solver.update(batch, state, params)
      return state, updates

    return jax.lax.scan(body, solver.init(params), length=3)

  @jax.jit
  def both():
    out = []
    for form, radius in cases:
      given = {k: v for k, v in FORMS[form].items() if k != 'by'}
      hyper = {
        'tracking': lambda count: 0.9 / (count + 1),
        'weight_step': 0.3,
        'regularisation': 0.1,
        'radius': radius,
        'rest': ('heads',),
      }
      oracle = bj.multi_objective(**given, rest=('heads',))
      rows = optax.chain(oracle, bj.aggregators.moco(TASKS, **hyper))
      fused = bj.oracles.fused_moco(**given, **hyper)
      (ours, one), (theirs, two) = run(fused), run(rows)
      out.append(((ours.inner, one), (theirs[1], two)))
    return out

  for ours, theirs in both():
    chex.assert_trees_all_close(ours, theirs, rtol=2e-5, atol=1e-6)


def test_rows_pass_through_accumulation():
  params, batch = draw()
  oracle = bj.multi_objective(all_losses, TASKS, rest=('heads',))
  parts = bj.evaluation.accumulate(oracle, 4)
  whole, _ = jax.jit(oracle.update)(batch, oracle.init(params), params)
  mean, _ = jax.jit(parts.update)(batch, parts.init(params), params)
  chex.assert_trees_all_close(mean, whole, rtol=1e-5, atol=1e-6)
