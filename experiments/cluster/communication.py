"""Communication of each method per step and device: a cost model.

The parameters are on every device, and the examples of a batch are split over
them. Then each gradient and each Hessian-vector product with respect to a
sequence is one sum over all devices of as many numbers as the sequence has. A
ring sums n numbers on D devices by sending 2 n (D - 1) / D from each.

`compile_step` compiles a step of the method for the devices of this process and
`exchange` counts the collectives of the program; a test compares both.
"""

import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

import bilevel_jax as bj
from experiments.cluster import collectives

# Sizes that no sum of others equals.
UPPER, LOWER, EXAMPLES = 96, 640, 64
T, K, M = 'T', 'K', 'M'


class Numbers(NamedTuple):
  """Numbers on which a cost depends.

  Attributes:
    T: steps of the inner loop.
    K: products of a series.
    M: objectives.
    S: seeds in one program.
  """

  T: int = 3
  K: int = 2
  M: int = 3
  S: int = 1


_NUMBERS = Numbers()


class Cost(NamedTuple):
  """Numbers that are summed over the devices in a step.

  Attributes:
    upper: times the size of the upper variable is summed: a factor by number,
      '' for the constant.
    lower: times that of the lower variable.
    rows: times the number of examples is gathered or summed.
  """

  upper: Mapping[str, int]
  lower: Mapping[str, int]
  rows: Mapping[str, int] = types.MappingProxyType({})

  def count(self, numbers: Numbers = _NUMBERS) -> int:
    """Returns how many numbers are exchanged with the sizes of this module."""
    times = lambda factors: sum(
      factor * (getattr(numbers, name) if name else 1)
      for name, factor in factors.items()
    )
    sizes = UPPER * times(self.upper) + LOWER * times(self.lower)
    return numbers.S * (sizes + EXAMPLES * times(self.rows))

  def __str__(self):
    """Formats the cost, such as `x + (2 + T) y`."""
    parts = []
    for factors, size in zip((self.upper, self.lower, self.rows), 'xyb'):
      words = [
        name if factor == 1 and name else f'{factor} {name}'.strip()
        for name, factor in factors.items()
        if factor
      ]
      if len(words) > 1:
        parts.append(f'({" + ".join(words)}) {size}')
      elif words:
        parts.append(f'{words[0]} {size}'.removeprefix('1 '))
    return ' + '.join(parts) or '0'


def _fit(x: Any, y: Any, rows: Any) -> jax.Array:
  """Mean over examples of a smooth loss in which all coordinates mix."""
  score = rows['x'] @ x + rows['y'] @ y
  return jnp.mean(jax.nn.softplus(-rows['label'] * score) + score**2 / 8)


def upper_loss(x: Any, y: Any, batch: Any) -> jax.Array:
  """The upper loss."""
  return _fit(x, y, batch['upper'])


def lower_loss(x: Any, y: Any, batch: Any) -> jax.Array:
  """The lower loss, strongly convex in y."""
  return _fit(x, y, batch['lower']) + 0.1 * jnp.sum(y**2)


PROBLEM = bj.BilevelProblem(upper=upper_loss, lower=lower_loss)


def _objectives(count: int) -> Callable[[Any, Any], jax.Array]:
  shifts = jnp.arange(1.0, count + 1)

  def losses(y, batch):
    score = batch['upper']['y'] @ y
    each = [
      jnp.mean((score - s * batch['upper']['label']) ** 2) for s in shifts
    ]
    return jnp.stack(each)

  return losses


class Method(NamedTuple):
  """A method with its cost.

  Attributes:
    make: makes the solver from `Numbers`.
    cost: numbers that are summed in a step.
    flat: whether it moves one variable, y, on M losses.
  """

  make: Callable[[Numbers], Any]
  cost: Cost
  flat: bool = False


_SGD = optax.sgd(0.01)
_BOTH = {'upper': _SGD, 'lower': _SGD}


def _loop(n: Numbers) -> dict[str, Any]:
  return {'upper': _SGD, 'lower': bj.Sequence(_SGD, steps=n.T)}


def _series(n: Numbers, **more: Any) -> dict[str, Any]:
  return {'terms': n.K, 'step_size': 0.1, **more}


def _weighted(name: str, **settings: Any):
  def make(n):
    oracle = bj.multi_objective(_objectives(n.M), n.M)
    aggregator = getattr(bj.aggregators, name)(n.M, **settings)
    return optax.chain(oracle, aggregator, _SGD)

  return make


_s = bj.solvers
METHODS: dict[str, Method] = {
  'v_pbgd': Method(
    lambda n: bj.v_pbgd(
      PROBLEM, penalty=2.0, value=bj.Sequence(_SGD, steps=n.T), **_BOTH
    ),
    Cost({'': 3}, {'': 2, T: 1}),
  ),
  'f2sa, one loop': Method(
    lambda n: bj.f2sa(PROBLEM, penalty=2.0, **_BOTH), Cost({'': 3}, {'': 3})
  ),
  'f2sa, two loops': Method(
    lambda n: bj.f2sa(PROBLEM, penalty=2.0, **_loop(n)), Cost({'': 3}, {T: 3})
  ),
  'alt_pbgd': Method(
    lambda n: _s.alt_pbgd(PROBLEM, penalty=2.0, **_loop(n)),
    Cost({'': 3}, {T: 3}),
  ),
  'pbgd_free': Method(
    lambda n: _s.pbgd_free(PROBLEM, penalty=2.0, **_loop(n)),
    Cost({'': 1}, {T: 2}),
  ),
  'bome': Method(
    lambda n: bj.bome(PROBLEM, value=bj.Sequence(_SGD, steps=n.T), **_BOTH),
    Cost({'': 3}, {'': 2, T: 1}),
  ),
  'g_pbgd': Method(
    lambda n: bj.g_pbgd(PROBLEM, penalty=2.0, **_BOTH),
    Cost({'': 2}, {'': 3}),
  ),
  'rhg': Method(
    lambda n: bj.rhg(PROBLEM, **_loop(n)), Cost({'': 1, T: 1}, {'': 1, T: 2})
  ),
  'meha': Method(
    lambda n: bj.meha(PROBLEM, penalty=2.0, proximity=2.0, **_BOTH),
    Cost({'': 3}, {'': 3}),
  ),
  'soba': Method(lambda n: bj.soba(PROBLEM, **_BOTH), Cost({'': 2}, {'': 3})),
  'ma_soba': Method(
    lambda n: _s.ma_soba(PROBLEM, averaging=0.1, **_BOTH),
    Cost({'': 2}, {'': 3}),
  ),
  'fsla': Method(
    lambda n: _s.fsla(PROBLEM, decay=0.5, **_BOTH), Cost({'': 4}, {'': 3})
  ),
  'stocbio': Method(
    lambda n: _s.stocbio(PROBLEM, **_series(n, **_loop(n))),
    Cost({'': 2}, {'': 1, T: 1, K: 1}),
  ),
  'alset': Method(
    lambda n: _s.alset(PROBLEM, **_series(n, **_BOTH)),
    Cost({'': 2}, {'': 2, K: 1}),
  ),
  'amigo': Method(
    lambda n: _s.amigo(PROBLEM, **_series(n, **_loop(n))),
    Cost({'': 2}, {'': 1, T: 1, K: 1}),
  ),
  'mrbo': Method(
    lambda n: _s.mrbo(PROBLEM, decay=0.5, **_series(n, **_BOTH)),
    Cost({'': 4}, {'': 4, K: 2}),
  ),
  'pzobo': Method(
    lambda n: _s.pzobo(PROBLEM, smoothing=0.1, directions=1, key=0, **_loop(n)),
    Cost({'': 1}, {'': 1, T: 2}),
  ),
  'seal': Method(
    lambda n: _s.seal(
      lambda y, b: upper_loss(jnp.zeros(UPPER), y, b),
      _row_losses,
      scores=_s.RowScores(_SGD, 1_000, lambda b: b['index']),
      penalty=2.0,
      lower=_SGD,
    ),
    # Also indices and losses of the rows, for the tree of scores.
    Cost({}, {'': 2}, {'': 5}),
    flat=True,
  ),
  'alright': Method(
    lambda n: optax.chain(
      _s.alright(_one_by_one(n.M), weights=[1 / n.M] * n.M, key=0), _SGD
    ),
    Cost({}, {'': 1}),
    flat=True,
  ),
  'mgda': Method(_weighted('mgda'), Cost({}, {M: 1}), flat=True),
  'moco': Method(_weighted('moco'), Cost({}, {M: 1}), flat=True),
  'cagrad': Method(_weighted('cagrad'), Cost({}, {M: 1}), flat=True),
}


def _row_losses(y: Any, batch: Any) -> jax.Array:
  rows = batch['lower']
  return jax.nn.softplus(-rows['label'] * (rows['y'] @ y))


def _one_by_one(count: int) -> list[Callable[[Any, Any], jax.Array]]:
  losses = _objectives(count)
  return [lambda y, b, i=i: losses(y, b)[i] for i in range(count)]


class Compiled(NamedTuple):
  """A compiled step of a method.

  Attributes:
    step: the program, (params, state, batch) -> (params, state).
    arguments: `jax.ShapeDtypeStruct` of its arguments, with shardings.
    seeds: seeds that it maps.
  """

  step: jax.stages.Compiled
  arguments: tuple[Any, ...]
  seeds: int

  def exchange(self) -> collectives.Exchange:
    """Counts what a device exchanges in a step."""
    return collectives.count(self.step.as_text(), seeds=self.seeds)


def compile_step(
  name: str,
  numbers: Numbers = _NUMBERS,
  *,
  devices: int | None = None,
  examples: int = EXAMPLES,
) -> Compiled:
  """Compiles a step with its examples split over devices.

  Args:
    name: name in `METHODS`.
    numbers: numbers on which its cost depends.
    devices: number of devices; None for all.
    examples: examples of a batch, a multiple of the devices.
  """
  method = METHODS[name]
  solver = method.make(numbers)
  mesh = jax.sharding.Mesh(jax.devices()[:devices], ('examples',))
  replicated = NamedSharding(mesh, PartitionSpec())
  by_example = NamedSharding(mesh, PartitionSpec('examples'))

  def array(*shape, sharding=replicated, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  def per_seed(x):
    shape = (numbers.S, *x.shape) if numbers.S > 1 else x.shape
    return array(*shape, dtype=x.dtype)

  rows = {
    'x': array(examples, UPPER, sharding=by_example),
    'y': array(examples, LOWER, sharding=by_example),
    'label': array(examples, sharding=by_example),
  }
  batch: Any = {'upper': rows, 'lower': rows}
  if name == 'alright':
    batch = [batch] * numbers.M
  elif name == 'seal':
    batch |= {'index': array(examples, dtype=jnp.int32)}
  params: Any = bj.BilevelParams(upper=array(UPPER), lower=array(LOWER))
  if method.flat:
    params = params.lower
  state = jax.eval_shape(solver.init, params)

  def step(params, state, batch):
    updates, state = solver.update(batch, state, params)
    return bj.apply_updates(params, updates), state

  run = jax.vmap(step, in_axes=(0, 0, None)) if numbers.S > 1 else step
  arguments = (*jax.tree.map(per_seed, (params, state)), batch)
  lowered = jax.jit(run, out_shardings=replicated).lower(*arguments)
  return Compiled(lowered.compile(), arguments, numbers.S)
