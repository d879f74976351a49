"""Wrong uses of a solver end in one sentence."""

import jax.numpy as jnp
import optax
import pytest

import bilevel_jax as bj

SGD = optax.sgd(0.1)
PROBLEM = bj.BilevelProblem(
  upper=lambda x, y, batch: jnp.sum((y - batch) ** 2),
  lower=lambda x, y, batch: jnp.sum((y - x) ** 2),
)
NESTED = bj.BilevelParams(jnp.zeros(2), jnp.ones(2))
FLAT = {'z': jnp.zeros(2)}


def _loss(params, batch):
  return jnp.sum((params['z'] - batch) ** 2)


def _two(params, batch):
  return jnp.stack([_loss(params, batch), _loss(params, -batch)])


def _seal():
  return bj.solvers.seal(
    lambda y, batch: _loss(y, 1.0),
    lambda y, batch: (y['z'] - 1) ** 2,
    scores=bj.solvers.RowScores(SGD, 3, lambda batch: batch),
    penalty=1.0,
    lower=SGD,
  )


# A solver, its parameters and a batch.
CASES = {
  'descend': lambda: (
    bj.v_pbgd(PROBLEM, penalty=1.0, upper=SGD, lower=SGD),
    NESTED,
    jnp.ones(2),
  ),
  'stable': lambda: (
    bj.solvers.stable(
      PROBLEM, upper=SGD, lower=SGD, decay=0.5, least_curvature=0.1
    ),
    NESTED,
    jnp.ones(2),
  ),
  'an oracle': lambda: (bj.lower_gradient(PROBLEM), NESTED, jnp.ones(2)),
  'a wrapper': lambda: (
    bj.evaluation.storm(bj.lower_gradient(PROBLEM), 0.5),
    NESTED,
    jnp.ones(2),
  ),
  'a chain': lambda: (
    optax.chain(bj.gradient(_loss), SGD),
    FLAT,
    jnp.ones(2),
  ),
  # Its batch has the structure of its parameters.
  'an array': lambda: (
    optax.chain(bj.gradient(lambda p, batch: jnp.sum((p - batch) ** 2)), SGD),
    jnp.zeros(2),
    jnp.ones(2),
  ),
  'famo': lambda: (
    bj.solvers.famo(lambda p, b: 1 + _two(p, b), 2, optimiser=SGD),
    FLAT,
    jnp.ones(2),
  ),
  'seal': lambda: (_seal(), FLAT, jnp.array([0, 2])),
}
AROUND = {
  'MultiSteps': lambda solver: optax.MultiSteps(solver, 2),
  'apply_if_finite': lambda solver: optax.apply_if_finite(solver, 3),
  'conditionally_mask': lambda solver: optax.conditionally_mask(
    solver, lambda step: step > 0
  ),
}


@pytest.mark.parametrize('name', CASES)
def test_what_reads_gradients_is_refused_around_a_solver(name):
  solver, params, _ = CASES[name]()
  for around, wrap in AROUND.items():
    for whole in (wrap(solver), wrap(optax.chain(solver, optax.identity()))):
      with pytest.raises(TypeError, match=f'optax.{around} wraps a solver'):
        whole.init(params)


def test_what_reads_gradients_goes_around_an_optimiser():
  twice = optax.MultiSteps(SGD, 2).gradient_transformation()
  finite = optax.apply_if_finite(SGD, 3)
  solver = bj.v_pbgd(PROBLEM, penalty=1.0, upper=twice, lower=finite)
  state = solver.init(NESTED)
  first, state = solver.update(jnp.ones(2), state, NESTED)
  second, state = solver.update(jnp.ones(2), state, NESTED)
  assert not first.upper.any() and second.upper.any()
  assert first.lower.any()


@pytest.mark.parametrize('name', CASES)
def test_arguments_in_another_order(name):
  solver, params, batch = CASES[name]()
  state = solver.init(params)
  order = r'solver.update\(batch, state, params\), in this order'
  with pytest.raises(TypeError, match=f'the batch is the state.*{order}'):
    solver.update(state, batch, params)
  with pytest.raises(TypeError, match=f'the parameters are the .*{order}'):
    solver.update(params, batch, state)


@pytest.mark.parametrize(
  'links', [(SGD,), (optax.adam(0.1),), (optax.clip_by_global_norm(1.0), SGD)]
)
def test_a_chain_without_an_aggregator(links):
  """The error is of JAX, as optax maps any pytree; it names what to do."""
  solver = optax.chain(bj.multi_objective(_two, 2), *links)
  state = solver.init(FLAT)
  said = r'Jacobian, gradients of several objectives: put an aggregator between'
  with pytest.raises(ValueError, match=said):
    updates, _ = solver.update(jnp.ones(2), state, FLAT)
    optax.apply_updates(FLAT, updates)


@pytest.mark.parametrize(
  'links', [(SGD,), (optax.adam(0.1),), (optax.clip_by_global_norm(1.0), SGD)]
)
def test_a_chain_without_an_aggregator_for_parameters_of_one_array(links):
  """No pytree is compared there: optax adds the Jacobian to the array."""
  losses = lambda x, batch: jnp.stack([jnp.sum(x * batch), jnp.sum(x**2)])
  solver, params = (
    optax.chain(bj.multi_objective(losses, 2), *links),
    jnp.ones(2),
  )
  state = solver.init(params)
  said = r'Jacobian, gradients of several objectives: put an aggregator between'
  with pytest.raises((TypeError, ValueError), match=said):
    updates, _ = solver.update(jnp.ones(2), state, params)
    optax.apply_updates(params, updates)


@pytest.mark.parametrize('name', ['warm_start', 'linear_batch', 'key'])
@pytest.mark.parametrize(
  'make', [bj.implicit, bj.aipod, bj.aid_bilevel, bj.e_aipod]
)
def test_a_removed_argument_names_its_replacement(make, name):
  with pytest.raises(TypeError, match=rf'no longer takes {name}=.*LinearSy'):
    make(PROBLEM, **{name: None})


@pytest.mark.parametrize(
  'solver', [n for n in bj.solvers.__all__ if n.islower()]
)
def test_each_solver_names_the_replacement_of_wrap(solver):
  if solver not in ('e_aipod_plan', 'power_schedule', 'seal_penalty'):
    with pytest.raises(TypeError, match=r'wrap=: write bj.evaluation.wrapped'):
      getattr(bj.solvers, solver)(wrap=lambda oracle: oracle)


def test_descend_names_the_replacement_of_wrap():
  with pytest.raises(TypeError, match=r'wrap=: write bj.evaluation.wrapped'):
    bj.descend(bj.gradient(lambda p, b: p), wrap=lambda oracle: oracle)


@pytest.mark.parametrize(
  'make',
  [
    lambda loss: bj.v_pbgd(loss, penalty=1.0, upper=SGD, lower=SGD),
    lambda loss: bj.solvers.pbgd_free(loss, penalty=1.0, upper=SGD, lower=SGD),
    lambda loss: bj.rhg(loss, upper=SGD, lower=SGD),
    bj.implicit,
    bj.implicit_directions,
    lambda loss: bj.diagnostics.lower_minimiser(loss, NESTED),
  ],
)
def test_a_loss_is_no_problem(make):
  with pytest.raises(TypeError, match=r'is a bj.BilevelProblem.*got function'):
    make(lambda x, y, batch: 0.0)


def test_what_is_chained_to_an_oracle():
  oracle, mgda = bj.multi_objective(_two, 2), bj.aggregators.mgda
  with pytest.raises(TypeError, match=r'got mgda: call it, mgda\(...\)'):
    bj.oracles.aggregated(oracle, mgda)
  with pytest.raises(TypeError, match='takes the oracle first'):
    bj.oracles.aggregated(mgda(2), oracle)
  with pytest.raises(TypeError, match=r'cr_mogm takes an aggregator.*got None'):
    bj.aggregators.cr_mogm(2, None)
  link = bj.aggregators.random_weights(2, key='a')
  with pytest.raises(TypeError, match="a key or a whole number, got 'a'"):
    link.init(FLAT)


@pytest.mark.parametrize('name', ['value', 'lower', 'gap'])
def test_names_that_the_oracle_measures_itself(name):
  with pytest.raises(ValueError, match=f'measures {name} itself: rename'):
    bj.oracles.multi_objective_gap(PROBLEM, [name, 'other'])


def test_former_arguments_go_into_their_records():
  def spend(**more):
    solver = bj.solvers.v_pbsgd(
      PROBLEM, penalty=1.0, upper=SGD, lower=SGD, **more
    )
    return bj.counts(solver.init(NESTED))

  with pytest.warns(DeprecationWarning, match=r'value=RandomStop\(rate=...'):
    former = spend(value_rate=0.1, inner_steps=3, key=0)
  assert former == spend(value=bj.solvers.RandomStop(0.1, 3, 0))
  with pytest.warns(DeprecationWarning, match='write minimum= instead'):
    bj.solvers.seal_penalty(0.9, decay=0.1, epoch=2, least=0.2)
  with pytest.warns(DeprecationWarning, match='is now whole_number'):
    assert bj.checks.whole('mine', 'steps', 3) == 3
