"""Each named solver against its published updates, in both precisions."""

import itertools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests.references import problem, steps
from tests.references.problem import flat, pick
from tests.references.steps import QUICKLY
from tests.tiers import first, slow_where

X, Y = np.hstack([problem.UPPER['a'], problem.UPPER['b']]), problem.LOWER
F, G = steps.Loss(problem.upper), steps.Loss(problem.lower)
LEVELS = [problem.level_0, problem.level_1, problem.level_2]
PROBLEM = bj.BilevelProblem(
  upper=lambda x, y, batch: problem.upper(flat(x), y, batch),
  lower=lambda x, y, batch: problem.lower(flat(x), y, batch),
)
SECOND = steps.Loss(problem.second_upper)
TWO = bj.BilevelProblem(
  upper=lambda x, y, batch: jnp.stack(
    [
      problem.upper(flat(x), y, batch),
      problem.second_upper(flat(x), y, batch),
    ]
  ),
  lower=PROBLEM.lower,
)
REGULAR, SINGULAR = problem.batches(), problem.batches(singular=True, seed=1)
LONG = problem.batches(lower_size=4, seed=2)
TOLERANCE = {np.float64: 1e-9, np.float32: 1e-4}


def up(k):
  """The upper step size after k updates."""
  return 0.4 / (1 + 0.3 * k)


def low(k):
  """The lower one."""
  return 0.15 / (1 + 0.2 * k)


def val(k):
  """That of a value sequence or a linear system."""
  return 0.2 / (1 + 0.4 * k)


def penalty(k):
  """Below and above one."""
  return 0.6 + 0.7 * k


def decay(k):
  """A share."""
  return 0.3 + 0.1 * k


UP, LOW, VAL = optax.sgd(up), optax.sgd(low), optax.sgd(val)
RATES = {'upper': up, 'lower': low}
BOTH = {'upper': UP, 'lower': LOW}
TWICE = bj.Sequence(LOW, steps=2, batch_at=pick)
LOOP = {'upper': UP, 'lower': bj.Sequence(LOW, steps=3, batch_at=pick)}


class Update(typing.NamedTuple):
  """What a solver shows after an update."""

  sequences: dict
  values: dict
  counts: dict


def cast(arrays, dtype):
  """Numbers of a dtype, whole numbers as they are."""
  of = lambda a: dtype if np.asarray(a).dtype.kind == 'f' else None
  return jax.tree.map(lambda a: jnp.asarray(a, of(a)), arrays)


def run(make, params, dtype, *data):
  """The updates of a solver along each sequence of batches, compiled once."""
  with jax.enable_x64(dtype == np.float64):
    solver, params = make(), cast(params, dtype)
    step = jax.jit(solver.update, compiler_options=QUICKLY)
    for batches in data:
      at, state, updates = params, solver.init(params), []
      for batch in batches:
        update, state = step(cast(batch, dtype), state, at)
        at = bj.apply_updates(at, update)
        named = at._asdict() if hasattr(at, '_fields') else {'x': at}
        named |= bj.auxiliaries(state)
        named |= weights(state)
        for leaf in jax.tree.leaves(named):
          assert leaf.dtype == dtype
        for name, z in named.items():
          named[name] = flat(z) if isinstance(z, dict) else z
        updates.append(Update(named, bj.values(state), dict(bj.counts(state))))
      yield batches, updates


def weights(state):
  """The weights of objectives, if a solver has any."""
  try:
    return {'weights': bj.diagnostics.objective_weights(state)}
  except ValueError:
    return {}


def error(update, expected):
  """The largest relative error of a sequence or a loss, and where it is."""
  errors = {'nothing': 0.0}
  losses = expected.get('losses', {})
  for kind, got, wanted in (
    ('sequence', update.sequences, expected),
    ('loss', update.values, losses),
  ):
    for name, value in wanted.items():
      if name != 'losses':
        difference = np.max(np.abs(np.asarray(got[name], np.float64) - value))
        errors[f'{kind} {name}'] = difference / max(1, np.max(np.abs(value)))
  return max((e, name) for name, e in errors.items())


def compare(updates, reference, dtype):
  """Asserts that updates and reference agree."""
  expected = list(reference)
  assert len(expected) == len(updates)
  for k, (update, wanted) in enumerate(zip(updates, expected)):
    found, name = error(update, wanted)
    assert found < TOLERANCE[dtype], (k, name, found, update, wanted)


def check(name, make, reference, *data, params=None):
  """Compares a solver with its reference; those of one word in float32 too."""
  if params is None:
    params = bj.BilevelParams(problem.UPPER, problem.LOWER)
  for dtype in (np.float64,) if ' ' in name else TOLERANCE:
    for batches, updates in run(make, params, dtype, *data):
      compare(updates, reference(batches, updates), dtype)


def box(size):
  """The box of this half width, for vectors and for leaves."""
  return lambda z: jax.tree.map(lambda a: jnp.clip(a, -size, size), z)


def np_box(size):
  """The same in NumPy."""
  return lambda z: np.clip(z, -size, size)


def joint(z):
  """The half space sum(x) + 2 sum(y) <= 0.3 of (upper, lower)."""
  x, y = z
  excess = jnp.maximum(jnp.sum(flat(x)) + 2 * jnp.sum(y) - 0.3, 0) / 11
  return jax.tree.map(lambda a: a - excess, x), y - 2 * excess


def np_joint(x, y):
  """The same of vectors."""
  excess = max(x.sum() + 2 * y.sum() - 0.3, 0) / 11
  return x - excess, y - 2 * excess


def lengths(updates, evaluations=1):
  """Random lengths: products counted, without those of the cross term."""
  products = [u.counts['hessian_vector_products/lower'] for u in updates]
  return [(n - m) // evaluations - 1 for m, n in zip([0, *products], products)]


def constant(value):
  """A schedule that is none."""
  return lambda k: value


def first_rows(batch):
  """The rows of step 0."""
  return pick(batch, 0)


def start_at(params):
  """A start of the lower variable that depends on the upper one."""
  x = flat(params.upper)
  return jnp.asarray(problem.START, x.dtype) @ x


IN_LOOP = {'steps': 3, 'pick': pick, **RATES}

CASES = {
  'v_pbgd': (
    lambda: bj.v_pbgd(
      PROBLEM, penalty=penalty, upper=UP, lower=LOW,
      value=bj.Sequence(VAL, steps=3, batch_at=pick),
    ),
    lambda b, _: steps.v_pbgd(
      F, G, X, Y, b, penalty=penalty, value=val, **IN_LOOP
    ),
  ),
  'v_pbgd in sets, restarted with momentum, in rows': (
    lambda: bj.v_pbgd(
      PROBLEM, penalty=penalty, fused=False,
      upper=bj.Sequence(UP, set=box(0.45)),
      lower=bj.Sequence(LOW, set=box(0.55)),
      value=bj.Sequence(
        optax.sgd(val, momentum=0.9), steps=3, batch_at=pick, restart=True
      ),
    ),
    lambda b, _: steps.v_pbgd(
      F, G, X, Y, b, penalty=penalty, value=val, momentum=0.9, restart=True,
      upper_set=np_box(0.45), lower_set=np_box(0.55), **IN_LOOP,
    ),
  ),
  'v_pbgd in a joint set, default value, not rescaled': (
    lambda: bj.v_pbgd(
      PROBLEM, penalty=penalty, rescale=False, lower=LOW,
      upper=bj.Sequence(UP, set=bj.projections.Joint(joint, ('lower',))),
    ),
    lambda b, _: steps.v_pbgd(
      F, G, X, Y, b, penalty=penalty, value=low, rescale=False,
      joint_set=np_joint, **RATES,
    ),
  ),
  'v_pbgd with injected step sizes': (
    lambda: bj.v_pbgd(
      PROBLEM, penalty=penalty, upper=UP, lower=LOW,
      value=bj.Sequence(
        optax.inject_hyperparams(optax.sgd)(val), steps=3, batch_at=pick
      ),
    ),
    lambda b, _: steps.v_pbgd(
      F, G, X, Y, b, penalty=penalty, value=val, **IN_LOOP
    ),
  ),
  'v_pbgd with two lower steps': (
    lambda: bj.v_pbgd(
      PROBLEM, penalty=penalty, upper=UP, value=VAL, lower=TWICE
    ),
    lambda b, _: steps.v_pbgd(
      F, G, X, Y, b, penalty=penalty, value=val, lower_steps=2, **RATES,
      lower_pick=pick,
    ),
  ),
  'v_pbgd with two lower steps, in rows': (
    lambda: bj.v_pbgd(
      PROBLEM, penalty=penalty, upper=UP, value=VAL, lower=TWICE, fused=False
    ),
    lambda b, _: steps.v_pbgd(
      F, G, X, Y, b, penalty=penalty, value=val, lower_steps=2, **RATES,
      lower_pick=pick,
    ),
  ),
  'g_pbgd': (
    lambda: bj.g_pbgd(
      PROBLEM, penalty=penalty, upper=optax.sgd(up, momentum=0.7), lower=LOW
    ),
    lambda b, _: steps.g_pbgd(
      F, G, X, Y, b, penalty=penalty, momentum=0.7, **RATES
    ),
  ),
  'prox_linear_pbgd': (
    lambda: bj.solvers.prox_linear_pbgd(
      PROBLEM, penalty=penalty, step=val, iterations=200,
    ),
    lambda b, _: steps.prox_linear_pbgd(
      F, G, X, Y, b, penalty=penalty, step=val
    ),
  ),
  'prox_linear_pbgd in sets': (
    lambda: bj.solvers.prox_linear_pbgd(
      PROBLEM, penalty=penalty, step=val, iterations=200,
      upper_set=box(0.45), lower_set=box(0.55),
    ),
    lambda b, _: steps.prox_linear_pbgd(
      F, G, X, Y, b, penalty=penalty, step=val,
      upper_set=np_box(0.45), lower_set=np_box(0.55),
    ),
  ),
  'bome': (
    lambda: bj.bome(
      PROBLEM, eta=decay, value=bj.Sequence(VAL, steps=3, batch_at=pick),
      **BOTH,
    ),
    lambda b, _: steps.bome(F, G, X, Y, b, eta=decay, value=val, **IN_LOOP),
  ),
  'bome with two lower steps': (
    lambda: bj.bome(
      PROBLEM, eta=decay, upper=UP, lower=TWICE,
      value=bj.Sequence(VAL, steps=3, batch_at=pick),
    ),
    lambda b, _: steps.bome(
      F, G, X, Y, b, eta=decay, value=val, lower_steps=2, **IN_LOOP
    ),
  ),
  'forum': (
    lambda: bj.solvers.forum(
      TWO, ('one', 'two'), rate=0.4,
      value=bj.Sequence(VAL, steps=3, batch_at=pick), **BOTH,
    ),
    lambda b, _: steps.forum(
      (F, SECOND), G, X, Y, b, rho=0.4, value=val,
      averaging=lambda k: (k + 1.0) ** -0.75, **IN_LOOP,
    ),
  ),
  'forum, not averaged': (
    lambda: bj.solvers.forum(
      TWO, ('one', 'two'), rate=1.5, averaging=1.0, value=VAL, **BOTH
    ),
    lambda b, _: steps.forum(
      (F, SECOND), G, X, Y, b, rho=1.5, value=val, steps=1,
      averaging=lambda k: 1.0, **RATES,
    ),
  ),
  'moml': (
    lambda: bj.solvers.moml(TWO, ('one', 'two'), **LOOP),
    lambda b, _: steps.moml((F, SECOND), G, X, Y, b, **IN_LOOP),
  ),
  'moml forward': (
    lambda: bj.solvers.moml(TWO, ('one', 'two'), mode='forward', **LOOP),
    lambda b, _: steps.moml((F, SECOND), G, X, Y, b, **IN_LOOP),
  ),
  'moml mixed': (
    lambda: bj.solvers.moml(TWO, ('one', 'two'), mode='mixed', **LOOP),
    lambda b, _: steps.moml((F, SECOND), G, X, Y, b, **IN_LOOP),
  ),
  'f2sa': (
    lambda: bj.f2sa(PROBLEM, penalty=penalty, value=VAL, **LOOP),
    lambda b, _: steps.f2sa(
      F, G, X, Y, b, penalty=penalty, value=val, **IN_LOOP
    ),
  ),
  'f2sa in one loop, in sets': (
    lambda: bj.f2sa(
      PROBLEM, penalty=penalty, upper=bj.Sequence(UP, set=box(0.45)),
      lower=bj.Sequence(LOW, set=box(0.55)),
    ),
    lambda b, _: steps.f2sa(
      F, G, X, Y, b, penalty=penalty, value=low, upper_set=np_box(0.45),
      lower_set=np_box(0.55), **RATES,
    ),
  ),
  'meha': (
    lambda: bj.meha(
      PROBLEM, penalty=penalty, proximity=0.8, value=VAL, **BOTH
    ),
    lambda b, _: steps.v_pbgd(
      F, G, X, Y, b, penalty=penalty, value=val, proximity=0.8, **RATES
    ),
  ),
  'rhg': (
    lambda: bj.rhg(PROBLEM, **LOOP),
    lambda b, _: steps.rhg(F, G, X, Y, b, **IN_LOOP),
  ),
  'rhg from a start, in a set, with momentum': (
    lambda: bj.rhg(
      PROBLEM, upper=UP,
      lower=bj.Sequence(
        optax.sgd(low, momentum=0.9), steps=3, batch_at=pick, set=box(0.3),
        start=start_at, restart=True,
      ),
    ),
    lambda b, _: steps.rhg(
      F, G, X, Y, b, momentum=0.9, start=problem.START, box=0.3, **IN_LOOP
    ),
  ),
  'rhg forward': (
    lambda: bj.rhg(PROBLEM, mode='forward', **LOOP),
    lambda b, _: steps.rhg(F, G, X, Y, b, **IN_LOOP),
  ),
  'rhg mixed': (
    lambda: bj.rhg(PROBLEM, mode='mixed', **LOOP),
    lambda b, _: steps.rhg(F, G, X, Y, b, **IN_LOOP),
  ),
  't_rhg': (
    lambda: bj.t_rhg(PROBLEM, truncate=2, **LOOP),
    lambda b, _: steps.rhg(F, G, X, Y, b, truncate=2, **IN_LOOP),
  ),
  'aid_bilevel': (
    lambda: bj.aid_bilevel(PROBLEM, **LOOP),
    lambda b, _: steps.implicit(
      F, G, X, Y, b, solves=[steps.solve_exactly] * 4, **IN_LOOP
    ),
  ),
  'aid_bilevel by a dense factorisation': (
    lambda: bj.aid_bilevel(
      PROBLEM, solve=bj.linear_solvers.dense_solve(), **LOOP
    ),
    lambda b, _: steps.implicit(
      F, G, X, Y, b, solves=[steps.solve_exactly] * 4, **IN_LOOP
    ),
  ),
  'aid_bilevel by one conjugate gradient': (
    lambda: bj.aid_bilevel(
      PROBLEM, solve=bj.linear_solvers.conjugate_gradient(1), **LOOP
    ),
    lambda b, _: steps.implicit(
      F, G, X, Y, b, solves=[steps.one_conjugate_step] * 4, **IN_LOOP
    ),
  ),
  'stocbio': (
    lambda: bj.solvers.stocbio(
      PROBLEM, terms=4, step_size=0.3, linear_batch=pick, **LOOP
    ),
    lambda b, _: steps.implicit(
      F, G, X, Y, b, solves=[steps.series(4, 0.3)] * 4, linear_pick=pick,
      **IN_LOOP,
    ),
  ),
  'alset': (
    lambda: bj.solvers.alset(PROBLEM, terms=2, step_size=0.3, **BOTH),
    lambda b, _: steps.implicit(
      F, G, X, Y, b, solves=[steps.series(2, 0.3)] * 4, steps=1, **RATES
    ),
  ),
  'amigo': (
    lambda: bj.solvers.amigo(
      PROBLEM, terms=2, step_size=0.3, linear_batch=pick, **LOOP
    ),
    lambda b, _: steps.implicit(
      F, G, X, Y, b, solves=[steps.series(2, 0.3, warm=True)] * 4,
      linear_pick=pick, **IN_LOOP,
    ),
  ),
  'bsa': (
    lambda: bj.solvers.bsa(
      PROBLEM, terms=4, step_size=0.3, linear_batch=pick, key=3, **LOOP
    ),
    lambda b, updates: steps.implicit(
      F, G, X, Y, b, linear_pick=pick,
      solves=[steps.one_term(4, 0.3, n) for n in lengths(updates)], **IN_LOOP,
    ),
  ),
  'ttsa': (
    lambda: bj.solvers.ttsa(PROBLEM, terms=4, step_size=0.3, key=5, **BOTH),
    lambda b, updates: steps.implicit(
      F, G, X, Y, b, steps=1,
      solves=[steps.one_term(4, 0.3, n) for n in lengths(updates)], **RATES,
    ),
  ),
  'soba': (
    lambda: bj.soba(
      PROBLEM, linear=bj.Sequence(
        VAL, set=lambda v: optax.projections.projection_l2_ball(v, 0.15)
      ), **BOTH,
    ),
    lambda b, _: steps.soba(F, G, X, Y, b, linear=val, radius=0.15, **RATES),
  ),
  'srba': (
    lambda: bj.solvers.srba(
      PROBLEM, period=3, small_batch=first_rows, linear=VAL, **BOTH
    ),
    lambda b, _: steps.srba(
      F, G, X, Y, b, linear=val, period=3, small=first_rows,
      large=lambda batch: batch, **RATES,
    ),
  ),
  'ma_soba': (
    lambda: bj.solvers.ma_soba(PROBLEM, averaging=0.4, **BOTH),
    lambda b, _: steps.soba(F, G, X, Y, b, linear=low, averaging=0.4, **RATES),
  ),
  'mrbo': (
    lambda: bj.solvers.mrbo(
      PROBLEM, terms=3, step_size=0.3, decay=decay, linear_batch=pick, **BOTH
    ),
    lambda b, _: steps.sustain(
      F, G, X, Y, b, decay=decay, solves=[steps.series(3, 0.3)] * 4,
      linear_pick=pick, **RATES,
    ),
  ),
  'mrbo with two lower steps': (
    lambda: bj.solvers.mrbo(
      PROBLEM, terms=3, step_size=0.3, decay=decay, upper=UP, lower=TWICE
    ),
    lambda b, _: steps.sustain(
      F, G, X, Y, b, decay=decay, solves=[steps.series(3, 0.3)] * 4,
      lower_steps=2, pick=pick, **RATES,
    ),
  ),
  'sustain': (
    lambda: bj.solvers.sustain(
      PROBLEM, terms=4, step_size=0.3, decay=decay, key=2, **BOTH
    ),
    lambda b, updates: steps.sustain(
      F, G, X, Y, b, decay=decay, solves=[
        steps.one_term(4, 0.3, n) for n in lengths(updates, 2)
      ], **RATES,
    ),
  ),
  'vrbo': (
    lambda: bj.solvers.vrbo(
      PROBLEM, terms=2, step_size=0.3, period=3, **LOOP
    ),
    lambda b, _: steps.vrbo(
      F, G, X, Y, b, solve=steps.series(2, 0.3), period=3,
      large=lambda batch: batch, **IN_LOOP,
    ),
  ),
  'vrbo with one lower step': (
    lambda: bj.solvers.vrbo(
      PROBLEM, terms=2, step_size=0.3, period=3, large_batch=first_rows, **BOTH
    ),
    lambda b, _: steps.vrbo(
      F, G, X, Y, b, solve=steps.series(2, 0.3), period=3, steps=1,
      pick=steps.full_batch, large=first_rows, **RATES,
    ),
  ),
  'soba in turn': (
    lambda: bj.descend(
      *(bj.implicit_directions(PROBLEM, of=n) for n in ('lower', 'linear')),
      bj.implicit_directions(PROBLEM, of='upper'), **BOTH,
      linear=bj.Sequence(VAL, start=lambda p: jnp.zeros_like(p.lower)),
    ),
    lambda b, _: steps.soba(
      F, G, X, Y, b, linear=val, in_turn=True, **RATES
    ),
  ),
  'descent and ascent': (
    lambda: bj.descend(
      bj.gradient(
        lambda p, b: PROBLEM.lower(p.upper, p.lower, b),
        of={'upper': -1, 'lower': 1},
      ), **BOTH,
    ),
    lambda b, _: steps.descent_ascent(G, X, Y, b, **RATES),
  ),
  'stable': (
    lambda: bj.solvers.stable(
      PROBLEM, decay=decay, least_curvature=0.3, **BOTH
    ),
    lambda b, _: steps.stable(
      F, G, X, Y, b, decay=decay, min_eigenvalue=0.3, **RATES,
    ),
  ),
}  # fmt: skip


@pytest.mark.parametrize('name', slow_where(CASES, lambda name: ' ' in name))
def test_bilevel_updates_are_the_published_ones(name):
  # Conjugate gradients take a singular matrix for one without a solution.
  data = (REGULAR,) if name == 'aid_bilevel' else (REGULAR, SINGULAR)
  check(name, *CASES[name], *data)


AFFINE = {
  'above': steps.Equations(problem.UPPER_MATRIX, problem.UPPER_RIGHT),
  'below': steps.Equations(
    problem.LOWER_MATRIX, problem.LOWER_RIGHT, problem.coupling
  ),
}


def above():
  """The upper variable's equation."""
  return bj.projections.affine_set(problem.UPPER_MATRIX, problem.UPPER_RIGHT)


def below():
  """The lower variable's coupled equations."""
  return bj.projections.affine_set(
    problem.LOWER_MATRIX,
    problem.LOWER_RIGHT,
    coupling=lambda x: problem.coupling(flat(x)),
  )


EQUATIONS = {
  'aipod': (
    lambda: bj.aipod(
      PROBLEM, upper=bj.Sequence(UP, set=above()),
      lower=bj.Sequence(LOW, set=below(), steps=3, batch_at=pick),
    ),
    lambda b, _: steps.aipod(
      F, G, X, problem.LONG_LOWER, b, solves=[steps.solve_exactly] * 4,
      **AFFINE, **IN_LOOP,
    ),
  ),
  'aipod by a random term': (
    lambda: bj.aipod(
      PROBLEM, upper=bj.Sequence(UP, set=above()),
      lower=bj.Sequence(LOW, set=below(), steps=3, batch_at=pick),
      solve=bj.linear_solvers.LinearSystem(
        bj.linear_solvers.random_neumann(4, 0.3), batch_at=pick, key=1
      ),
    ),
    lambda b, updates: steps.aipod(
      F, G, X, problem.LONG_LOWER, b, linear_pick=pick,
      solves=[steps.one_term(4, 0.3, n) for n in lengths(updates)],
      **AFFINE, **IN_LOOP,
    ),
  ),
}  # fmt: skip


@pytest.mark.parametrize('name', EQUATIONS)
def test_updates_in_equations_are_the_published_ones(name):
  params = bj.BilevelParams(problem.UPPER, problem.LONG_LOWER)
  check(name, *EQUATIONS[name], LONG, params=params)


def test_e_aipod_is_the_published_one_for_the_coins_it_drew():
  probability = lambda k: 0.4 + 0.3 / (1 + k)
  relaxation = lambda k: 1.1 + 0.2 / (1 + k)
  make = lambda: bj.e_aipod(
    PROBLEM,
    upper=bj.Sequence(
      UP,
      steps=2,
      set=bj.projections.Relaxed(above(), relaxation),
      batch_at=pick,
    ),
    lower=bj.Sequence(
      LOW,
      steps=3,
      set=bj.projections.Lazy(below(), probability, key=0),
      batch_at=pick,
    ),
  )
  params = bj.BilevelParams(problem.UPPER, problem.LONG_LOWER)
  reference = lambda coins: steps.e_aipod(
    F, G, X, problem.LONG_LOWER, LONG[: len(coins)], upper=up, lower=low,
    probability=probability, coins=coins, upper_steps=2, pick=pick,
    relaxation=relaxation, in_steps=True, **AFFINE,
  )  # fmt: skip
  for dtype in TOLERANCE:
    (_, updates), (_, many) = run(make, params, dtype, LONG, 50 * LONG)
    coins, before = [], 0
    for update in updates:
      heads = update.counts['projections/lower'] - before
      before += heads
      tries = []
      for coin in itertools.product((0, 1), repeat=3):
        if sum(coin) == heads:
          *_, last = reference([*coins, coin])
          tries.append((*error(update, last), coin))
      assert min(tries)[0] < TOLERANCE[dtype], (len(coins), tries)
      coins.append(min(tries)[-1])
    shares = np.repeat([probability(k) for k in range(len(many))], 3)
    excess = many[-1].counts['projections/lower'] - shares.sum()
    assert abs(excess) < 3 * np.sqrt(np.sum(shares * (1 - shares)))
    assert many[-1].counts['projections/upper'] == len(many)


PARTS = [
  {**batch, 'part': np.int32(part), 'other': np.int32(other)}
  for batch, part, other in zip(
    problem.batches(count=6, seed=3), (0, 2, 0, 1, 2, 0), (1, 0, 0, 1, 1, 0)
  )
]


def lower_rows(batch):
  """The lower loss's samples."""
  return {**batch, 'rows': batch['rows'][1:]}


MEMORIES = {
  'saba': (
    lambda: bj.saba(
      PROBLEM, parts=3, index=lambda batch: batch['part'], linear=VAL, **BOTH
    ),
    lambda b, _: steps.saba_at_once(
      F, G, X, Y, b, parts=3, chosen=[c['part'] for c in b], linear=val,
      **RATES,
    ),
  ),
  'saba in turn': (
    lambda: bj.saba(PROBLEM, parts=2, **BOTH),
    lambda b, _: steps.saba_at_once(
      F, G, X, Y, b, parts=2, chosen=[k % 2 for k in range(6)], linear=low,
      **RATES,
    ),
  ),
  'saba of two losses': (
    lambda: bj.saba(
      PROBLEM, parts=(2, 3), linear=VAL, **BOTH,
      index=lambda batch: (batch['other'], batch['part']),
      batches=lambda batch: (first_rows(batch), lower_rows(batch)),
    ),
    lambda b, _: steps.saba(
      F, G, X, Y, [(first_rows(c), lower_rows(c)) for c in b], parts=(2, 3),
      chosen=[(c['other'], c['part']) for c in b], linear=val, **RATES,
    ),
  ),
}  # fmt: skip


@pytest.mark.parametrize('name', MEMORIES)
def test_memories_are_the_published_ones(name):
  check(name, *MEMORIES[name], PARTS)


LATE = {
  'round_robin': {'workers': 3},
  'random': {'workers': 2, 'bound': 3, 'key': 1},
  'sampled': {'workers': 1, 'bound': 3, 'key': 0},
}


@pytest.mark.parametrize('service', LATE)
def test_delayed_updates_are_those_of_the_points_before(service):
  late = lambda o: bj.evaluation.delayed(o, service=service, **LATE[service])
  delays = []

  def reference(batches, updates):
    delays[:] = [int(u.values['delay']) for u in updates]
    return steps.stale_soba(
      F, G, X, Y, batches, linear=val, delays=delays, **RATES
    )

  check(
    service,
    lambda: bj.evaluation.wrapped(bj.soba(PROBLEM, linear=VAL, **BOTH), late),
    reference,
    problem.batches(count=7),
  )
  assert service != 'round_robin' or delays == [0, 1, 2, 2, 2, 2, 2]
  assert max(delays) > 1 and len(set(delays)) > 2


INCREMENTS = {n: problem.increments(n) for n in 'xyz'}
START = {'x': X, 'y': Y, 'z': -Y}


@pytest.mark.parametrize('order', ['simultaneous', 'alternating'])
def test_stsa_moves_along_increments(order):
  check(
    order,
    lambda: bj.stsa(
      {n: lambda p, b, h=h: h(*p, b) for n, h in INCREMENTS.items()},
      steps={'x': up, 'y': LOW, 'z': bj.Sequence(VAL)},
      order=order,
      batch_of=lambda batch, name: pick(batch, 'xyz'.index(name)),
    ),
    lambda b, _: steps.stsa(
      {n: in_double_at(INCREMENTS[n], i) for i, n in enumerate('xyz')},
      START,
      b,
      rates={'x': up, 'y': low, 'z': val},
      order=order,
    ),
    REGULAR,
    params=bj.sequences(**START),
  )


def in_double_at(increment, i):
  """An increment that sees the rows of a step."""
  numeric = steps.in_double(increment)
  return lambda x, y, z, batch: numeric(x, y, z, pick(batch, i))


MEANS = (np.array([0.2, -0.1]), np.array([0.4, 0.3]))
COMPOSED = {
  'functions': [
    lambda x, b: problem.level_0(flat(x), b), problem.level_1, problem.level_2
  ],
  'main': UP,
  'tracking': decay,
  'levels': lambda p: [jnp.asarray(m, p.main['a'].dtype) for m in MEANS],
  'batch_of': pick,
}  # fmt: skip
COMPOSITIONS = {
  'scgd': (lambda: bj.solvers.scgd(**COMPOSED), {}),
  'scsc': (lambda: bj.solvers.scsc(**COMPOSED), {'corrected': True}),
  'nasa': (
    lambda: bj.solvers.nasa(averaging=0.4, **COMPOSED),
    {'averaging': 0.4},
  ),
}


@pytest.mark.parametrize('name', COMPOSITIONS)
def test_compositions_are_the_published_ones(name):
  make, options = COMPOSITIONS[name]
  levels = [steps.Level(level) for level in LEVELS]
  check(
    name,
    make,
    lambda b, _: steps.compositional(
      levels, X, b, main=up, tracking=decay, start=MEANS, pick=pick, **options
    ),
    REGULAR,
    params=bj.sequences(main=problem.UPPER),
  )


LOSSES = steps.Level(problem.objectives)
MOCO = {
  'weight_step': lambda k: 0.3 / (1 + k),
  'regularisation': lambda k: 0.1 + 0.1 * k,
}
PLAIN = {
  'rate': up, 'weight_step': MOCO['weight_step'],
  'ridge': MOCO['regularisation'],
}  # fmt: skip
OBJECTIVES = {
  'moco': (
    lambda: optax.chain(
      bj.multi_objective(problem.objectives, 3),
      bj.aggregators.moco(3, tracking=decay, radius=0.9, **MOCO),
      UP,
    ),
    lambda b, _: steps.moco(
      LOSSES, X, b, tracking=decay, radius=0.9, **PLAIN
    ),
  ),
  'fused_moco': (
    lambda: optax.chain(
      bj.oracles.fused_moco(
        problem.objectives, 3, tracking=decay, **MOCO | {'weight_step': None}
      ),
      UP,
    ),
    lambda b, _: steps.moco(LOSSES, X, b, tracking=decay, exact=True, **PLAIN),
  ),
  'moco_plus': (
    lambda: optax.chain(
      bj.solvers.moco_plus(
        problem.objectives, 3, decay=decay, radius=1.2, **MOCO
      ),
      UP,
    ),
    lambda b, _: steps.moco(
      LOSSES, X, b, tracking=decay, corrected=True, radius=1.2, **PLAIN
    ),
  ),
  'famo': (
    lambda: bj.solvers.famo(
      problem.objectives, 3, optimiser=UP, weight_rate=val, weight_decay=0.01,
      minima=np.array([0.1, 0.5, 0.2]),
    ),
    lambda b, _: steps.famo(
      LOSSES, X, b, rate=up, weight_rate=val, weight_decay=0.01,
      minima=np.array([0.1, 0.5, 0.2]),
    ),
  ),
}  # fmt: skip


@pytest.mark.parametrize('name', OBJECTIVES)
def test_several_objectives_are_the_published_ones(name):
  check(name, *OBJECTIVES[name], REGULAR, params=X)


class Rows:
  """The losses of `seal`, plain."""

  value = staticmethod(steps.in_double(lambda x, b: problem.upper(x, Y, b)))
  slope = staticmethod(
    steps.in_double(jax.grad(lambda x, b: problem.upper(x, Y, b)))
  )
  rows = staticmethod(steps.in_double(problem.row_losses))
  row_slopes = staticmethod(steps.in_double(jax.jacobian(problem.row_losses)))


# Whole epochs of nine rows, then one that is there twice.
CHOSEN = [[0, 1, 2], [6, 4, 8], [3, 7, 5], [4, 4, 0]]
SELECTED = [
  {'rows': b['rows'][0, :3], 'index': np.array(i)}
  for b, i in zip(problem.batches(lower_size=2, seed=5), CHOSEN)
]
SEAL = {
  'seal': {},
  'seal, the full form': {'value': val, 'steps': 2},
  'seal by mirror descent, with momentum': {
    'weights': 'mirror', 'momentum': 0.5
  },
  'seal with sigmoids, the full form': {'weights': 'sigmoid', 'value': val},
}  # fmt: skip


@pytest.mark.parametrize('name', first(SEAL, count=2))
def test_seal_is_the_published_one(name):
  options = dict(SEAL[name])
  rest = dict(options)
  follow, momentum = rest.pop('value', None), rest.pop('momentum', None)
  value = follow and bj.Sequence(optax.sgd(val), steps=rest.pop('steps', 1))

  def upper(x, batch):
    return problem.upper(x, jnp.asarray(Y, x.dtype), batch)

  make = lambda: bj.solvers.seal(
    upper, problem.row_losses, penalty=penalty, lower=LOW, value=value,
    scores=bj.solvers.RowScores(
      optax.sgd(up, momentum), 9, lambda batch: batch['index'], **rest
    ),
  )  # fmt: skip
  reference = lambda b, _: steps.seal(
    Rows, X, b, rows=9, penalty=penalty, lower=low, selector=up, **options
  )
  check(name, make, reference, SELECTED, params=X)


def many(make, params, batches, members):
  """The sequences of many members of different keys after each update."""
  with jax.enable_x64(True):
    params, keys = cast(params, np.float64), jax.random.key(0)
    keys = jax.random.split(keys, members)
    state = jax.vmap(lambda key: make(key).init(params))(keys)
    at = jax.tree.map(lambda z: jnp.tile(z, (members,) + (1,) * z.ndim), params)
    step = jax.vmap(make(0).update, (None, 0, 0))
    step = jax.jit(step, compiler_options=QUICKLY)
    for batch in batches:
      update, state = step(cast(batch, np.float64), state, at)
      at = bj.apply_updates(at, update)
      named = at._asdict() | bj.auxiliaries(state)
      named['upper'] = jax.vmap(flat)(named['upper'])
      yield {n: np.asarray(z) for n, z in named.items()}


def test_v_pbsgd_is_the_published_one_for_the_points_it_drew():
  make = lambda key: bj.solvers.v_pbsgd(
    PROBLEM, penalty=penalty, upper=bj.Sequence(UP, set=box(0.45)),
    lower=bj.Sequence(LOW, set=box(0.55)),
    value=bj.solvers.RandomStop(val, 3, key, pick),
  )  # fmt: skip
  params = bj.BilevelParams(problem.UPPER, problem.LOWER)
  runs = list(many(make, params, REGULAR, 600))
  options = {'steps': 3, 'pick': pick, 'lower_set': np_box(0.55)}
  draw = lambda k, member, points: min(
    (np.max(np.abs(runs[k]['value'][member] - point)), i)
    for i, point in enumerate(points)
  )
  for member in range(10):
    x, y = X, Y
    for k, batch in enumerate(REGULAR):
      points = steps.v_pbsgd_points(G, x, y, batch, value=val(k), **options)
      distance, i = draw(k, member, points)
      assert distance < 1e-10
      x, y = steps.v_pbsgd_step(
        F, G, x, y, points[i], batch, gamma=penalty(k), upper=up(k),
        lower=low(k), upper_set=np_box(0.45), lower_set=np_box(0.55),
      )  # fmt: skip
      np.testing.assert_allclose(runs[k]['upper'][member], x, atol=1e-10)
      np.testing.assert_allclose(runs[k]['lower'][member], y, atol=1e-10)
  points = steps.v_pbsgd_points(G, X, Y, REGULAR[0], value=val(0), **options)
  drawn = [draw(0, member, points)[1] for member in range(600)]
  shares = 1 / np.sqrt([1, 2, 3]) / np.sum(1 / np.sqrt([1, 2, 3]))
  np.testing.assert_allclose(np.bincount(drawn) / 600, shares, atol=0.06)


def test_pzobo_is_the_published_one_along_the_directions_it_drew():
  make = lambda key: bj.solvers.pzobo(PROBLEM, smoothing=0.05, key=key, **LOOP)
  params = bj.BilevelParams(problem.UPPER, problem.LOWER)
  runs = list(many(make, params, REGULAR, 400))
  outer = np.zeros((3, 3))
  for member in range(400):
    x, y = X, Y
    for k, batch in enumerate(REGULAR if member < 4 else REGULAR[:1]):
      end = steps.descend_lower(G, x, y, batch, rate=low(k), steps=3, pick=pick)
      moved = (x - runs[k]['upper'][member]) / up(k) - F.x(x, end, batch)
      u = np.sqrt(3) * moved / np.linalg.norm(moved)
      outer += np.outer(u, u) / 400 * (k == 0)
      if member < 4:
        errors = []
        for direction in (u, -u):
          (new,) = steps.pzobo(
            F, G, x, y, [batch], upper=lambda _, k=k: up(k),
            lower=lambda _, k=k: low(k), steps=3, smoothing=0.05,
            directions=[[direction]], pick=pick,
          )  # fmt: skip
          errors.append(
            max(np.max(np.abs(runs[k][n][member] - new[n])) for n in new)
          )
        assert min(errors) < 1e-10
        x, y = runs[k]['upper'][member], runs[k]['lower'][member]
  np.testing.assert_allclose(outer, np.eye(3), atol=0.2)


def test_pzobo_with_all_directions_is_the_derivative_of_the_loop():
  make = lambda: bj.solvers.pzobo(
    PROBLEM, smoothing=1e-6, directions=3, key=0, **LOOP
  )
  params = bj.BilevelParams(problem.UPPER, problem.LOWER)
  ((_, updates),) = run(make, params, np.float64, REGULAR)
  for update, wanted in zip(updates, steps.rhg(F, G, X, Y, REGULAR, **IN_LOOP)):
    assert error(update, wanted)[0] < 1e-5


def test_linear_solvers_are_their_formulas():
  random = np.random.default_rng(0)
  root, right, start = (random.normal(size=s) for s in ((3, 3), 3, 3))
  matrix = root @ root.T + 0.3 * np.eye(3)
  solvers = bj.linear_solvers
  line = np.stack([right, matrix @ right], 1)
  residual = right - matrix @ start
  one = residual @ matrix @ residual / np.sum((matrix @ residual) ** 2)
  krylov = np.linalg.lstsq(matrix @ line, right, rcond=None)[0]
  exact, damped = np.linalg.solve(matrix, right), matrix + 0.2 * np.eye(3)
  cases = [
    (solvers.conjugate_gradient(3), None, exact),
    (solvers.conjugate_gradient(9), start, exact),
    (solvers.gmres(3), start, exact),
    (solvers.gmres(2), None, line @ krylov),
    (solvers.gmres(1), start, start + one * residual),
    (solvers.nystrom(3, 0.2), None, np.linalg.solve(damped, right)),
    (solvers.dense_solve(), None, exact),
    (
      solvers.neumann(2, 0.1),
      start,
      steps.series(2, 0.1, warm=True)(constant(matrix), right, start),
    ),
  ]
  with jax.enable_x64(True):
    operator = lambda v: jnp.asarray(matrix) @ v
    solve_all = lambda right, start: [
      solver.solve(operator, right, None if at is None else start, None)[0]
      for solver, at, _ in cases
    ]
    found = jax.jit(solve_all, compiler_options=QUICKLY)(right, start)
    for got, (_, _, wanted) in zip(found, cases):
      np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-9)
    drawn = solvers.random_neumann(5, 0.1)
    keys = jax.random.split(jax.random.key(1), 1000)
    found, products = jax.jit(
      jax.vmap(lambda key: drawn.solve(operator, jnp.asarray(right), None, key))
    )(keys)
  products = np.asarray(products)
  np.testing.assert_allclose(np.bincount(products) / 1000, 0.2, atol=0.045)
  for length in range(5):
    term = steps.one_term(5, 0.1, length)(constant(matrix), right, None)
    rows = np.asarray(found)[products == length]
    np.testing.assert_allclose(rows, term + 0 * rows, rtol=1e-9)


@pytest.mark.parametrize('step_size', [0.0, -0.1])
def test_series_take_positive_steps(step_size):
  with pytest.raises(ValueError, match='step'):
    bj.solvers.stocbio(PROBLEM, terms=2, step_size=step_size, **BOTH)


def test_hypergradients_are_the_dense_ones():
  batch = REGULAR[0]
  q = steps.solve_exactly(lambda t: G.yy(X, Y, batch), F.y(X, Y, batch), None)
  plain = F.x(X, Y, batch) - G.xy(X, Y, batch) @ q
  y, long = problem.LONG_LOWER, LONG[0]
  inside = AFFINE['below'].correction(
    F, G, X, y, long, steps.solve_exactly, lambda t: G.yy(X, y, long)
  )
  with jax.enable_x64(True):
    points = cast(
      [
        (bj.BilevelParams(problem.UPPER, Y), batch),
        (bj.BilevelParams(problem.UPPER, y), long),
      ],
      np.float64,
    )
    dense = lambda points: [
      flat(bj.hypergradient(PROBLEM, *at, tolerance=1e-13, lower_set=given))
      for at, given in zip(points, (None, below()))
    ]
    found = jax.jit(dense, compiler_options=QUICKLY)(points)
  np.testing.assert_allclose(found[0], plain, rtol=1e-10)
  np.testing.assert_allclose(found[1], F.x(X, y, long) + inside, rtol=1e-10)


def test_schedules_and_plans_are_their_formulas():
  schedule = bj.solvers.power_schedule(0.7, 0.6, 3.0)
  for k in range(4):
    np.testing.assert_allclose(schedule(k), 0.7 * (k + 3) ** -0.6, rtol=1e-6)
  plan = bj.solvers.e_aipod_plan(
    0.01, upper_steps=4, strong_convexity=0.5, upper_rate=2.0, lower_rate=3.0
  )
  rate = 3 / np.sqrt(2500)
  assert (plan.iterations, plan.inner_steps, plan.upper_steps) == (2500, 1, 4)
  np.testing.assert_allclose(
    (plan.lower_rate, plan.upper_rate, plan.relaxation, plan.probability),
    (rate, 2 / (4 * np.sqrt(2500)), 2, np.sqrt(rate * 0.5)),
  )
