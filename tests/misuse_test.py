"""Wrong uses of a solver end in one sentence."""

import re

import jax
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


_names_types = pytest.mark.skipif(
  jax.__version_info__ < (0, 10, 2),
  reason='errors of older versions of jax do not name types of pytrees',
)


@_names_types
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


@_names_types
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


LOWER = bj.lower_gradient(PROBLEM)
HISTORY = [{'upper': 1.0, 'lower': 1.0, 'gap': 0.1}] * 9
# A mistake at the construction of a part, and words of the error.
CONSTRUCTIONS = {
  'an optimiser for an oracle': (
    lambda: bj.descend(SGD, lower=SGD),
    r'expected an oracle.*got an optimiser of optax: write bj.descend\(oracle',
  ),
  'an optimiser after an oracle': (
    lambda: bj.descend(LOWER, optax.adam(0.1)),
    'expected an oracle.*got an optimiser of optax',
  ),
  'a chain of optimisers': (
    lambda: bj.descend(optax.chain(optax.clip(1.0), SGD), lower=SGD),
    'got an optimiser of optax',
  ),
  'a solver for an oracle': (
    lambda: bj.descend(CASES['descend']()[0], lower=SGD),
    'expected an oracle.*got Solver',
  ),
  'an oracle for an optimiser': (
    lambda: bj.descend(LOWER, lower=LOWER),
    'lower takes an optax optimiser.*got Oracle: oracles are the positional',
  ),
  'no record': (
    lambda: bj.descend(LOWER),
    'lower has a gradient but no optimiser: give lower=',
  ),
  'a step for an optimiser': (
    lambda: bj.Sequence(0.1),
    r'bj.Sequence takes an optax optimiser, got float: .*optax.sgd\(0.1\)',
  ),
  'no steps': (
    lambda: bj.Sequence(SGD, steps=0),
    'bj.Sequence takes a whole number of steps >= 1, got 0',
  ),
  'steps in the place of the set': (
    lambda: bj.Sequence(SGD, 10),
    'set of a bj.Sequence is a projection.* got 10; .* steps=',
  ),
  'bounds for a set': (
    lambda: bj.Sequence(SGD, set=(0, 1)),
    r'set of a bj.Sequence is a projection.* got \(0, 1\)',
  ),
  'a number for a loss': (
    lambda: bj.lower_gradient(bj.BilevelProblem(PROBLEM.upper, 3.0)),
    r'the lower loss is a function of \(x, y, batch\), got float',
  ),
  'a loss without a batch': (
    lambda: bj.lower_gradient(bj.BilevelProblem(lambda x, y: y, lambda p: p)),
    r'the upper loss is a function of \(x, y, batch\), got one of \(x, y\)',
  ),
  'a problem for a loss': (
    lambda: bj.gradient(PROBLEM),
    r'the loss is a function of \(params, batch\), got BilevelProblem',
  ),
  'objectives of one argument': (
    lambda: bj.multi_objective(lambda p: p, 2),
    r'a loss is a function of \(params, batch\), got one of \(p\)',
  ),
  'numbers for objectives': (
    lambda: bj.multi_objective([1.0, 2.0]),
    'each loss is a function of .*, got float',
  ),
  'a list of increments': (
    lambda: bj.stsa([lambda z, b: z.x], steps=0.1),
    'stsa takes a dict from names .* got list',
  ),
  'a number for an increment': (
    lambda: bj.stsa({'x': 1.0}, steps=0.1),
    r'the increment of x is a function of \(params, batch\), got float',
  ),
  'a word for a step': (
    lambda: bj.stsa({'x': lambda z, b: z.x}, steps='0.1'),
    "the step of x is a weight >= 0.*got '0.1'",
  ),
  'an optimiser that is not called': (
    lambda: bj.stsa({'x': lambda z, b: z.x}, steps=optax.sgd),
    'the step of x is a weight >= 0.*from the schedule',
  ),
  'a word for a linear solver': (
    lambda: bj.aid_bilevel(PROBLEM, upper=SGD, lower=SGD, solve='cg'),
    "a linear solver is a function, got 'cg'",
  ),
  'a linear solver that is not called': (
    lambda: bj.implicit(PROBLEM, solve=bj.linear_solvers.neumann),
    r'a linear solver is a function, got .*conjugate_gradient\(10\)',
  ),
  'numbers for a history': (
    lambda: bj.diagnose([1.0, 2.0]),
    r'reads a history.*got list of float: call history.append\(bj.values',
  ),
  'a state for a history': (
    lambda: bj.diagnose(CASES['descend']()[0].init(NESTED)),
    'reads a history.*got DescendState',
  ),
  'words in a history': (
    lambda: bj.diagnose({'upper': ['a'] * 9}),
    'reads a history.*got other values',
  ),
  'histories of two lengths': (
    lambda: bj.diagnose({'upper': [1.0] * 9, 'lower': [1.0] * 8}),
    r'of one length by name; got shapes \[\(8,\), \(9,\)\]',
  ),
  'params before the problem': (
    lambda: bj.diagnose(HISTORY, NESTED, PROBLEM),
    'the problem is a bj.BilevelProblem.*got BilevelParams',
  ),
  'a list of params': (
    lambda: bj.diagnostics.lower_minimiser(PROBLEM, [0.0, 0.0]),
    'lower_minimiser works on the sequences upper, lower.*are list',
  ),
  'params before the problem in suggest': (
    lambda: bj.suggest(NESTED, PROBLEM, key=0, gap=1.0),
    'the problem is a bj.BilevelProblem.*got BilevelParams',
  ),
}


@pytest.mark.parametrize('case', CONSTRUCTIONS)
def test_a_mistake_is_named_at_construction(case):
  make, words = CONSTRUCTIONS[case]
  with pytest.raises((TypeError, ValueError), match=words):
    make()


def _updated(params=NESTED, batch=None, state=None):
  solver, _, _ = CASES['descend']()
  batch = jnp.ones(2) if batch is None else batch
  return solver.update(batch, state or solver.init(params), params)


CALLS = {
  'updates and state swapped': (
    lambda: bj.apply_updates(NESTED, _updated()[1]),
    r'the updates are the state.*write updates, state = solver.update\(batch',
  ),
  'both results as updates': (
    lambda: bj.apply_updates(NESTED, _updated()),
    'the updates are the state of a solver',
  ),
  'the state of an optimiser': (
    lambda: _updated(state=SGD.init(NESTED)),
    r'the state is tuple.*call state = solver.init\(params\)',
  ),
  'a problem for params': (
    lambda: CASES['descend']()[0].init(PROBLEM),
    r'leaf of the parameters \(.upper\) is function.*solver.init\(params\)',
  ),
  'float16': (
    lambda: _updated(jax.tree.map(lambda x: x.astype(jnp.float16), NESTED)),
    'is float16, in which constants of optimisers are zero.*bfloat16',
  ),
  'an optimiser before an oracle': (
    lambda: optax.chain(SGD, bj.gradient(_loss)).init(FLAT),
    r'not the first link of optax.chain.*optax.chain\(oracle, optimiser\)',
  ),
  'clipping before a solver': (
    lambda: optax.chain(optax.clip(1.0), CASES['descend']()[0]).init(NESTED),
    'earlier links would change its batch',
  ),
  'the state before the params': (
    lambda: bj.check_finite(CASES['descend']()[0].init(NESTED), NESTED),
    r'the parameters are the state.*call check_finite\(params, state\)',
  ),
  'jit of a solver': (
    lambda: jax.jit(CASES['descend']()[0]),
    r'Solver: call .init\(params\) and .update\(batch, state, params\)',
  ),
}


@pytest.mark.parametrize('case', CALLS)
def test_a_mistake_is_named_at_the_call(case):
  make, words = CALLS[case]
  with pytest.raises(TypeError, match=words):
    make()


@pytest.mark.parametrize(
  ('batch', 'given'),
  [
    (None, 'batch = None'),
    ({'a': jnp.ones((4, 2))}, r'batch = \{a: float32\[4, 2\]\}'),
    (
      {'a': jnp.ones((4, 2)), 'b': jnp.ones(3)},
      r'batch = \{a: float32\[4, 2\], b: float32\[3\]\}',
    ),
  ],
)
def test_an_error_in_a_loss_shows_what_it_was_given(batch, given):
  """A missing batch, a missing leaf, and leaves of two lengths."""
  fit = lambda x, y, batch: jnp.mean((batch['a'] @ y - batch['b']) ** 2)
  problem = bj.BilevelProblem(fit, fit)
  coupled = {'lower': lambda z, batch: -fit(z.upper, z.lower, batch)}
  losses = lambda z, batch: jnp.stack([fit(*z, batch), fit(*z, batch)])
  for solver in (
    bj.v_pbgd(problem, penalty=1.0, upper=SGD, lower=SGD),
    bj.aid_bilevel(problem, upper=SGD, lower=SGD),
    bj.descend(bj.lower_gradient(problem), lower=SGD),
    bj.stsa(coupled, steps=0.1),
    optax.chain(bj.multi_objective(losses, 2), bj.aggregators.moco(2), SGD),
  ):
    with pytest.raises((TypeError, KeyError, ValueError)) as raised:
      solver.update(batch, solver.init(NESTED), NESTED)
    (note,) = [n for n in raised.value.__notes__ if 'bilevel_jax' in n]
    assert re.search(rf'called it with .*{given}', note), note
