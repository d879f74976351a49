"""What `descend` means: against loops in NumPy, in sets, and its errors."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests import contract, problems
from tests.contract import INNER, PENALISED, PROBLEM, X_SET, Y_SET, Row

S = bj.Sequence
Joint, Lazy, Relaxed = (
  bj.projections.Joint,
  bj.projections.Lazy,
  bj.projections.Relaxed,
)


def _whole(wrap, penalty, rate):
  """All that a record says, at once."""
  sgd = optax.sgd(rate)
  solver = bj.descend(
    bj.lower_gradient(PROBLEM, of='value'),
    bj.lower_gradient(PROBLEM),
    bj.value_gap(PROBLEM, penalty=penalty),
    upper=S(optax.sgd(rate, momentum=0.5), set=X_SET),
    lower=S(sgd, set=Y_SET),
    value=S(
      optax.sgd(rate, momentum=0.9),
      steps=INNER,
      batch_at=contract.inner_batch,
      start=lambda params: params.lower,
      restart=True,
    ),
  )
  return bj.evaluation.wrapped(solver, wrap)


def _line(right=0.5):
  rows = np.zeros((1, contract.COORDINATES))
  rows[0, :3] = [1.0, -1.0, 0.5]
  return bj.projections.affine_set(rows, [right])


def _in_a_set(kept):
  """Descent of both variables along the upper loss, one in a set."""

  def make(wrap, rate):
    loss = lambda p, batch: contract.upper_loss(p.upper, p.lower, batch)
    oracle = bj.gradient(loss, of=('upper', 'lower'))
    upper = S(optax.sgd(rate), set=kept())
    solver = bj.descend(oracle, upper=upper, lower=optax.sgd(rate))
    return bj.evaluation.wrapped(solver, wrap)

  return make


def _same(both):
  """The nearest pair of which both are the same."""
  x, y = both
  mean = (x['a'] + y['b']) / 2
  return {'a': mean}, {'b': mean}


_COST = {'gradients/loss': 1}

ROWS = (
  Row(
    'descend',
    _whole,
    {
      'gradients/upper': 1,
      'gradients/lower': 3 + INNER,
      'projections/upper': 1,
      'projections/lower': 2,
    },
    hyper=PENALISED,
    sets={'upper': X_SET, 'lower': Y_SET},
    devices=True,
  ),
  Row(
    'Lazy',
    _in_a_set(lambda: Lazy(_line(), 0.5, key=jax.random.key(3))),
    _COST,
    random_counts=('projections/upper',),
  ),
  Row(
    'Relaxed',
    _in_a_set(lambda: Relaxed(_line(), 1.5)),
    _COST | {'projections/upper': 1},
    sets={'upper': _line()},
    spacings=8,
    light=True,
  ),
  Row(
    'Joint',
    _in_a_set(lambda: Joint(_same, ('lower',))),
    _COST | {'projections/upper+lower': 1},
    light=True,
  ),
)


# The meaning of order and records, once more, as loops in NumPy.


class Record(NamedTuple):
  """A `Sequence` of momentum descent."""

  rate: Any
  momentum: float = 0.0
  set: Any = None
  steps: int = 1
  batch_at: Any = None
  start: Any = None
  restart: bool = False


class Sloped(NamedTuple):
  """A coupled set `y = x + offset` on the line; not a library's set."""

  offset: float


def by_hand(oracles, records, params, batches):
  """Iterates, losses and how often each oracle was evaluated, by update."""
  z, out = {n: np.array(p) for n, p in params.items()}, []
  moments = {n: 0.0 for n in records}
  for n, r in records.items():
    if r.start is not None and n not in z:
      z[n] = r.start(z)
  for k, batch in enumerate(batches):
    given = dict(z)
    for n, r in records.items():
      if r.restart:
        z[n], moments[n] = r.start(given), 0.0
    losses = []
    for oracle in oracles:
      names = oracle(z, batch)[1]
      before = dict(z)
      steps = max(records[n].steps for n in names)
      for t in range(steps):
        moving = [n for n in names if records[n].steps == steps]
        (at,) = {records[n].batch_at for n in moving}
        loss, slopes = oracle(z, batch if at is None else at(batch, t))
        if t == steps - 1:
          moving = list(names)
        old = dict(z)
        for n in moving:
          moments[n] = records[n].momentum * moments[n] + slopes[n]
          z[n] = old[n] - records[n].rate(k) * moments[n]
        for n in sorted(
          moving, key=lambda n: isinstance(records[n].set, Sloped)
        ):
          kept = records[n].set
          if isinstance(kept, Sloped):
            z[n] = z['upper'] + kept.offset
          elif callable(kept):
            z[n] = kept(z[n])
      for n in names:
        if isinstance(records[n].set, tuple) and records[n].set[0] == 'relaxed':
          _, project, factor = records[n].set
          z[n] = project(before[n] + factor(k) * (z[n] - before[n]))
      losses.append(loss)
    out.append((dict(z), losses))
  return out


def slopes_of(names, matrix):
  """An oracle of some sequences: a loss that couples all, its slopes in some.

  It is the same function for NumPy and for JAX.
  """

  def oracle(z, batch):
    at = [z[n] for n in sorted(z)]
    target = batch.mean(0) if batch.ndim == 2 else batch
    total = sum(w * p for w, p in zip(matrix, at)) - target
    loss = (total**2).sum() / 2
    return loss, {
      n: matrix[sorted(z).index(n)] * total + 0.1 * z[n] ** 3 for n in names
    }

  return oracle


def as_oracle(fn, names, declared):
  """The same as an oracle of the library, which says what it moves or not."""

  def evaluate(params, batch, inner):
    loss, slopes = fn(params._asdict(), batch)
    empty = dict.fromkeys(params._fields)
    return (loss,), type(params)(**empty | slopes), inner

  moves = names if declared else None
  cost = {f'gradients/{"+".join(names)}': 1}
  return bj.oracle(evaluate, ('+'.join(names),), counts=cost, moves=moves)


def as_record(record):
  kept = record.set
  if isinstance(kept, Sloped):
    # y - x = offset, as equations whose right-hand side is c - h(x).
    kept = bj.projections.affine_set(
      np.eye(2), np.full(2, kept.offset), coupling=lambda x: -x
    )
  elif isinstance(kept, tuple):
    kept = Relaxed(kept[1], kept[2])
  start = record.start
  return S(
    optax.sgd(record.rate, momentum=record.momentum or None),
    set=kept,
    steps=record.steps,
    batch_at=record.batch_at,
    start=start and (lambda params: start(params._asdict())),
    restart=record.restart,
  )


FALLS = lambda k: 0.2 / (1 + k)
STEADY = lambda k: 0.1
PART = lambda batch, t: batch[t]
AT_LOWER = lambda z: z['lower'] * 1.0
BOX = lambda z: z.clip(-0.3, 0.25)

# By name: the sequences of each oracle in turn, and the records.
CASES = {
  'in turn': (
    [('lower',), ('upper',)],
    {'upper': Record(FALLS), 'lower': Record(STEADY, 0.9)},
  ),
  'the other turn': (
    [('upper',), ('lower',)],
    {'upper': Record(FALLS), 'lower': Record(STEADY, 0.9)},
  ),
  'from one point': (
    [('upper', 'lower')],
    {'upper': Record(FALLS), 'lower': Record(STEADY, 0.9, set=BOX)},
  ),
  'one sequence twice': (
    [('lower',), ('lower', 'upper')],
    {'upper': Record(STEADY), 'lower': Record(FALLS, 0.5)},
  ),
  'inner steps': (
    [('lower',), ('upper',)],
    {
      'upper': Record(FALLS),
      'lower': Record(FALLS, 0.9, steps=3, batch_at=PART, set=BOX),
    },
  ),
  'one with steps, the other moves in the last of them': (
    [('upper', 'lower')],
    {
      'upper': Record(FALLS, 0.5),
      'lower': Record(STEADY, steps=3, batch_at=PART),
    },
  ),
  'an added sequence goes on': (
    [('value',), ('upper', 'lower')],
    {
      'upper': Record(STEADY),
      'lower': Record(STEADY),
      'value': Record(FALLS, 0.9, steps=2, start=AT_LOWER),
    },
  ),
  'an added sequence begins anew': (
    [('value',), ('upper', 'lower')],
    {
      'upper': Record(STEADY),
      'lower': Record(STEADY),
      'value': Record(FALLS, 0.9, steps=2, start=AT_LOWER, restart=True),
    },
  ),
  'a variable begins anew': (
    [('lower',), ('upper',)],
    {
      'upper': Record(STEADY),
      'lower': Record(
        FALLS, 0.9, steps=2, start=lambda z: 0 * z['lower'], restart=True
      ),
    },
  ),
  'relaxed after all steps': (
    [('lower',), ('upper',)],
    {
      'lower': Record(STEADY),
      'upper': Record(
        STEADY, 0.5, steps=3, set=('relaxed', BOX, lambda k: 1.5 + k)
      ),
    },
  ),
  'a coupled set': (
    [('upper', 'lower')],
    {
      'upper': Record(STEADY, set=BOX),
      'lower': Record(STEADY, set=Sloped(0.5)),
    },
  ),
}
MATRIX = np.array([0.8, -0.5, 0.6])
PARAMS = {'upper': np.array([0.4, -0.6]), 'lower': np.array([-0.2, 0.7])}


@pytest.mark.parametrize('declared', [True, False])
def test_is_the_loops_by_hand(x64, declared):
  batches = np.random.default_rng(0).normal(size=(3, 3, 2))
  ours = {}

  @jax.jit
  def all_cases():
    for name, (groups, records) in CASES.items():
      solver = bj.descend(
        *(as_oracle(slopes_of(g, MATRIX), g, declared) for g in groups),
        **{n: as_record(r) for n, r in records.items()},
      )
      params = bj.sequences(**jax.tree.map(jnp.asarray, PARAMS))
      state, points = solver.init(params), []
      for batch in map(jnp.asarray, batches):
        updates, state = solver.update(batch, state, params)
        params = bj.apply_updates(params, updates)
        point = params._asdict() | bj.auxiliaries(state)
        points.append((point, bj.values(state), bj.counts(state)))
      ours[name] = points
    return ours

  found = all_cases()
  for name, (groups, records) in CASES.items():
    oracles = [slopes_of(g, MATRIX) for g in groups]
    expected = by_hand(oracles, records, PARAMS, batches)
    for k, ((point, losses), (ours, values, counts)) in enumerate(
      zip(expected, found[name])
    ):
      for n, z in point.items():
        np.testing.assert_allclose(
          ours[n], z, rtol=1e-12, atol=1e-14, err_msg=f'{name}, {n}, {k}'
        )
      for group, loss in zip(groups, losses):
        # Measured at the last evaluation, not at all of them.
        np.testing.assert_allclose(values['+'.join(group)], loss, rtol=1e-12)
        steps = max(records[n].steps for n in group)
        assert counts[f'gradients/{"+".join(group)}'] == steps * (k + 1)


def test_a_schedule_counts_updates_and_a_moment_counts_steps():
  """Four optimisers in loops of three steps, against constant rates."""
  falls = lambda k: 0.2 / (1 + k)
  loss = lambda p, batch: jnp.sum((p.z - batch) ** 2) / 2
  makers = {
    'plain': optax.sgd,
    'injected': lambda rate: optax.inject_hyperparams(optax.sgd)(rate),
    'chained': lambda rate: optax.chain(
      optax.clip(9.0), optax.masked(optax.sgd(rate, momentum=0.5), True)
    ),
    'adam': optax.adam,
  }

  def run(make, rate_of):
    params = bj.sequences(z=jnp.array([1.0, -2.0]))
    state, points = None, []
    for k in range(3):
      record = S(make(rate_of(k)), steps=3)
      solver = bj.descend(bj.gradient(loss, of='z'), z=record)
      state = solver.init(params) if state is None else state
      updates, state = solver.update(jnp.float32(0.5), state, params)
      params = bj.apply_updates(params, updates)
      points.append(params.z)
    return points, state

  @jax.jit
  def all_of_them():
    # A rate that the update's number picks, as a schedule that is constant.
    return {
      name: (
        run(make, lambda k: falls),
        run(make, lambda k: lambda count: falls(k)),
      )
      for name, make in makers.items()
    }

  for name, ((ours, state), (theirs, _)) in all_of_them().items():
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, err_msg=name)
    if name == 'adam':
      adam, schedule = state.optimisers['z']
      assert adam.count == 9 and schedule.count == 3


def test_a_schedule_of_a_sequence_that_two_oracles_move():
  falls = lambda k: 1.0 / (1 + k)
  one = bj.gradient(lambda p, b: p.z, of='z', name='one')
  two = bj.gradient(lambda p, b: 10 * p.z, of='z', name='two')
  kept = Lazy(lambda z: z, lambda k: 1.0 * (k < 1), key=0)
  solver = bj.descend(one, two, z=S(optax.sgd(falls), set=kept))
  params = bj.sequences(z=jnp.float32(0.0))
  state, step = solver.init(params), jax.jit(solver.update)
  for k in range(3):
    updates, state = step(None, state, params)
    np.testing.assert_allclose(updates.z, -11 / (1 + k), rtol=1e-6)
    # Both of the first update's settlings see the count 0, the others not.
    assert bj.counts(state)['projections/z'] == 2


# A lower set that moves with x, beside a set of x.
ROWS_OF_A = np.array([[1.0, 0.5, -1.0], [0.2, -1.0, 0.3]])
COUPLING = np.array([[0.5, 1.0], [-1.0, 0.4]])
RIGHT = np.array([0.4, -0.2])


def coupled_set():
  return bj.projections.affine_set(
    ROWS_OF_A, RIGHT, coupling=lambda x: COUPLING.astype(x.dtype) @ x
  )


COUPLED = bj.BilevelProblem(
  upper=lambda x, y, batch: ((y - 1) ** 2).sum() + ((x - 2) ** 2).sum(),
  lower=lambda x, y, batch: ((y - x.sum()) ** 2).sum() + (y**4).sum() / 8,
)


def small_box(x):
  return jnp.clip(x, -0.3, 0.3)


@pytest.mark.parametrize('lazily', [False, True])
def test_a_coupled_set_is_met_at_the_upper_variable_inside_its_own_set(lazily):
  """|A y + h(x) - c| after each update of methods that move x and y at once."""
  below = coupled_set()
  if lazily:
    below = Lazy(below, 1.0, key=0)
  upper = S(optax.sgd(0.1), set=small_box)
  lower = S(optax.sgd(0.1), set=below)
  params = bj.BilevelParams(jnp.array([0.2, -0.1]), jnp.zeros(3))
  given = {'penalty': 3.0, 'upper': upper, 'lower': lower}
  for solver in (
    bj.v_pbgd(COUPLED, value=optax.sgd(0.1), **given),
    bj.f2sa(COUPLED, value=S(optax.sgd(0.1)), **given),
  ):
    state = solver.init(params)

    def body(carry, _, solver=solver):
      params, state = carry
      updates, state = solver.update(None, state, params)
      params = bj.apply_updates(params, updates)
      return (params, state), params

    _, path = jax.jit(lambda c, body=body: jax.lax.scan(body, c, length=30))(
      (params, state)
    )
    x, y = np.asarray(path.upper), np.asarray(path.lower)
    off = y @ ROWS_OF_A.T + x @ COUPLING.T - RIGHT
    assert np.abs(off).max() <= 1e-6
    assert np.abs(x - np.asarray(small_box(x))).max() <= 1e-7
    assert np.abs(x).max() > 0.29  # Its set is felt.


def test_a_joint_set_projects_the_pair():
  """The pairs with a + b = 1: what one gives, the other takes."""

  def balance(both):
    a, b = both
    excess = (a + b - 1) / 2
    return a - excess, b - excess

  loss = lambda p, batch: (p.a - 3) ** 2 / 2 + (p.b - 2) ** 2
  for owner, other in (('a', 'b'), ('b', 'a')):
    # The tuple has the owner first; this set does not mind.
    sets = {owner: Joint(balance, (other,))}
    solver = bj.descend(
      bj.gradient(loss, of=('a', 'b')),
      **{n: S(optax.sgd(0.2), set=sets.get(n)) for n in ('a', 'b')},
    )
    params = bj.sequences(a=jnp.float32(0.0), b=jnp.float32(0.0))
    state, step = solver.init(params), jax.jit(solver.update)
    for _ in range(60):
      updates, state = step(None, state, params)
      params = bj.apply_updates(params, updates)
      np.testing.assert_allclose(params.a + params.b, 1, atol=1e-6)
    # a - 3 = 2 (b - 2) and a + b = 1.
    np.testing.assert_allclose([params.a, params.b], [1 / 3, 2 / 3], atol=1e-5)


# Errors: each names its cause and its mend.


def two_losses(oracle=None, **records):
  oracle = oracle or bj.gradient(
    lambda p, batch: p.upper**2 + p.lower**2, of=('upper', 'lower')
  )
  return bj.descend(oracle, **records)


SGD = optax.sgd(0.1)
VALUE = S(SGD, start=lambda p: p.lower)
# What is wrong, the error, and words of its sentence; raised when a solver is
# made, at init or at the call.
ERRORS = {
  'no oracle': (lambda: bj.descend(upper=SGD), ValueError, 'at least one'),
  'a number for an optimiser': (
    lambda: two_losses(upper=0.1, lower=SGD),
    TypeError,
    r'upper takes an optax optimiser .*, got float: .*sgd\(0\.1\)',
  ),
  'no optimiser in a record': (
    lambda: two_losses(upper=S(None), lower=SGD),
    TypeError,
    'bj.Sequence takes an optax optimiser, got NoneType',
  ),
  'an optimiser of several steps': (
    lambda: two_losses(upper=optax.MultiSteps(SGD, 2), lower=SGD),
    TypeError,
    r'got MultiSteps: write .*\.gradient_transformation\(\)',
  ),
  'a start that is an array': (
    lambda: two_losses(upper=SGD, lower=S(SGD, start=jnp.zeros(2))),
    TypeError,
    'start of a bj.Sequence is a function, .*lambda params',
  ),
  'a batch for a function of batches': (
    lambda: two_losses(upper=S(SGD, steps=2, batch_at=3), lower=SGD),
    TypeError,
    'batch_at of a bj.Sequence is a function, .* lambda batch, t.*got int',
  ),
  'a word for a boolean': (
    lambda: two_losses(upper=SGD, lower=S(SGD, restart='yes')),
    TypeError,
    "restart of a bj.Sequence is True or False, got 'yes'",
  ),
  'no steps': (
    lambda: two_losses(upper=S(SGD, steps=0), lower=SGD),
    ValueError,
    'bj.Sequence takes a whole number of steps >= 1, got 0',
  ),
  'a missing record': (
    lambda: two_losses(upper=SGD),
    ValueError,
    r'lower has a gradient but no optimiser: give lower=\..*set_to_zero',
  ),
  'a missing sequence': (
    lambda: two_losses(upper=SGD, lower=SGD, value=SGD),
    ValueError,
    'sequence value is not among .*: correct its name, or give its record',
  ),
  'a start of what is there': (
    lambda: two_losses(upper=SGD, lower=VALUE),
    ValueError,
    'already have the sequence lower: .* leave out its start',
  ),
  'a restart without a start': (
    lambda: two_losses(upper=SGD, lower=S(SGD, restart=True)),
    ValueError,
    'sequence lower has restart=True but no start: give',
  ),
  'a line search': (
    lambda: two_losses(upper=SGD, lower=optax.lbfgs()),
    TypeError,
    r'optimiser of lower .* line searches.*optax\.adam',
  ),
  'no aggregator': (
    lambda: two_losses(
      bj.value_gap(problems.QUADRATIC), upper=SGD, lower=SGD, value=VALUE
    ),
    TypeError,
    r'got a Jacobian .*put an aggregator between .*scale_by_penalty',
  ),
  'loops of other lengths': (
    lambda: two_losses(upper=S(SGD, steps=2), lower=S(SGD, steps=3)),
    ValueError,
    'sequences upper, lower, but they take 2, 3 steps: .* the same number',
  ),
  'loops on other batches': (
    lambda: two_losses(
      upper=S(SGD, steps=2, batch_at=lambda b, t: b),
      lower=S(SGD, steps=2, batch_at=lambda b, t: b),
    ),
    ValueError,
    'batch_at differ: define one function and give it to upper, lower',
  ),
  'a batch of a single step': (
    lambda: two_losses(
      upper=S(SGD, batch_at=lambda b, t: b), lower=S(SGD, steps=2)
    ),
    ValueError,
    'batch_at differ: .* give it to lower. .* fewer than 2 steps may leave',
  ),
  'a set that is no function': (
    lambda: two_losses(upper=S(SGD, set=3.0), lower=SGD),
    TypeError,
    'set of a bj.Sequence is a projection, .* got 3.0',
  ),
  'a joint set with a missing sequence': (
    lambda: two_losses(
      upper=S(SGD, set=Joint(lambda z: z, ('dual',))), lower=SGD
    ),
    TypeError,
    'a joint set works on the sequences upper, dual',
  ),
  'a relaxation below one': (
    lambda: two_losses(upper=S(SGD, set=Relaxed(None, 0.5)), lower=SGD),
    ValueError,
    'Relaxed: the factor is a finite number >= 1, got 0.5',
  ),
  'a probability of zero': (
    lambda: two_losses(
      upper=S(SGD, set=Lazy(small_box, 0.0, key=0)), lower=SGD
    ),
    ValueError,
    r'Lazy: the probability is in \(0, 1\], got 0',
  ),
  'a coin without a key': (
    lambda: two_losses(
      upper=S(SGD, set=Lazy(small_box, 0.5, key=None)), lower=SGD
    ),
    TypeError,
    'Lazy draws random numbers: pass key=',
  ),
}


@pytest.mark.parametrize('case', ERRORS)
def test_an_error_names_its_cause_and_its_mend(case):
  make, error, words = ERRORS[case]
  params = bj.BilevelParams(jnp.float32(1.0), jnp.float32(2.0))
  with pytest.raises(error, match=words):
    solver = make()
    solver.update(None, solver.init(params), params)


def test_parameters_without_names():
  solver = two_losses(upper=SGD, lower=SGD)
  with pytest.raises(TypeError, match=r'descend works on named seq.*make them'):
    solver.init({'upper': jnp.zeros(2)})


def test_what_no_oracle_moves_stays_without_an_update():
  solver = bj.descend(
    bj.gradient(lambda p, b: p.upper**2, of='upper'), upper=SGD
  )
  params = bj.BilevelParams(jnp.float32(1.0), jnp.float32(2.0))
  updates, _ = solver.update(None, solver.init(params), params)
  assert updates.lower is None
  np.testing.assert_allclose(updates.upper, -0.2, rtol=1e-6)


@pytest.mark.parametrize(
  ('given', 'says'),
  [
    ('state', 'state of a solver: call solver.update'),
    ('dict', 'as its targets'),
    ('whole', 'as a float, for instance 0.0'),
    ('swapped', 'the batch is a BilevelParams, .* in this order'),
  ],
)
def test_parameters_of_a_newcomer(given, says):
  solver = bj.v_pbgd(PROBLEM, penalty=1.0, upper=SGD, lower=SGD, value=SGD)
  params = bj.BilevelParams(jnp.zeros(2), jnp.zeros(2))
  state = solver.init(params)
  wrong = {
    'state': state,
    'dict': params._asdict(),
    'whole': params._replace(upper=0),
    'swapped': jnp.zeros(3),
  }[given]
  with pytest.raises(TypeError, match=says):
    if given == 'whole':
      solver.init(wrong)
    else:
      batch = params if given == 'swapped' else None
      solver.update(batch, state, wrong)


def test_the_first_state_compiles_no_more_than_a_copy():
  """Numbers that are zero come from the host; a program takes 20 ms or more."""
  compiled = []
  event = '/jax/core/compile/backend_compile_duration'
  count = lambda name, seconds, **about: (
    compiled.append(about) if name == event else None
  )
  params = bj.BilevelParams(jnp.ones(3), jnp.zeros(3))
  loss = lambda x, y, batch: jnp.sum((y - x) ** 2)
  sgd = optax.sgd(0.1)
  solver = bj.v_pbgd(
    bj.BilevelProblem(loss, loss), penalty=10.0, upper=sgd, lower=sgd
  )
  jax.clear_caches()
  jax.monitoring.register_event_duration_secs_listener(count)
  try:
    jax.block_until_ready(solver.init(params))
  finally:
    jax.monitoring.unregister_event_duration_listener(count)
  assert len(compiled) <= 1, len(compiled)
