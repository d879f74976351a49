import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj

PARAMS = bj.BilevelParams(jnp.float32(4.0), jnp.float32(1.0))


def descend(loss, name, rate=1.0):
  return optax.chain(
    bj.gradient(loss, name=name, of=name),
    bj.per_sequence(**{name: optax.sgd(rate)}),
  )


HALVE_UPPER = descend(lambda p, batch: p.upper**2 / 2, 'upper', 0.5)
LOWER_TO_UPPER = descend(lambda p, batch: (p.lower - p.upper) ** 2 / 2, 'lower')


def scale_by_argument():
  """A link that reads an extra argument: to see whether it gets there."""

  def update_fn(updates, state, params=None, *, scale, **extra_args):
    del params, extra_args
    return jax.tree.map(lambda u: u * scale, updates), state

  return optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), update_fn
  )


def add_batch():
  """A solver whose update is the batch."""
  return optax.stateless(lambda batch, params: batch)


def step(solver, params, batch=None, state=None, **extra_args):
  state = solver.init(params) if state is None else state
  return solver.update(batch, state, params, **extra_args)


class TestAlternate:
  def test_the_second_sees_what_the_first_moved(self):
    updates, _ = step(bj.alternate(HALVE_UPPER, LOWER_TO_UPPER), PARAMS)
    assert updates == bj.BilevelParams(-2.0, 1.0)  # lower goes to 2, not 4

  def test_the_order_decides(self):
    updates, _ = step(bj.alternate(LOWER_TO_UPPER, HALVE_UPPER), PARAMS)
    assert updates == bj.BilevelParams(-2.0, 3.0)

  def test_twice_the_same_sequence_adds_up(self):
    updates, _ = step(bj.alternate(HALVE_UPPER, HALVE_UPPER), PARAMS)
    assert updates == bj.BilevelParams(-3.0, None)

  def test_other_trees(self):
    half = optax.chain(
      bj.gradient(lambda p, batch: p['z'] ** 2 / 2), optax.sgd(0.5)
    )
    updates, _ = step(bj.alternate(half, half), {'z': jnp.float32(8.0)})
    assert updates == {'z': -6.0}

  def test_every_part_gets_the_batch_and_the_arguments(self):
    part = optax.chain(add_batch(), scale_by_argument())
    updates, _ = step(bj.alternate(part, part), 0.0, jnp.float32(3.0), scale=2)
    assert updates == 12.0

  def test_takes_a_solver(self):
    with pytest.raises(ValueError, match='at least one solver'):
      bj.alternate()


class TestRepeat:
  def test_equals_steps_by_hand(self):
    solver = bj.repeat(bj.alternate(HALVE_UPPER, LOWER_TO_UPPER), 3)
    updates, state = step(solver, PARAMS)
    assert updates == bj.BilevelParams(-3.5, -0.5)
    assert bj.counts(state) == {'gradients/upper': 3, 'gradients/lower': 3}

  @pytest.mark.parametrize('steps', [1, 3])
  def test_an_untouched_sequence_stays_none(self, steps):
    updates, _ = step(bj.repeat(HALVE_UPPER, steps), PARAMS)
    assert updates.lower is None

  def test_the_optimiser_s_state_goes_on(self):
    loss = lambda params, batch: jnp.sum(jnp.cos(params) + batch * params)
    adam = optax.chain(bj.gradient(loss), optax.adam(0.1))
    params, batch = jnp.array([0.3, 1.0]), jnp.array([1.0, -2.0])
    here, state = params, adam.init(params)
    for _ in range(4):
      updates, state = adam.update(batch, state, here)
      here = optax.apply_updates(here, updates)
    repeated, end = step(bj.repeat(adam, 4), params, batch)
    np.testing.assert_allclose(params + repeated, here, rtol=1e-6)
    chex.assert_trees_all_close(end, state, rtol=1e-6)

  @pytest.mark.parametrize('steps', [1, 3])
  @pytest.mark.parametrize('wide', [False, True])
  def test_each_step_picks_its_batch_by_an_int32(self, steps, wide):
    kinds = []

    def batch_at(batch, t):
      kinds.append(t.dtype)
      return batch[t]

    with jax.enable_x64(wide):
      solver = bj.repeat(add_batch(), steps, batch_at)
      batch = jnp.array([1.0, 20.0, 300.0], jnp.float32)
      updates, _ = step(solver, jnp.float32(0.0), batch)
    assert updates == [0, 1, 21, 321][steps]
    assert set(kinds) == {jnp.dtype('int32')}

  def test_passes_extra_arguments(self):
    part = optax.chain(add_batch(), scale_by_argument())
    updates, _ = step(bj.repeat(part, 2), 0.0, jnp.float32(3.0), scale=2.0)
    assert updates == 12.0

  @pytest.mark.parametrize('steps', [0, -1, 1.5, True, '3'])
  def test_takes_a_whole_number_of_steps(self, steps):
    with pytest.raises(ValueError, match=f'whole number .* got {steps}'):
      bj.repeat(HALVE_UPPER, steps)


class TestAuxiliary:
  def follow(self, **kwargs):
    part = descend(lambda p, batch: (p.lower - p.mean) ** 2 / 2, 'mean', 0.5)
    return bj.auxiliary(part, mean=lambda params: params.lower, **kwargs)

  def test_persists(self):
    solver = self.follow()
    state = solver.init(PARAMS)
    params = PARAMS._replace(lower=jnp.float32(5.0))
    for expected in (3.0, 4.0):
      updates, state = solver.update(None, state, params)
      assert bj.auxiliaries(state) == {'mean': expected}
    assert updates == bj.BilevelParams(None, None)

  def test_restarts(self):
    solver = self.follow(restart=('mean',))
    state = solver.init(PARAMS)
    params = PARAMS._replace(lower=jnp.float32(5.0))
    _, state = solver.update(None, state, params)
    assert bj.auxiliaries(state) == {'mean': 5.0}

  def test_is_a_copy(self):
    state = self.follow().init(PARAMS)
    ours = state.sequences['mean'].unsafe_buffer_pointer()
    assert ours != PARAMS.lower.unsafe_buffer_pointer()

  def test_nests(self):
    outer = bj.auxiliary(self.follow(), other=lambda params: params.upper)
    found = bj.auxiliaries(outer.init(PARAMS))
    assert found == {'other': 4.0, 'mean': 1.0}

  def test_restart_of_another_name(self):
    with pytest.raises(ValueError, match=r"'valeu'.*\['mean'\]"):
      self.follow(restart=('valeu',))

  def test_a_name_that_params_have(self):
    solver = bj.auxiliary(HALVE_UPPER, lower=lambda params: params.lower)
    with pytest.raises(ValueError, match=r"already.*\['lower'\]"):
      solver.init(PARAMS)

  def test_params_without_names(self):
    solver, params = self.follow(), {'lower': jnp.float32(1.0)}
    with pytest.raises(TypeError, match=r'auxiliary works on named .* dict'):
      solver.init(params)
    with pytest.raises(TypeError, match=r'auxiliary works on named .* dict'):
      solver.update(None, solver.init(PARAMS), params)

  def test_passes_extra_arguments(self):
    part = optax.chain(HALVE_UPPER, scale_by_argument())
    solver = bj.auxiliary(part, mean=lambda params: params.lower)
    updates, _ = step(solver, PARAMS, scale=3.0)
    assert updates == bj.BilevelParams(-6.0, None)


class TestPerSequence:
  LINK = bj.per_sequence(upper=optax.sgd(0.5), lower=optax.adam(0.1))

  def test_each_has_its_own_optimiser(self):
    updates, _ = step(self.LINK, PARAMS, bj.BilevelParams(*[jnp.ones([])] * 2))
    chex.assert_trees_all_close(
      updates, bj.BilevelParams(-0.5, -0.1), rtol=1e-5
    )

  def test_no_gradient_leaves_update_and_state_alone(self):
    gradients = bj.BilevelParams(jnp.float32(1.0), None)
    before = self.LINK.init(PARAMS)
    updates, state = step(self.LINK, PARAMS, gradients)
    assert updates.lower is None
    chex.assert_trees_all_equal(state['lower'], before['lower'])

  def test_the_state_given_is_not_changed(self):
    before = self.LINK.init(PARAMS)
    kept = dict(before)
    self.LINK.update(bj.BilevelParams(*PARAMS), before, PARAMS)
    assert all(before[name] is kept[name] for name in kept)

  def test_weight_decay_gets_the_parameters(self):
    link = bj.per_sequence(upper=optax.add_decayed_weights(0.5))
    gradients = bj.BilevelParams(jnp.float32(0.0), None)
    assert step(link, PARAMS, gradients)[0].upper == 2.0

  def test_passes_extra_arguments(self):
    link = bj.per_sequence(upper=scale_by_argument())
    gradients = bj.BilevelParams(jnp.float32(2.0), None)
    assert step(link, PARAMS, gradients, scale=3.0)[0].upper == 6.0

  def test_a_gradient_without_optimiser(self):
    link = bj.per_sequence(upper=optax.sgd(1.0))
    with pytest.raises(ValueError, match=r'lower has a gradient but no opt'):
      step(link, PARAMS, PARAMS)

  def test_an_optimiser_of_no_sequence(self):
    with pytest.raises(TypeError, match=r'per_sequence works on.*middle'):
      bj.per_sequence(middle=optax.sgd(1.0)).init(PARAMS)

  def test_a_jacobian_names_the_aggregators(self):
    with pytest.raises(TypeError, match=r'per_sequence.*scale_by_penalty'):
      step(self.LINK, PARAMS, bj.Jacobian(PARAMS))

  def test_without_params(self):
    with pytest.raises(TypeError, match='per_sequence needs the parameters'):
      self.LINK.update(PARAMS, self.LINK.init(PARAMS))
