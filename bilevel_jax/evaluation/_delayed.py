"""Stale parameters: gradients of asynchronous workers in one program."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _checks, _keys, _trees, states, types
from bilevel_jax.oracles import base

SERVICES = ('round_robin', 'random', 'sampled')


class DelayedState(NamedTuple):
  """State of `delayed`.

  Attributes:
    count: evaluations so far, an int32 scalar: the version of the parameters
      at the next evaluation.
    snapshots: the latest parameters; leaves have a leading axis of slots.
    versions: the version in each slot, int32, (slots,).
    worker_versions: the version that each worker computes with, int32,
      (workers,), if workers are served at random; else ().
    key: PRNG key of the next draw; () if nothing is drawn.
    report: the measured delay.
    inner: the state of the oracle.
  """

  count: chex.Array
  snapshots: Any
  versions: chex.Array
  worker_versions: Any
  key: Any
  report: states.OracleState
  inner: Any


def delayed(
  oracle: optax.GradientTransformation,
  workers: int,
  *,
  bound: int | None = None,
  service: str = 'round_robin',
  key: Any = None,
) -> base.Oracle:
  r"""Evaluates an oracle at the parameters of some evaluations ago.

  .. math::
    d_k = d(z_{k - \tau_k}; batch_k), \qquad 0 \le \tau_k \le K_0

  It simulates a server with N workers that compute gradients concurrently, each
  at the parameters that it received when the server took its last gradient. The
  state has the last :math:`K_0 + 1` parameters and their version numbers, so a
  run with delays is one compiled, reproducible program. The order of service:

  - `round_robin`: in turn, so that :math:`\tau_k = \min(k, N - 1)`;
  - `random`: uniformly among the workers that can be served without another
    one exceeding the bound; :math:`\tau_k` varies around N - 1 and never
    exceeds :math:`K_0`;
  - `sampled`: in turn, but :math:`\tau_k` is drawn uniformly from
    :math:`\{0, \dots, \min(k, K_0)\}`.

  Any oracle can be delayed; its own state, a warm start for instance, is not.
  It gets the number of the worker as the extra argument `worker`, an int32
  scalar, for workers with their own environments or data. If an update
  evaluates it several times, by inner steps of `descend`, delays count
  evaluations.

  Args:
    oracle: the oracle to evaluate.
    workers: N, at least 1. With `round_robin` and `bound` it may be traced.
    bound: :math:`K_0 \ge N - 1`, by default N - 1. The state holds
      :math:`K_0 + 1` copies of all sequences that `descend` moves.
    service: `round_robin`, `random` or `sampled`. With the default bound,
      `random` is a fixed order, drawn once.
    key: PRNG key, or a whole number, for `random` and `sampled`.

  Returns:
    An oracle; `bj.values` has `delay`, the measured :math:`\tau_k`.

  Raises:
    ValueError: if `workers` is below 1, `bound` below N - 1, or `service`
      unknown; at the call, if parameters have other shapes than at init.
    TypeError: if a key is missing.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp
    >>> slope = bj.gradient(lambda params, batch: params**2 / 2)
    >>> oracle = bj.evaluation.delayed(slope, workers=3)
    >>> state, step = oracle.init(jnp.float32(0.0)), jax.jit(oracle.update)
    >>> for k in range(5):
    ...   gradient, state = step(None, state, jnp.float32(k))
    ...   print(gradient, bj.values(state)['delay'])
    0.0 0.0
    0.0 1.0
    0.0 2.0
    1.0 2.0
    2.0 2.0

  References:
    Shen, Zhang, Hong and Chen, `Towards Understanding Asynchronous Advantage
    Actor-Critic: Convergence and Linear Speedup
    <https://arxiv.org/abs/2012.15511>`_, 2023.
  """
  max_delay = _checked_bound(workers, bound, service)
  draws = service != 'round_robin'
  if draws:
    _keys.as_key(key, f'delayed(service={service!r})')
  evaluated = base.as_oracle(oracle)
  slots = max_delay + 1

  def init_fn(params):
    # Broadcast copies are sharded like the parameters.
    ring = jax.tree.map(
      lambda x: jnp.array(
        jnp.broadcast_to(x, (slots, *jnp.shape(x))), copy=True
      ),
      params,
    )
    names = ('delay',)
    return DelayedState(
      count=jnp.zeros([], jnp.int32),
      snapshots=ring,
      versions=jnp.zeros(slots, jnp.int32),
      worker_versions=(
        jnp.zeros(workers, jnp.int32) if service == 'random' else ()
      ),
      key=_keys.as_key(key) if draws else (),
      report=states.OracleState(
        types.named(names, jnp.zeros(1, _trees.widest_dtype(params))), None
      ),
      inner=evaluated.init(params),
    )

  def serve(state):
    """The worker that is served, its version, all next versions, and a key."""
    count, current = state.count, state.worker_versions
    if service == 'random':
      key, draw = jax.random.split(state.key)
      worker = _draw_worker(draw, current + max_delay - count)
      # The worker receives the version that its own gradient leads to.
      return worker, current[worker], current.at[worker].set(count + 1), key
    worker = count % jnp.asarray(workers, jnp.int32)
    if service == 'sampled':
      key, draw = jax.random.split(state.key)
      delay = jax.random.randint(draw, (), 0, jnp.minimum(count, max_delay) + 1)
      return worker, count - delay, (), key
    delay = jnp.asarray(workers, jnp.int32) - 1
    return worker, jnp.maximum(count - delay, 0), (), ()

  def update_fn(batch, state, params=None, **extra_args):
    base.require_batch(batch, params)
    _require_like(state.snapshots, params)
    worker, version, worker_versions, key = serve(state)
    newest, slot = state.count % slots, version % slots
    put = jax.lax.dynamic_update_index_in_dim
    ring = jax.tree.map(
      lambda leaf, new: put(leaf, jnp.asarray(new, leaf.dtype), newest, 0),
      state.snapshots,
      params,
    )
    versions = state.versions.at[newest].set(state.count)
    pick = lambda leaf: jax.lax.dynamic_index_in_dim(leaf, slot, 0, False)
    stale = jax.tree.map(pick, ring)
    gradients, inner = evaluated.update(
      batch, state.inner, stale, **{**extra_args, 'worker': worker}
    )
    values = state.report.values
    delay = (state.count - versions[slot]).astype(values.array.dtype)
    return gradients, DelayedState(
      optax.safe_increment(state.count),
      ring,
      versions,
      worker_versions,
      key,
      state.report._replace(values=types.named(values.names, delay[None])),
      inner,
    )

  again = lambda one: delayed(
    one, workers, bound=bound, service=service, key=key
  )
  # Linear like the oracle: all samples of a batch are evaluated at one point.
  return base.wrapped(
    evaluated,
    init_fn,
    update_fn,
    again=again,
    linear=evaluated.linear,
    inside=True,
  )


def _require_like(snapshots: Any, params: Any) -> None:
  """Raises ValueError unless structure and shapes are those of the state."""
  expected: Any = jax.tree.structure(snapshots)
  actual: Any = jax.tree.structure(params)
  if expected != actual:
    raise ValueError(
      'delayed: the state is for parameters of the structure '
      f'{expected}, got {actual}: call init(params) again.'
    )
  for (path, old), new in zip(
    jax.tree.leaves_with_path(snapshots), jax.tree.leaves(params), strict=True
  ):
    if old.shape[1:] != jnp.shape(new):
      name = jax.tree_util.keystr(path) or 'the parameter'
      raise ValueError(
        f'delayed: the state is for {name} of shape {old.shape[1:]}, got '
        f'{jnp.shape(new)}: call init(params) again.'
      )


def _checked_bound(workers: Any, bound: Any, service: str) -> int:
  """Checks the arguments of `delayed`; returns the largest delay."""
  if service not in SERVICES:
    raise ValueError(
      f'delayed: service is one of {", ".join(SERVICES)}, got {service!r}.'
    )
  traced = isinstance(workers, jax.Array) and service == 'round_robin'
  if traced and bound is None:
    raise ValueError(
      'delayed: a traced number of workers needs a bound: pass the largest '
      'number of workers minus 1.'
    )
  if traced and isinstance(workers, jax.core.Tracer):
    return _checks.whole_number(
      'delayed', 'steps of delay as `bound`', bound, 0
    )
  number = int(workers) if traced else workers
  others = _checks.whole_number('delayed', 'workers', number) - 1
  if bound is None:
    return others
  max_delay = _checks.whole_number(
    'delayed', 'steps of delay as `bound`', bound, 0
  )
  if max_delay < others:
    raise ValueError(
      f'delayed: {number} workers are served one at a time, so a gradient '
      f'waits for {others} others: the bound is at least {others}, got '
      f'{max_delay}.'
    )
  return max_delay


def _draw_worker(key: chex.PRNGKey, slack: chex.Array) -> chex.Array:
  """Draws a worker among those that let all others keep their bound.

  Args:
    key: PRNG key of the draw.
    slack: for each worker, how many others may be served before it.

  Returns:
    The worker's number, an int32 scalar.
  """
  order = jnp.argsort(slack)
  ranks = jnp.arange(len(slack), dtype=slack.dtype)
  # No worker after the first tight one may be served before it.
  tight = slack[order] <= ranks
  last = jnp.where(tight.any(), jnp.argmax(tight), len(slack) - 1)
  drawn = jax.random.randint(key, (), 0, last + 1)
  return order[drawn].astype(jnp.int32)
