"""The table that every solver, link, aggregator, oracle and wrapper is in.

To add a method, add a row: `contract_test` runs all that applies to it. A row
is always a whole solver, the method in its natural place in a chain, on one of
two problems whose solution is known in closed form:

- nested, one quadratic a coordinate: the upper loss
  `(x - T)^2 / 2 + (y - c)^2 / 2`, the lower loss `H (y - A x - d)^2 / 2`, means
  over examples c and d of a batch;
- flat: the upper loss's second half, in y alone.
"""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj

EXAMPLES = 16
INNER = 3  # Steps of the solvers with an inner loop.
A = np.array([0.5, 0.8])
H = np.array([1.0, 0.5])
T = np.array([1.0, 0.5])
# What c and d are on average, in the batch of `solved_batch`.
C = np.array([2.0, 2.5])
D = np.array([0.3, 0.4])
PENALTY, RATE = 2.0, 0.3
# Exact in float32, for a solution in float64.
X_MOST = 0.875  # The upper set: the first coordinate is on its boundary.
Y_MOST = 0.625  # The lower set: the second coordinate is.


def _residual(variable, target):
  return variable - target.reshape(-1, 2).astype(variable.dtype)


def upper_loss(x, y, batch):
  fit = (_residual(y['b'], batch['c']) ** 2).sum(-1).mean() / 2
  return fit + ((x['a'] - T.astype(x['a'].dtype)) ** 2).sum() / 2


def lower_loss(x, y, batch):
  error = _residual(y['b'] - A.astype(y['b'].dtype) * x['a'], batch['d'])
  # Returns an auxiliary, as losses may.
  return (H.astype(error.dtype) * error**2).sum(-1).mean() / 2, error


def flat_loss(params, batch):
  return (_residual(params['z'], batch['c']) ** 2).sum(-1).mean() / 2


PROBLEM = bj.BilevelProblem(upper=upper_loss, lower=lower_loss)
X_SET = functools.partial(
  optax.projections.projection_box, lower={'a': -1.0}, upper={'a': X_MOST}
)
Y_SET = functools.partial(
  optax.projections.projection_box,
  lower={'b': jnp.array([-9.0, -9.0])},
  upper={'b': jnp.array([9.0, Y_MOST])},
)


def random_batch(seed: int, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
  """A batch whose examples differ; its first leaf is of whole numbers."""
  one, two = jax.random.split(jax.random.key(seed))
  return {
    'at': jnp.arange(EXAMPLES, dtype=jnp.int32),
    'c': C.astype(dtype) + jax.random.normal(one, (EXAMPLES, 2), dtype),
    'd': D.astype(dtype)
    + jax.random.normal(two, (EXAMPLES, INNER, 2), dtype) / 2,
  }


def solved_batch(dtype: Any = jnp.float32) -> dict[str, jax.Array]:
  """A batch whose means over the examples are C, and D in each inner step."""
  batch = random_batch(0, dtype)
  return batch | {
    'c': batch['c'] - batch['c'].mean(0) + C.astype(dtype),
    'd': batch['d'] - batch['d'].mean(0) + D.astype(dtype),
  }


def inner_batch(batch, t):
  return batch | {'d': jnp.take(batch['d'], t, axis=1)}


def nested_params(seed: int, dtype: Any = jnp.float32) -> bj.BilevelParams:
  x, y = jax.random.uniform(jax.random.key(seed + 100), (2, 2), dtype)
  return bj.BilevelParams(upper={'a': x}, lower={'b': y * 0.5})


def tracked_params(seed: int, dtype: Any = jnp.float32):
  """The two variables, and a value sequence that nothing moves."""
  x, y = nested_params(seed, dtype)
  return bj.sequences(upper=x, lower=y, value={'b': jnp.asarray(W, dtype)})


def flat_params(seed: int, dtype: Any = jnp.float32):
  return {'z': jax.random.normal(jax.random.key(seed + 100), (2,), dtype)}


W = np.array([0.7, 1.1])


def _nested(x, y):
  return {'upper': {'a': x}, 'lower': {'b': y}}


def penalised_solution(h=H, share=1.0):
  """Where the penalised loss is stationary, coordinate by coordinate.

  Args:
    h: the curvature of the penalty in y.
    share: how much of the penalty's slope in x is left; below 1 where the value
      sequence is not at its minimiser.
  """
  x, y = np.zeros(2), np.zeros(2)
  for i in range(2):
    pull = PENALTY * np.broadcast_to(share, 2)[i] * A[i] * h[i]
    matrix = [[1 + pull * A[i], -pull], [-PENALTY * h[i] * A[i], 0]]
    matrix[1][1] = 1 + PENALTY * h[i]
    right = [T[i] - pull * D[i], C[i] + PENALTY * h[i] * D[i]]
    x[i], y[i] = np.linalg.solve(matrix, right)
  return _nested(x, y)


def short_inner_solution():
  """As above, the value sequence INNER steps of descent away from y."""
  return penalised_solution(share=1 - (1 - RATE * H) ** INNER, h=H)


def fixed_value_solution():
  """As above, the value sequence at W."""
  x, y = np.zeros(2), np.zeros(2)
  for i in range(2):
    pull = PENALTY * H[i]
    matrix = [[1, -pull * A[i]], [-pull * A[i], 1 + pull]]
    right = [T[i] - pull * A[i] * W[i], C[i] + pull * D[i]]
    x[i], y[i] = np.linalg.solve(matrix, right)
  return _nested(x, y)


def constrained_solution(h=H, by_gap=True):
  """The first coordinate of x and the second of y are at their bounds."""
  free = penalised_solution(h)
  assert free['upper']['a'][0] > X_MOST and free['lower']['b'][1] > Y_MOST
  pull = PENALTY * h
  y0 = (C[0] + pull[0] * (A[0] * X_MOST + D[0])) / (1 + pull[0])
  if by_gap:  # The value sequence is at the bound as well: no slope is left.
    x1 = T[1]
    assert A[1] * x1 + D[1] > Y_MOST
  else:
    x1 = (T[1] + pull[1] * A[1] * (Y_MOST - D[1])) / (1 + pull[1] * A[1] ** 2)
  return _nested(np.array([X_MOST, x1]), np.array([y0, Y_MOST]))


def unrolled_solution(last=INNER):
  """Where the upper loss is stationary along the last inner steps from y."""
  slope = A * (1 - (1 - RATE * H) ** last)
  x = (T + slope * (C - D)) / (1 + slope * A)
  return _nested(x, A * x + D)


def unrolled_from_zero_solution():
  """As above, all INNER steps, each time from zero."""
  share = 1 - (1 - RATE * H) ** INNER
  x = (T + share * A * (C - share * D)) / (1 + (share * A) ** 2)
  return _nested(x, share * (A * x + D))


def unrolled_in_sets_solution():
  """The bounds hold both: no slope is left through the second coordinate."""
  x = np.array([X_MOST, T[1]])
  assert unrolled_solution()['upper']['a'][0] > X_MOST
  assert A[1] * x[1] + D[1] > Y_MOST
  return _nested(x, np.array([A[0] * x[0] + D[0], Y_MOST]))


def nested_solution(x_most=np.inf):
  """The solution of the nested problem itself, x at most x_most."""
  x = np.minimum((T + A * (C - D)) / (1 + A**2), x_most)
  return _nested(x, A * x + D)


def lower_solution():
  """X at its own minimum, y at the minimum of the lower loss there."""
  return _nested(T, A * T + D)


def short_barrier_solution():
  """As above, the penalty's slope in x as short as the inner loop leaves it."""
  share = 1 - (1 - RATE * H) ** INNER
  x = (T + share * A * (C - D)) / (1 + share * A**2)
  return _nested(x, A * x + D)


class Row(NamedTuple):
  """One method, and what is true of it.

  Attributes:
    name: of the row.
    covers: the public names that this row is for.
    kind: solver, link, aggregator, oracle or wrapper.
    make: `make(wrap, **hyper)` gives a solver; `wrap` is for its oracles.
    params: gives parameters from a seed and a dtype.
    solution: gives the fixed point, by name of a sequence or a leaf.
    counts: evaluations in one update, by the keys of `bj.counts`.
    random_counts: further keys, of what is drawn at random.
    hyper: the numbers that `make` takes, for `inject_hyperparams`.
    schedules: those of them that may be schedules.
    sets: the sequences that stay in a set, by name.
    spacings: how many spacings of floats they can be outside by rounding.
    same_as: the name of another row with the same updates.
    steps: how many steps find the solution, in float64.
    tolerance: of the solution, absolute.
    linear: whether losses and gradients are means over the examples.
    keys: whether the state holds a key: then parts of a batch see others.
    maps: whether the solver maps a named axis of its own.
    wraps: whether `make` gives `wrap` its oracles; else a step is no mean over
      parts of a batch.
    alike: whether another row has the same parts but for a formula on a Gram
      matrix; then the dearer tests run with `-m slow` only.
  """

  name: str
  covers: tuple[str, ...]
  kind: str
  make: Callable[..., optax.GradientTransformationExtraArgs]
  solution: Callable[[], Any]
  counts: Mapping[str, int]
  params: Callable[..., Any] = nested_params
  random_counts: tuple[str, ...] = ()
  hyper: Mapping[str, float] = {'penalty': PENALTY, 'rate': RATE}
  schedules: tuple[str, ...] = ('penalty', 'rate')
  sets: Mapping[str, Any] = {}
  spacings: int = 1
  same_as: str | None = None
  steps: int = 600
  tolerance: float = 1e-9
  linear: bool = True
  keys: bool = False
  maps: bool = False
  wraps: bool = True
  alike: bool = False


_RATE_ONLY = {'hyper': {'rate': RATE}, 'schedules': ('rate',)}
_GAP = {'gradients/upper': 1, 'gradients/lower': 3}
_NORM = {
  'gradients/upper': 1,
  'gradients/lower': 1,
  'hessian_vector_products/lower': 1,
}
_INCREMENTS = {'increments/upper': 1, 'increments/lower': 1}
_LEVELS = {
  'values/level_0': 1,
  'values/level_1': 1,
  'gradients/level_0': 1,
  'gradients/level_1': 1,
  'gradients/level_2': 1,
}
_TRACKED = {
  'hyper': {'rate': RATE, 'tracking': 0.5},
  'schedules': ('rate', 'tracking'),
}
_SLOWER = {
  'hyper': {'rate': 0.1},
  'schedules': ('rate',),
  'steps': 2000,
}
_DECAYED = {
  'hyper': {'rate': RATE, 'decay': 0.4},
  'schedules': ('rate', 'decay'),
}
_UNROLLED = {
  'gradients/upper': 1,
  'gradients/lower': INNER,
  'hessian_vector_products/lower': INNER,
}
_PROX = {
  'gradients/upper': 1,
  'gradients/lower': 1,
  'hessian_vector_products/lower': 23,
}
_BARRIER = {
  'hyper': {'eta': 1.0, 'rate': RATE},
  'schedules': ('eta', 'rate'),
  'steps': 40_000,
  'tolerance': 1e-3,
}
_EXACT = {
  'hyper': {'penalty': 3.5, 'rate': RATE},
  'wraps': False,
  'tolerance': 1e-8,
}
_HYPER = {'gradients/upper': 1, 'hessian_vector_products/lower': 3}
_X_SET = {'upper_set': X_SET}
_XY_SETS = {'upper_set': X_SET, 'lower_set': Y_SET}


def _v_pbgd(wrap, penalty, rate, **kwargs):
  sgd = optax.sgd(rate)
  return bj.v_pbgd(
    PROBLEM, penalty=penalty, upper=sgd, lower=sgd, wrap=wrap, **kwargs
  )


def _g_pbgd(wrap, penalty, rate, **kwargs):
  sgd = optax.sgd(rate)
  return bj.g_pbgd(
    PROBLEM, penalty=penalty, upper=sgd, lower=sgd, wrap=wrap, **kwargs
  )


def _rhg(wrap, rate, **kwargs):
  sgd = optax.sgd(rate)
  return bj.rhg(
    PROBLEM,
    upper=sgd,
    lower=sgd,
    inner_steps=INNER,
    inner_batch=inner_batch,
    wrap=wrap,
    **kwargs,
  )


def _t_rhg(wrap, rate):
  sgd = optax.sgd(rate)
  return bj.t_rhg(
    PROBLEM,
    truncate=2,
    upper=sgd,
    lower=sgd,
    inner_steps=INNER,
    inner_batch=inner_batch,
    wrap=wrap,
  )


def _unrolled(wrap, rate):
  oracle = bj.unrolled(
    PROBLEM, lower=optax.sgd(rate), steps=INNER, inner_batch=inner_batch
  )
  move = bj.per_sequence(upper=optax.sgd(rate), lower=optax.sgd(1.0))
  return optax.chain(wrap(oracle), move)


def _f2sa(wrap, penalty, rate, **kwargs):
  sgd = optax.sgd(rate)
  return bj.f2sa(
    PROBLEM, penalty=penalty, upper=sgd, lower=sgd, wrap=wrap, **kwargs
  )


def _slow_down(rate):
  """Descent whose steps fall: a barrier needs it for the last digits."""
  falling = optax.scale_by_schedule(lambda k: 1 / (1 + k / 40))
  return optax.chain(optax.sgd(rate), falling)


def _bome(wrap, eta, rate, **kwargs):
  slower = _slow_down(rate)
  return bj.bome(
    PROBLEM,
    eta=eta,
    upper=slower,
    lower=slower,
    value=optax.sgd(rate),
    inner_steps=INNER,
    inner_batch=inner_batch,
    wrap=wrap,
    **kwargs,
  )


def _dynamic_barrier(wrap, eta, rate):
  slower = _slow_down(rate)
  return optax.chain(
    wrap(bj.gradient_norm(PROBLEM)),
    bj.aggregators.dynamic_barrier(eta),
    bj.per_sequence(upper=slower, lower=slower),
  )


def _v_pbsgd(wrap, penalty, rate, **kwargs):
  sgd = optax.sgd(rate)
  return bj.solvers.v_pbsgd(
    PROBLEM,
    penalty=penalty,
    upper=sgd,
    lower=sgd,
    value_rate=rate,
    inner_steps=1,
    key=jax.random.key(7),
    wrap=wrap,
    **kwargs,
  )


def _prox_linear_pbgd(wrap, penalty, rate, **kwargs):
  del wrap
  return bj.solvers.prox_linear_pbgd(PROBLEM, penalty=penalty, step=rate, **kwargs)


def _prox_linear(wrap, penalty, rate):
  del wrap
  move = bj.per_sequence(upper=optax.sgd(rate), lower=optax.sgd(rate))
  return optax.chain(bj.prox_linear(PROBLEM, penalty=penalty, step=rate), move)


def _optimiser(optimiser):
  return lambda wrap, rate: optax.chain(
    wrap(bj.gradient(flat_loss)), optimiser(rate)
  )


def _fixed_value(oracle, *links):
  """An oracle on given sequences, without what moves the value sequence."""

  def make(wrap, penalty, rate):
    given = {} if links else {'penalty': penalty}
    weigh = [link(penalty) for link in links]
    sgd = optax.sgd(rate)
    move = bj.per_sequence(upper=sgd, lower=sgd)
    return optax.chain(wrap(oracle(PROBLEM, **given)), *weigh, move)

  return make


def _to_target(sequence):
  x = sequence['a']
  return ((x - T.astype(x.dtype)) ** 2).sum()


def _own_loss(name):
  """The loss of one sequence: x at T, or y at the lower minimiser."""
  return {
    'upper': lambda params, batch: _to_target(params.upper),
    'lower': lambda params, batch: lower_loss(
      params.upper, params.lower, batch
    ),
  }[name]


def descent(wrap, name, rate):
  return optax.chain(
    wrap(bj.gradient(_own_loss(name), name=name, of=name)),
    bj.per_sequence(**{name: optax.sgd(rate)}),
  )


def _alternate(wrap, rate):
  return bj.alternate(
    descent(wrap, 'upper', rate), descent(wrap, 'lower', rate)
  )


def _repeat(wrap, rate):
  lower = descent(wrap, 'lower', rate)
  return bj.alternate(
    descent(wrap, 'upper', rate), bj.repeat(lower, INNER, inner_batch)
  )


def _both_losses(params, batch):
  return (
    _own_loss('upper')(params, batch) + _own_loss('lower')(params, batch)[0]
  )


def _repeat_drawn(wrap, rate):
  lower = descent(wrap, 'lower', rate)
  return bj.alternate(
    descent(wrap, 'upper', rate),
    bj.repeat_drawn(
      lower,
      INNER,
      lambda t: 1 / (1.0 + t),
      key=jax.random.key(7),
      batch_at=inner_batch,
    ),
  )


def _per_sequence(wrap, rate):
  # x also feels the lower loss, so its descent ends where both slopes are 0.
  return optax.chain(
    wrap(bj.gradient(_both_losses)),
    bj.per_sequence(upper=optax.sgd(rate), lower=optax.sgd(rate, momentum=0.5)),
  )


def _project(wrap, rate):
  return optax.chain(descent(wrap, 'upper', rate), bj.project(upper=X_SET))


def _auxiliary(wrap, rate):
  """Y follows an average of x's minimiser that is kept in state."""

  def far(params, batch):
    del batch
    return _to_target(params.average)

  def near(params, batch):
    del batch
    return ((params.lower['b'] - params.average['a']) ** 2).sum()

  parts = []
  for loss, name in ((far, 'average'), (near, 'lower')):
    parts.append(
      optax.chain(
        wrap(bj.gradient(loss, name=name, of=name)),
        bj.per_sequence(**{name: optax.sgd(rate)}),
      )
    )
  return bj.auxiliary(bj.alternate(*parts), average=lambda p: p.upper)


def _accumulate(wrap, rate):
  oracle = bj.evaluation.accumulate(wrap(bj.gradient(flat_loss)), 2)
  return optax.chain(oracle, optax.sgd(rate))


def _storm(wrap, rate, decay):
  return optax.chain(
    bj.evaluation.storm(wrap(bj.gradient(flat_loss)), decay), optax.sgd(rate)
  )


def _saga(wrap, rate):
  oracle = bj.evaluation.saga(wrap(bj.gradient(flat_loss)), 2)
  return optax.chain(oracle, optax.sgd(rate))


def _minus(tree):
  return jax.tree.map(jnp.negative, tree)


INCREMENTS = {
  'upper': lambda params, batch: _minus(jax.grad(_to_target)(params.upper)),
  'lower': lambda params, batch: _minus(
    jax.grad(lower_loss, 1, has_aux=True)(params.upper, params.lower, batch)[0]
  ),
}


def _stsa(wrap, rate, **kwargs):
  return bj.stsa(INCREMENTS, steps=rate, wrap=wrap, **kwargs)


def _coupled(wrap, rate):
  move = bj.per_sequence(upper=optax.sgd(rate), lower=optax.sgd(rate))
  return optax.chain(wrap(bj.coupled(INCREMENTS)), move)


def _first_level(x, batch):
  return A.astype(x['a'].dtype) * x['a'] + batch['d'].mean((0, 1))


def _second_level(y, batch):
  return {'b': 2 * y, 'c': y}


def _last_level(z, batch):
  fit = (_residual(z['b'] / 2, batch['c']) ** 2).sum(-1).mean() / 2
  # The same twice: its slope comes by two ways.
  return fit + ((z['c'] - z['b'] / 2) ** 2).sum()


LEVELS = (_first_level, _second_level, _last_level)


def main_params(seed: int, dtype: Any = jnp.float32):
  return bj.sequences(main=nested_params(seed, dtype).upper)


def _level_starts(params):
  zero = jnp.zeros_like(params.main['a'])
  return zero, {'b': zero + 1, 'c': jnp.zeros_like(zero)}


def levels_params(seed: int, dtype: Any = jnp.float32):
  main = main_params(seed, dtype).main
  one, two = _level_starts(bj.sequences(main=main))
  return bj.sequences(main=main, level_1=one, level_2=two)


def _compositional(method, **more):
  def make(wrap, rate, tracking, **kwargs):
    return getattr(bj, method)(
      LEVELS,
      main=optax.sgd(rate),
      tracking=tracking,
      levels=_level_starts,
      wrap=wrap,
      **more,
      **kwargs,
    )

  return make


def _compositional_oracle(wrap, rate, tracking):
  levels = {f'level_{n}': optax.sgd(tracking) for n in (1, 2)}
  return optax.chain(
    wrap(bj.compositional(LEVELS)),
    bj.per_sequence(main=optax.sgd(rate), **levels),
  )


def composition_solution(x_most=np.inf):
  return {'main': {'a': np.minimum((C - D) / A, x_most)}}


def _single_loop(method, **more):
  def make(wrap, rate, **kwargs):
    return getattr(bj, method)(
      PROBLEM,
      upper=optax.sgd(rate),
      lower=optax.sgd(rate),
      wrap=wrap,
      **more,
      **kwargs,
    )

  return make


def _decaying(method, **more):
  def make(wrap, rate, decay):
    return _single_loop(method, decay=decay, **more)(wrap, rate)

  return make


def _pzobo(wrap, rate):
  return bj.solvers.pzobo(
    PROBLEM,
    upper=optax.sgd(rate),
    step_size=RATE,
    inner_steps=INNER,
    inner_batch=inner_batch,
    smoothing=0.5,
    directions=2,
    wrap=wrap,
  )


def _meha(wrap, penalty, rate):
  sgd = optax.sgd(rate)
  return bj.meha(
    PROBLEM, penalty=penalty, proximity=2.0, upper=sgd, lower=sgd, wrap=wrap
  )


def series_solution(terms=3, step_size=0.5):
  """The nested solution with the first terms of the series for an inverse."""
  share = A**2 * (1 - (1 - step_size * H) ** terms)
  x = (T + share / A * (C - D)) / (1 + share)
  return _nested(x, A * x + D)


def _implicit_directions(wrap, rate):
  sgd = optax.sgd(rate)
  return optax.chain(
    wrap(bj.implicit_directions(PROBLEM)),
    bj.per_sequence(upper=sgd, lower=sgd, linear=sgd),
  )


def linear_params(seed: int, dtype: Any = jnp.float32):
  x, y = nested_params(seed, dtype)
  return bj.sequences(upper=x, lower=y, linear={'b': jnp.asarray(W, dtype)})


def _mean_over(wrap, rate):
  """The axis is one of parts, so that it runs on one device as well."""
  oracle = bj.evaluation.mean_over(wrap(bj.gradient(flat_loss)), 'parts')

  def update_fn(batch, state, params=None, **extra_args):
    over = jax.vmap(
      lambda part: oracle.update(part, state, params, **extra_args),
      axis_name='parts',
      out_axes=None,
    )
    return over(bj.evaluation.split_batch(batch, 2))

  mapped = optax.GradientTransformationExtraArgs(oracle.init, update_fn)
  return optax.chain(mapped, optax.sgd(rate))


def _random_oracle(wrap, rate):
  """Noise multiplies the slope, so that the solution stays where it is."""

  def fn(params, batch, key):
    key, now = jax.random.split(key)
    value, slope = jax.value_and_grad(flat_loss)(params, batch)
    scale = jax.random.uniform(now, (), slope['z'].dtype, 0.5, 1.5)
    return (value,), jax.tree.map(lambda s: s * scale, slope), key

  oracle = bj.oracle(
    fn,
    ('loss',),
    lambda params: jax.random.key(7),
    counts={'gradients/loss': 1},
  )
  return optax.chain(wrap(oracle), optax.sgd(rate))


def _flat_solution():
  return {'z': C}


# Curvatures of three objectives with one minimiser: not two, so that no array
# over objectives has the shape of the parameters.
CURVES = np.array([[0.5, 0.2], [0.3, 0.6], [0.4, 0.4]])
OBJECTIVES = len(CURVES)


def three_losses(params, batch):
  square = (_residual(params['z'], batch['c']) ** 2).mean(0) / 2
  return jnp.asarray(CURVES, square.dtype) @ square


def headed_losses(params, batch):
  """The same, and a head for each objective."""
  heads = [(_residual(head, batch['c']) ** 2).mean() for head in params.heads]
  return three_losses(params.shared, batch) + jnp.stack(heads)


def headed_params(seed: int, dtype: Any = jnp.float32):
  return bj.sequences(
    shared=flat_params(seed, dtype),
    heads=tuple(jnp.zeros(2, dtype) for _ in range(OBJECTIVES)),
  )


def _aggregated(aggregator, samples=1, **given):
  """Three objectives, and an aggregator with its hyperparameters."""

  def make(wrap, rate, **hyper):
    oracle = wrap(bj.multi_objective(three_losses, OBJECTIVES, **given))
    if samples > 1:
      oracle = bj.evaluation.independent(oracle, samples)
    return optax.chain(oracle, aggregator(OBJECTIVES, **hyper), optax.sgd(rate))

  return make


def _fused_moco(wrap, rate, **hyper):
  """What averages Jacobians cannot be inside the fused form."""
  oracle = bj.multi_objective(three_losses, OBJECTIVES)
  if wrap(oracle) is not oracle:
    return _aggregated(bj.aggregators.moco)(wrap, rate, **hyper)
  fused = bj.oracles.fused_moco(three_losses, OBJECTIVES, **hyper)
  return optax.chain(fused, optax.sgd(rate))


def _headed(wrap, rate):
  oracle = wrap(bj.multi_objective(headed_losses, OBJECTIVES, rest=('heads',)))
  sgd = optax.sgd(rate)
  return optax.chain(
    oracle,
    bj.aggregators.moco(OBJECTIVES, tracking=0.5, rest=('heads',)),
    bj.per_sequence(shared=sgd, heads=sgd),
  )


def _moco_plus(wrap, rate, decay):
  return optax.chain(
    bj.solvers.moco_plus(three_losses, OBJECTIVES, decay=decay, wrap=wrap),
    optax.sgd(rate),
  )


def _famo(wrap, rate):
  return bj.solvers.famo(three_losses, OBJECTIVES, optimiser=optax.sgd(rate), wrap=wrap)


def _aggregator_row(name, aggregator, samples=1, *, covers=(), **more):
  gradients = {'gradients/objectives': OBJECTIVES * samples}
  hyper = {'rate': RATE} | more.pop('hyper', {})
  return Row(
    name,
    (name.split()[0], *covers),
    'aggregator',
    more.pop('make', None) or _aggregated(aggregator, samples),
    _flat_solution,
    gradients,
    params=more.pop('params', flat_params),
    hyper=hyper,
    schedules=more.pop('schedules', tuple(hyper)),
    **more,
  )


def _keyed(aggregator):
  return lambda objectives, **hyper: aggregator(
    objectives, key=jax.random.key(3), **hyper
  )


_MOCO = {'tracking': 0.5, 'weight_step': 2.0}
AGGREGATORS = (
  _aggregator_row('mean', bj.aggregators.mean, covers=('multi_objective',)),
  _aggregator_row(
    'mean of rows made at once',
    None,
    make=_aggregated(bj.aggregators.mean, by='vmap'),
    same_as='mean',
    alike=True,
  ),
  _aggregator_row(
    'weighted', lambda n: bj.aggregators.weighted([0.5, 0.3, 0.4]), alike=True
  ),
  _aggregator_row('mgda', bj.aggregators.mgda),
  _aggregator_row('smg', bj.aggregators.smg, same_as='mgda', alike=True),
  _aggregator_row('pcgrad', _keyed(bj.aggregators.pcgrad), keys=True, alike=True),
  _aggregator_row('grad_vac', _keyed(bj.aggregators.grad_vac), keys=True, alike=True),
  _aggregator_row('grad_drop', _keyed(bj.aggregators.grad_drop), keys=True),
  _aggregator_row(
    'cagrad',
    bj.aggregators.cagrad,
    hyper={'radius': 0.4},
    schedules=('rate',),
  ),
  _aggregator_row('imtl_g', bj.aggregators.imtl_g, alike=True),
  _aggregator_row(
    'nash_mtl', functools.partial(bj.aggregators.nash_mtl, normalise=True), alike=True
  ),
  _aggregator_row('aligned_mtl', bj.aggregators.aligned_mtl, steps=2000, alike=True),
  _aggregator_row('upgrad', bj.aggregators.upgrad),
  _aggregator_row('dual_proj', bj.aggregators.dual_proj, alike=True),
  _aggregator_row(
    'stch', bj.aggregators.stch, hyper={'smoothing': 0.1}, steps=2000, alike=True
  ),
  _aggregator_row('uncertainty_weighting', bj.aggregators.uncertainty_weighting),
  _aggregator_row('moco', bj.aggregators.moco, hyper=_MOCO),
  _aggregator_row(
    'moco with exact weights',
    functools.partial(bj.aggregators.moco, exact=True, regularisation=0.1, radius=9.0),
    hyper={'tracking': 0.5},
    alike=True,
  ),
  _aggregator_row(
    'moco with heads',
    None,
    make=_headed,
    params=headed_params,
  )._replace(solution=lambda: {'shared': {'z': C}, 'heads': (C,) * OBJECTIVES}),
  _aggregator_row(
    'fused_moco', None, make=_fused_moco, hyper=_MOCO, same_as='moco'
  )._replace(kind='oracle', wraps=False),
  _aggregator_row(
    'modo',
    functools.partial(bj.aggregators.modo, samples=2),
    samples=2,
    covers=('independent',),
    hyper={'weight_step': 0.3},
  ),
  _aggregator_row(
    'sdmgrad', functools.partial(bj.aggregators.sdmgrad, samples=2), 2, alike=True
  ),
  _aggregator_row(
    'moco_plus', None, 2, make=_moco_plus, hyper={'decay': 0.5}
  )._replace(kind='solver'),
  _aggregator_row('famo', None, make=_famo)._replace(
    kind='solver', counts={'gradients/weighted': 1}
  ),
)


# Equations: x on a line; y too, on one that moves with x.
X_LINE = bj.projections.affine_set([[1.0, 1.0], [2.0, 2.0]], [1.25, 2.5])
Y_LINE = bj.projections.affine_set(
  [[1.0, -0.5]], [0.4], coupling=lambda x: -0.25 * x['a'][:1]
)


def _equations(lines, right):
  """The optimality system of least squares under equations, solved."""

  def solve(hessian, slope):
    size, rows = len(slope), len(right)
    matrix = np.block([[hessian, lines.T], [lines, np.zeros((rows, rows))]])
    return np.linalg.solve(matrix, np.concatenate([slope, right]))[:size]

  return solve


def implicit_solution(x_line=False, y_line=False, moves=0.0):
  """Where the upper loss is least at the lower minimiser, by linear algebra.

  Args:
    x_line: whether x is on its line.
    y_line: whether y is on its line.
    moves: how far that line moves with the first coordinate of x.
  """
  line = np.array([[1.0, -0.5]])

  def lower(x):
    if not y_line:
      return A * x + D
    solve = _equations(line, [0.4 + moves * x[0]])
    return solve(np.diag(H), H * (A * x + D))

  start = lower(np.zeros(2))
  slope = np.stack([lower(e) - start for e in np.eye(2)], axis=1)
  hessian = np.eye(2) + slope.T @ slope
  target = T + slope.T @ (C - start)
  if x_line:
    x = _equations(np.ones((1, 2)), [1.25])(hessian, target)
  else:
    x = np.linalg.solve(hessian, target)
  return _nested(x, lower(x))


def unit_hessian_solution():
  """As above, with the lower Hessian replaced by 1 in the linear system."""
  x = (T + A * H * (C - D)) / (1 + A**2 * H)
  return _nested(x, A * x + D)


# A step count of the linear solver that is exact in two dimensions.
_EXACT_SOLVE = bj.linear_solvers.conjugate_gradient(2)


def _aid(wrap, rate, solver=bj.aid_bilevel, **kwargs):
  sgd = optax.sgd(rate)
  given = {'solve': _EXACT_SOLVE} | kwargs
  return solver(PROBLEM, upper=sgd, lower=sgd, wrap=wrap, **given)


def _e_aipod(wrap, rate, probability=0.5, **kwargs):
  return _aid(
    wrap,
    rate,
    bj.e_aipod,
    probability=probability,
    upper_set=X_LINE,
    lower_set=Y_LINE,
    **kwargs,
  )


def _lazy_projection(wrap, rate):
  return optax.chain(
    descent(wrap, 'upper', rate),
    bj.lazy_projection(0.5, key=3, upper=X_LINE),
  )


def _line_solution():
  return {'upper': {'a': T + (1.25 - T.sum()) / 2}}


ROWS = (
  Row(
    'v_pbgd',
    ('v_pbgd',),
    'solver',
    _v_pbgd,
    penalised_solution,
    _GAP,
  ),
  Row(
    'v_pbgd by rows',
    ('v_pbgd',),
    'solver',
    functools.partial(_v_pbgd, fused=False),
    penalised_solution,
    _GAP,
    same_as='v_pbgd',
  ),
  Row(
    'v_pbgd from the lower variable, three inner batches',
    ('v_pbgd',),
    'solver',
    functools.partial(
      _v_pbgd, start='lower', inner_steps=INNER, inner_batch=inner_batch
    ),
    short_inner_solution,
    {'gradients/upper': 1, 'gradients/lower': 2 + INNER},
  ),
  Row(
    'v_pbgd in sets',
    ('v_pbgd',),
    'solver',
    functools.partial(_v_pbgd, **_XY_SETS),
    constrained_solution,
    _GAP
    | {'projections/upper': 1, 'projections/lower': 1, 'projections/value': 1},
    sets={'upper': X_SET, 'lower': Y_SET, 'value': Y_SET},
  ),
  Row(
    'g_pbgd',
    ('g_pbgd',),
    'solver',
    _g_pbgd,
    functools.partial(penalised_solution, H**2),
    _NORM,
    linear=False,
  ),
  Row(
    'g_pbgd by rows',
    ('g_pbgd',),
    'solver',
    functools.partial(_g_pbgd, fused=False),
    functools.partial(penalised_solution, H**2),
    _NORM,
    same_as='g_pbgd',
    linear=False,
  ),
  Row(
    'g_pbgd in sets',
    ('g_pbgd',),
    'solver',
    functools.partial(_g_pbgd, **_XY_SETS),
    functools.partial(constrained_solution, H**2, by_gap=False),
    _NORM | {'projections/upper': 1, 'projections/lower': 1},
    sets={'upper': X_SET, 'lower': Y_SET},
    linear=False,
  ),
  Row(
    'rhg',
    ('rhg',),
    'solver',
    _rhg,
    unrolled_solution,
    _UNROLLED,
    linear=False,
    **_RATE_ONLY,
  ),
  Row(
    'rhg, forward',
    ('rhg',),
    'solver',
    functools.partial(_rhg, mode='forward'),
    unrolled_solution,
    _UNROLLED | {'hessian_vector_products/lower': 2 * INNER},
    same_as='rhg',
    linear=False,
    **_RATE_ONLY,
  ),
  Row(
    'rhg from zero',
    ('rhg',),
    'solver',
    functools.partial(
      _rhg, reset=lambda params, batch: optax.tree.zeros_like(params.lower)
    ),
    unrolled_from_zero_solution,
    _UNROLLED,
    linear=False,
    **_RATE_ONLY,
  ),
  Row(
    'rhg in sets',
    ('rhg',),
    'solver',
    functools.partial(_rhg, **_XY_SETS),
    unrolled_in_sets_solution,
    _UNROLLED | {'projections/upper': 1},
    sets={'upper': X_SET, 'lower': Y_SET},
    wraps=False,
    linear=False,
    **_RATE_ONLY,
  ),
  Row(
    't_rhg',
    ('t_rhg',),
    'solver',
    _t_rhg,
    functools.partial(unrolled_solution, 2),
    _UNROLLED | {'hessian_vector_products/lower': 2},
    linear=False,
    **_RATE_ONLY,
  ),
  Row(
    'unrolled',
    ('unrolled',),
    'oracle',
    _unrolled,
    unrolled_solution,
    _UNROLLED,
    same_as='rhg',
    linear=False,
    **_RATE_ONLY,
  ),
  Row(
    'f2sa in one loop',
    ('f2sa',),
    'solver',
    _f2sa,
    penalised_solution,
    {'gradients/upper': 1, 'gradients/lower': 2},
  ),
  Row(
    'f2sa in two loops',
    ('f2sa',),
    'solver',
    functools.partial(_f2sa, inner_steps=INNER, inner_batch=inner_batch),
    penalised_solution,
    {'gradients/upper': 1 + INNER, 'gradients/lower': 2 * (1 + INNER)},
  ),
  Row(
    'f2sa in two loops, in sets',
    ('f2sa',),
    'solver',
    functools.partial(_f2sa, inner_steps=INNER, **_XY_SETS),
    constrained_solution,
    {
      'gradients/upper': 1 + INNER,
      'gradients/lower': 2 * (1 + INNER),
      'projections/upper': 1,
      'projections/lower': INNER,
      'projections/value': INNER,
    },
    sets={'upper': X_SET, 'lower': Y_SET, 'value': Y_SET},
  ),
  Row(
    'bome',
    ('bome',),
    'solver',
    _bome,
    short_barrier_solution,
    {'gradients/upper': 1, 'gradients/lower': 2 + INNER},
    **_BARRIER,
  ),
  Row(
    'dynamic_barrier',
    ('dynamic_barrier',),
    'aggregator',
    _dynamic_barrier,
    nested_solution,
    _NORM,
    linear=False,
    **_BARRIER,
  ),
  Row(
    'v_pbsgd',
    ('v_pbsgd',),
    'solver',
    _v_pbsgd,
    functools.partial(penalised_solution, share=RATE * H),
    _GAP,
    keys=True,
  ),
  Row(
    'prox_linear_pbgd',
    ('prox_linear_pbgd',),
    'solver',
    _prox_linear_pbgd,
    nested_solution,
    _PROX,
    **_EXACT,
  ),
  Row(
    'prox_linear_pbgd in a set',
    ('prox_linear_pbgd',),
    'solver',
    functools.partial(_prox_linear_pbgd, **_X_SET),
    functools.partial(nested_solution, X_MOST),
    # Once an iteration, once for the step, once for its rounding.
    _PROX | {'projections/upper': 12},
    sets={'upper': X_SET},
    **_EXACT,
  ),
  Row(
    'prox_linear',
    ('prox_linear',),
    'oracle',
    _prox_linear,
    nested_solution,
    _PROX,
    same_as='prox_linear_pbgd',
    **_EXACT,
  ),
  Row(
    'gradient, sgd',
    ('gradient',),
    'oracle',
    _optimiser(optax.sgd),
    _flat_solution,
    {'gradients/loss': 1},
    params=flat_params,
    **_RATE_ONLY,
  ),
  Row(
    'gradient, adam',
    ('gradient',),
    'oracle',
    _optimiser(optax.adam),
    _flat_solution,
    {'gradients/loss': 1},
    params=flat_params,
    hyper={'rate': 0.03},
    schedules=('rate',),
    steps=3000,
    tolerance=1e-5,
  ),
  Row(
    'oracle with a key',
    ('oracle',),
    'oracle',
    _random_oracle,
    _flat_solution,
    {'gradients/loss': 1},
    params=flat_params,
    keys=True,
    **_RATE_ONLY,
  ),
  Row(
    'value_gap',
    ('value_gap',),
    'oracle',
    _fixed_value(bj.value_gap),
    fixed_value_solution,
    {'gradients/upper': 1, 'gradients/lower': 2},
    params=tracked_params,
    same_as='scale_by_penalty',
  ),
  Row(
    'scale_by_penalty',
    ('scale_by_penalty',),
    'aggregator',
    _fixed_value(bj.value_gap, bj.aggregators.scale_by_penalty),
    fixed_value_solution,
    {'gradients/upper': 1, 'gradients/lower': 2},
    params=tracked_params,
  ),
  Row(
    'gradient_norm',
    ('gradient_norm',),
    'oracle',
    _fixed_value(bj.gradient_norm),
    functools.partial(penalised_solution, H**2),
    _NORM,
    same_as='g_pbgd',
    linear=False,
  ),
  Row(
    'per_sequence',
    ('per_sequence',),
    'link',
    _per_sequence,
    lower_solution,
    {'gradients/loss': 1},
    **_RATE_ONLY,
  ),
  Row(
    'project',
    ('project',),
    'link',
    _project,
    lambda: {'upper': {'a': np.minimum(T, X_MOST)}},
    {'gradients/upper': 1, 'projections/upper': 1},
    sets={'upper': X_SET},
    **_RATE_ONLY,
  ),
  Row(
    'lazy_projection',
    ('lazy_projection',),
    'link',
    _lazy_projection,
    _line_solution,
    {'gradients/upper': 1},
    random_counts=('projections/upper',),
    keys=True,
    **_RATE_ONLY,
  ),
  Row(
    'aid_bilevel',
    ('aid_bilevel', 'implicit'),
    'solver',
    _aid,
    implicit_solution,
    {'gradients/lower': 1, **_HYPER, 'hessian_vector_products/lower': 4},
    linear=False,
    **_RATE_ONLY,
  ),
  Row(
    'aid_bilevel by a random Neumann series, three inner batches',
    ('aid_bilevel',),
    'solver',
    functools.partial(
      _aid,
      solve=bj.linear_solvers.random_neumann(1, 1.0),
      inner_steps=INNER,
      inner_batch=inner_batch,
    ),
    # One term with step 1: the lower Hessian counts as the identity.
    unit_hessian_solution,
    {'gradients/lower': INNER, **_HYPER, 'hessian_vector_products/lower': 1},
    keys=True,
    linear=False,
    **_RATE_ONLY,
  ),
  Row(
    'aipod',
    ('aipod',),
    'solver',
    functools.partial(
      _aid, solver=bj.aipod, upper_set=X_LINE, lower_set=Y_LINE
    ),
    functools.partial(implicit_solution, True, True, 0.25),
    {
      'gradients/lower': 1,
      **_HYPER,
      'projections/lower': 1,
      'projections/upper': 1,
    },
    sets={'upper': X_LINE},
    spacings=8,
    linear=False,
    **_RATE_ONLY,
  ),
  Row(
    'e_aipod',
    ('e_aipod',),
    'solver',
    functools.partial(
      _e_aipod,
      inner_steps=INNER,
      inner_batch=inner_batch,
      upper_steps=2,
      relaxation=1.25,
    ),
    functools.partial(implicit_solution, True, True, 0.25),
    {
      'gradients/lower': INNER,
      'gradients/upper': 3,
      'hessian_vector_products/lower': 3,
      'projections/upper': 1,
    },
    random_counts=('projections/lower',),
    sets={'upper': X_LINE},
    spacings=8,
    keys=True,
    linear=False,
    **_RATE_ONLY,
  ),
  Row(
    'alternate',
    ('alternate',),
    'wrapper',
    _alternate,
    lower_solution,
    {'gradients/upper': 1, 'gradients/lower': 1},
    **_RATE_ONLY,
  ),
  Row(
    'repeat',
    ('repeat',),
    'wrapper',
    _repeat,
    lower_solution,
    {'gradients/upper': 1, 'gradients/lower': INNER},
    **_RATE_ONLY,
  ),
  Row(
    'repeat_drawn',
    ('repeat_drawn',),
    'wrapper',
    _repeat_drawn,
    lower_solution,
    {'gradients/upper': 1, 'gradients/lower': INNER},
    keys=True,
    **_RATE_ONLY,
  ),
  Row(
    'auxiliary',
    ('auxiliary',),
    'wrapper',
    _auxiliary,
    lambda: {'lower': {'b': T}},
    {'gradients/average': 1, 'gradients/lower': 1},
    **_RATE_ONLY,
  ),
  Row(
    'accumulate',
    ('accumulate',),
    'wrapper',
    _accumulate,
    _flat_solution,
    {'gradients/loss': 2},
    params=flat_params,
    same_as='gradient, sgd',
    **_RATE_ONLY,
  ),
  Row(
    'storm',
    ('storm',),
    'wrapper',
    _storm,
    _flat_solution,
    {'gradients/loss': 2},
    params=flat_params,
    hyper={'rate': RATE, 'decay': 0.4},
    schedules=('rate', 'decay'),
  ),
  Row(
    'saga',
    ('saga',),
    'wrapper',
    _saga,
    _flat_solution,
    {'gradients/loss': 1},
    params=flat_params,
    **_RATE_ONLY,
  ),
  Row(
    'stsa',
    ('stsa',),
    'solver',
    _stsa,
    lower_solution,
    _INCREMENTS,
    linear=False,
    **_RATE_ONLY,
  ),
  Row(
    'stsa, alternating, in a set',
    ('stsa',),
    'solver',
    functools.partial(_stsa, order='alternating', sets={'upper': X_SET}),
    lambda: _nested(np.minimum(T, X_MOST), A * np.minimum(T, X_MOST) + D),
    _INCREMENTS | {'projections/upper': 1},
    sets={'upper': X_SET},
    linear=False,
    **_RATE_ONLY,
  ),
  Row(
    'coupled',
    ('coupled',),
    'oracle',
    _coupled,
    lower_solution,
    _INCREMENTS,
    same_as='stsa',
    linear=False,
    **_RATE_ONLY,
  ),
  Row(
    'scgd',
    ('scgd',),
    'solver',
    _compositional('scgd'),
    composition_solution,
    _LEVELS,
    params=main_params,
    **_TRACKED,
  ),
  Row(
    'scgd in a set',
    ('scgd',),
    'solver',
    functools.partial(_compositional('scgd'), main_set=X_SET),
    functools.partial(composition_solution, X_MOST),
    _LEVELS | {'projections/main': 1},
    params=main_params,
    sets={'main': X_SET},
    **_TRACKED,
  ),
  Row(
    'nasa',
    ('nasa',),
    'solver',
    _compositional('nasa', averaging=0.5),
    composition_solution,
    _LEVELS,
    params=main_params,
    **_TRACKED,
  ),
  Row(
    'scsc',
    ('scsc',),
    'solver',
    _compositional('scsc'),
    composition_solution,
    _LEVELS | {'values/level_0': 3, 'values/level_1': 3},
    params=main_params,
    **_TRACKED,
  ),
  Row(
    'compositional',
    ('compositional',),
    'oracle',
    _compositional_oracle,
    composition_solution,
    _LEVELS,
    params=levels_params,
    same_as='scgd',
    **_TRACKED,
  ),
  Row(
    'soba',
    ('soba',),
    'solver',
    _single_loop('soba'),
    nested_solution,
    _NORM,
    **_SLOWER,
  ),
  Row(
    'soba in sets',
    ('soba',),
    'solver',
    functools.partial(_single_loop('soba'), upper_set=X_SET, linear_set=Y_SET),
    functools.partial(nested_solution, X_MOST),
    _NORM | {'projections/upper': 1, 'projections/linear': 1},
    sets={'upper': X_SET, 'linear': Y_SET},
    **_SLOWER,
  ),
  Row(
    'ma_soba',
    ('ma_soba',),
    'solver',
    _single_loop('ma_soba', averaging=0.5),
    nested_solution,
    _NORM,
    **_SLOWER,
  ),
  Row(
    'saba',
    ('saba',),
    'solver',
    _single_loop('saba', parts=3),
    nested_solution,
    _NORM,
    **_SLOWER,
  ),
  Row(
    'saba, a table for each loss',
    ('saba',),
    'solver',
    _single_loop('saba', parts=(2, 3)),
    nested_solution,
    _NORM,
    **_SLOWER,
  ),
  Row(
    'bsa',
    ('bsa',),
    'solver',
    _single_loop(
      'bsa', inner_steps=INNER, inner_batch=inner_batch, terms=1, step_size=1.0
    ),
    unit_hessian_solution,
    {'gradients/lower': INNER, **_HYPER, 'hessian_vector_products/lower': 1},
    keys=True,
    linear=False,
    **_RATE_ONLY,
  ),
  Row(
    'ttsa',
    ('ttsa',),
    'solver',
    _single_loop('ttsa', terms=1, step_size=1.0),
    unit_hessian_solution,
    {'gradients/lower': 1, **_HYPER, 'hessian_vector_products/lower': 1},
    keys=True,
    linear=False,
    **_RATE_ONLY,
  ),
  Row(
    'stocbio',
    ('stocbio',),
    'solver',
    _single_loop(
      'stocbio',
      inner_steps=INNER,
      inner_batch=inner_batch,
      terms=2,
      step_size=0.5,
    ),
    series_solution,
    {'gradients/lower': INNER, **_HYPER},
    linear=False,
    **_RATE_ONLY,
  ),
  Row(
    'alset in a set',
    ('alset',),
    'solver',
    _single_loop('alset', terms=2, step_size=0.5, upper_set=X_SET),
    lambda: _nested(
      np.minimum(series_solution()['upper']['a'], X_MOST),
      A * np.minimum(series_solution()['upper']['a'], X_MOST) + D,
    ),
    {'gradients/lower': 1, **_HYPER, 'projections/upper': 1},
    sets={'upper': X_SET},
    linear=False,
    **_RATE_ONLY,
  ),
  Row(
    'amigo',
    ('amigo',),
    'solver',
    _single_loop(
      'amigo',
      inner_steps=INNER,
      inner_batch=inner_batch,
      linear_steps=2,
      step_size=0.5,
    ),
    nested_solution,
    {'gradients/lower': INNER, **_HYPER},
    # A warm start passes from part to part of a batch, as a key does.
    keys=True,
    linear=False,
    **_RATE_ONLY,
  ),
  Row(
    'sustain',
    ('sustain',),
    'solver',
    _decaying('sustain', terms=1, step_size=1.0),
    unit_hessian_solution,
    {
      'gradients/lower': 2,
      'gradients/upper': 2,
      'hessian_vector_products/lower': 2,
    },
    keys=True,
    linear=False,
    **_DECAYED,
  ),
  Row(
    'mrbo',
    ('mrbo',),
    'solver',
    _decaying('mrbo', terms=2, step_size=0.5),
    series_solution,
    {
      'gradients/lower': 2,
      'gradients/upper': 2,
      'hessian_vector_products/lower': 6,
    },
    linear=False,
    **_DECAYED,
  ),
  Row(
    'vrbo',
    ('vrbo',),
    'solver',
    _single_loop('vrbo', terms=2, step_size=0.5, inner_steps=INNER, period=2),
    series_solution,
    {
      'gradients/lower': 2 * INNER,
      'gradients/upper': 2 * INNER,
      'hessian_vector_products/lower': 6 * INNER,
    },
    linear=False,
    **_RATE_ONLY,
  ),
  Row(
    'stable',
    ('stable',),
    'solver',
    # A constant Hessian: the decay of its estimate has no effect.
    _single_loop('stable', decay=0.4, least_curvature=0.1),
    nested_solution,
    {'gradients/lower': 1, 'gradients/upper': 1, 'hessians/lower': 2},
    linear=False,
    **_RATE_ONLY,
  ),
  Row(
    'pzobo',
    ('pzobo',),
    'solver',
    _pzobo,
    unrolled_solution,
    {'gradients/lower': 3 * INNER, 'gradients/upper': 1},
    keys=True,
    linear=False,
    **_RATE_ONLY,
  ),
  Row(
    'meha',
    ('meha',),
    'solver',
    _meha,
    functools.partial(penalised_solution, 2 * H**2 / (1 + 2 * H)),
    _GAP,
  ),
  Row(
    'implicit_directions',
    ('implicit_directions',),
    'oracle',
    _implicit_directions,
    nested_solution,
    _NORM,
    params=linear_params,
    **_SLOWER,
  ),
  Row(
    'mean_over',
    ('mean_over',),
    'wrapper',
    _mean_over,
    _flat_solution,
    {'gradients/loss': 1},
    params=flat_params,
    same_as='gradient, sgd',
    maps=True,
    **_RATE_ONLY,
  ),
  *AGGREGATORS,
)

NAMED = {row.name: row for row in ROWS}
# Public functions in the same packages that are no method.
HELPERS = frozenset(
  {
    'Solve',
    'apply_updates',
    'deal_batch',
    'jacobian_like',
    'e_aipod_plan',
    'power_schedule',
    'split_batch',
  }
)


def missing(public: Mapping[str, tuple[str, ...]]) -> list[str]:
  """The public names, by package, that have no row and are no helper."""
  covered = set(itertools.chain.from_iterable(row.covers for row in ROWS))
  return [
    f'{package}.{name}'
    for package, names in public.items()
    for name in names
    if name not in covered and name not in HELPERS
  ]
