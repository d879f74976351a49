"""PBRL against its equations, on processes that mix everything."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests import contract
from tests.contract import PENALISED, Row
from tests.tiers import first

# The contract's rows.

_MIX = np.random.default_rng(5).normal(size=(5, 2, 5, 10)).astype(np.float32)


def _wide(a):
  """Of bfloat16, rows of probabilities would not sum to one."""
  return a.astype(jnp.promote_types(a.dtype, jnp.float32))


def _process(x):
  a = _wide(x['a'])
  moves = jax.nn.softmax(_MIX @ a)
  rewards = jnp.tanh(a).reshape(5, 2)
  return bj.rl.make_mdp(moves, rewards, discount=0.5)


def _loss(x, y, batch):
  noise = batch['c'].reshape(-1, 10).astype(y.dtype).mean(axis=0)
  return noise[:5] @ jax.nn.softmax(y)[:, 0] + noise @ jnp.sin(x['a'])


def _params(seed, dtype=jnp.float32):
  x = contract.nested_params(seed, dtype).upper
  table = np.random.default_rng(seed).normal(size=(5, 2))
  return bj.BilevelParams(x, jnp.asarray(table, dtype))


def _row(wrap, penalty, rate, **given):
  sgd = optax.sgd(rate)
  solver = bj.solvers.pbrl(
    _loss,
    _process,
    temperature=0.5,
    penalty=penalty,
    upper=sgd,
    lower=sgd,
    value=sgd,
    gap=bj.solvers.PolicyGap(**given),
  )
  return bj.evaluation.wrapped(solver, wrap)


def _game(x):
  a = _wide(x['a'])
  moves = jax.nn.softmax(_MIX[:, None].repeat(2, 1) @ a)
  costs = jnp.tanh(jnp.outer(a, a[:2])).reshape(1, 5, 2, 2)
  return bj.rl.make_game(moves, costs, discount=0.5)


def _payoff(x, y, batch):
  del batch
  game, both = _game(x), tuple(jax.nn.softmax(z) for z in y)
  _, two = bj.rl.zero_sum_responses(
    game, game.rewards[0], both, temperature=0.5
  )
  return bj.rl.expected_return(two, both[1], 0.5)


def _pair(seed, dtype=jnp.float32):
  one, two = _params(seed, dtype), _params(seed + 50, dtype)
  return bj.BilevelParams(one.upper, (one.lower, two.lower))


def _zero_sum(wrap, penalty, rate):
  problem = bj.BilevelProblem(
    lambda x, y, batch: _loss(x, y[0] + y[1], batch), _payoff
  )
  sgd = optax.sgd(rate)
  solver = bj.descend(
    bj.oracles.best_responses(problem),
    bj.oracles.nikaido_isoda(problem, penalty=penalty),
    upper=sgd,
    lower=sgd,
    value=bj.Sequence(sgd, start=lambda params: params.lower),
  )
  return bj.evaluation.wrapped(solver, wrap)


ROWS = (
  Row(
    'pbrl',
    _row,
    {'gradients/upper': 1, 'gradients/lower': 3},
    params=_params,
    hyper=PENALISED,
  ),
  Row(
    'pbrl, Bellman penalty',
    functools.partial(_row, form='bellman', natural=False),
    {'gradients/upper': 1, 'gradients/lower': 3},
    params=_params,
    hyper=PENALISED,
  ),
  Row(
    'nikaido_isoda',
    _zero_sum,
    {'gradients/upper': 1, 'gradients/lower': 3},
    covers=('best_responses',),
    params=_pair,
    hyper=PENALISED,
  ),
)

# One update after another, by NumPy.

STATES, ACTIONS, SIZE, DISCOUNT, TAU = 5, 3, 4, 0.8, 0.2
_DRAW = np.random.default_rng(0)
_MOVES = _DRAW.normal(size=(STATES, ACTIONS, STATES, SIZE))
_GAINS = _DRAW.normal(size=(STATES, ACTIONS, SIZE))
_PULL = _DRAW.normal(size=(STATES, ACTIONS))
X, Y = _DRAW.normal(size=SIZE), _DRAW.normal(size=(STATES, ACTIONS))
RHO = _DRAW.dirichlet(np.ones(STATES))
# The last state is never seen, from anywhere but itself.
CLOSED = np.append(np.ones(STATES - 1), 0.0)
STEP, OWN, SHARE = 0.4, 0.1, 0.6


def ramp(k):
  """Below and above one."""
  return 0.6 + 0.7 * k


def dense(closed):
  """A process all of whose entries depend on all of x."""

  def process(x):
    weights = jnp.exp(jnp.asarray(_MOVES, x.dtype) @ x)
    if closed:
      weights = weights * jnp.asarray(CLOSED, x.dtype)
    return bj.rl.make_mdp(
      weights / weights.sum(-1, keepdims=True),
      jnp.tanh(jnp.asarray(_GAINS, x.dtype) @ x),
      discount=jnp.asarray(DISCOUNT, x.dtype),
      initial=jnp.asarray(start_of(closed), x.dtype),
    )

  return process


def start_of(closed):
  return RHO * CLOSED / (RHO @ CLOSED) if closed else RHO


def dense_loss(x, y, batch):
  pull = jnp.asarray(_PULL, y.dtype)
  return jnp.sum(pull * jax.nn.softmax(y)) * jnp.cos(x[0]) + x @ x / 2


class Plain:
  """The same in NumPy, with the derivatives in x of entries by hand."""

  def __init__(self, x, closed):
    """The process at x."""
    weights = np.exp(_MOVES @ x) * (CLOSED if closed else 1.0)
    self.moves = weights / weights.sum(-1, keepdims=True)
    mean = np.einsum('sat,sati->sai', self.moves, _MOVES)
    # (states, actions, states, x)
    self.d_moves = self.moves[..., None] * (_MOVES - mean[:, :, None])
    self.gains = np.tanh(_GAINS @ x)
    self.d_gains = (1 - self.gains**2)[..., None] * _GAINS
    self.rho = start_of(closed)

  def values(self, pi):
    chain = np.einsum('sa,sat->st', pi, self.moves)
    r = (pi * (self.gains - TAU * np.log(pi))).sum(1)
    return np.linalg.solve(np.eye(STATES) - DISCOUNT * chain, r)

  def q(self, pi):
    return self.gains + DISCOUNT * self.moves @ self.values(pi)

  def visits(self, pi, start):
    chain = np.einsum('sa,sat->st', pi, self.moves)
    return np.linalg.solve(np.eye(STATES) - DISCOUNT * chain.T, start)

  def d_entries(self, pi, v):
    """The derivative of r + gamma P V in x, V held, (states, actions, x)."""
    return self.d_gains + DISCOUNT * np.einsum('sati,t->sai', self.d_moves, v)

  def d_value(self, pi):
    """Of rho V^pi."""
    seen = self.visits(pi, self.rho)
    return np.einsum(
      's,sa,sai->i', seen, pi, self.d_entries(pi, self.values(pi))
    )

  def d_q(self, pi):
    """Of Q^pi, (states, actions, x)."""
    chain = np.einsum('sa,sat->st', pi, self.moves)
    direct = self.d_entries(pi, self.values(pi))
    d_v = np.linalg.solve(
      np.eye(STATES) - DISCOUNT * chain, np.einsum('sa,sai->si', pi, direct)
    )
    return direct + DISCOUNT * np.einsum('sat,ti->sai', self.moves, d_v)


def np_softmax(z):
  e = np.exp(z - z.max(1, keepdims=True))
  return e / e.sum(1, keepdims=True)


def in_logits(pi, slope):
  return pi * (slope - (pi * slope).sum(1, keepdims=True))


def by_hand(updates, *, form, natural, closed, inner):
  x, y, w = X.copy(), Y.copy(), Y.copy()
  for k in range(updates):
    here = Plain(x, closed)
    for _ in range(inner):
      w = (1 - SHARE) * np.log(np_softmax(w)) + SHARE * here.q(
        np_softmax(w)
      ) / TAU
    pi, best = np_softmax(y), np_softmax(w)
    weights = here.visits(pi, here.rho) if form == 'value' else RHO
    if form == 'value':
      gap = here.rho @ (here.values(best) - here.values(pi))
      p_x = here.d_value(best) - here.d_value(pi)
      slope = -weights[:, None] * (here.q(pi) - TAU * np.log(pi))
    else:
      q = here.q(best)
      level = [(z * (TAU * np.log(z) - q)).sum(1) for z in (pi, best)]
      gap = weights @ (level[0] - level[1])
      p_x = np.einsum('s,sa,sai->i', weights, best - pi, here.d_q(best))
      slope = weights[:, None] * (TAU * np.log(pi) - q)
    f = np.sum(_PULL * pi) * np.cos(x[0]) + x @ x / 2
    f_x = x - np.eye(SIZE)[0] * np.sum(_PULL * pi) * np.sin(x[0])
    lam = ramp(k)
    c = min(1 / lam, 1)
    d_y = c * in_logits(pi, _PULL * np.cos(x[0]) + lam * slope)
    if natural:
      mass = (weights * (weights > 1e-14))[:, None] * pi
      d_y = np.divide(d_y, mass, out=np.zeros_like(mass), where=mass > 1e-50)
    x, y = x - STEP * c * (f_x + lam * p_x), y - OWN * d_y
    yield x, y, w, {'upper': f, 'gap': gap}


CASES = [
  {'form': 'value', 'natural': True, 'closed': False, 'inner': 1},
  {'form': 'value', 'natural': True, 'closed': True, 'inner': 2},
  {'form': 'value', 'natural': False, 'closed': False, 'inner': 2},
  {'form': 'bellman', 'natural': True, 'closed': False, 'inner': 1},
  {'form': 'bellman', 'natural': False, 'closed': True, 'inner': 2},
]


@pytest.mark.parametrize(
  'dtype, case',
  [
    *first(((np.float64, case) for case in CASES), count=2),
    *first(((np.float32, case) for case in CASES[::3]), count=0),
  ],
)
def test_takes_the_steps_of_its_equations(dtype, case):
  with jax.enable_x64(dtype == np.float64):
    solver = bj.solvers.pbrl(
      dense_loss,
      dense(case['closed']),
      temperature=TAU,
      penalty=ramp,
      upper=optax.sgd(STEP),
      lower=optax.sgd(OWN),
      value=bj.Sequence(optax.sgd(SHARE), steps=case['inner']),
      gap=bj.solvers.PolicyGap(
        case['form'],
        RHO if case['form'] == 'bellman' else None,
        natural=case['natural'],
      ),
    )
    params = bj.BilevelParams(jnp.asarray(X, dtype), jnp.asarray(Y, dtype))
    state, step = solver.init(params), jax.jit(solver.update)
    rtol = 1e-9 if dtype == np.float64 else 2e-4
    for x, y, w, values in by_hand(4, **case):
      updates, state = step(None, state, params)
      params = optax.apply_updates(params, updates)
      kept = bj.auxiliaries(state)['value']
      for ours, theirs in ((params.upper, x), (params.lower, y)):
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol)
      # Logits are the same policy up to a shift in each state.
      np.testing.assert_allclose(
        np_softmax(np.asarray(kept)), np_softmax(w), rtol=5 * rtol, atol=rtol
      )
      for name, value in values.items():
        np.testing.assert_allclose(
          bj.values(state)[name], value, rtol=rtol, atol=rtol
        )


def test_an_unknown_form_is_named():
  with pytest.raises(ValueError, match="'value' or 'bellman', got 'both'"):
    _row(None, 1.0, 0.1, form='both')
