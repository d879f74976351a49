"""Stale parameters: gradients of asynchronous workers, in one program."""

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
      that the next one is given.
    snapshots: the last parameters, each leaf with a leading axis of places.
    versions: which version is in each place, int32, (places,).
    held: which version each worker computes with, int32, (workers,), where
      workers are served at random; else ().
    key: PRNG key of the next draw; () where none is drawn.
    report: the delay that was measured.
    inner: the state of the oracle.
  """

  count: chex.Array
  snapshots: Any
  versions: chex.Array
  held: Any
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
  r"""Evaluates an oracle where the parameters were some evaluations ago.

  .. math::
    d_k = d(z_{k - \tau_k}; batch_k), \qquad 0 \le \tau_k \le K_0

  That is what a server sees whose N workers compute gradients at the same time,
  each at the parameters that it was handed when its last gradient came in. The
  last :math:`K_0 + 1` parameters are kept with the number of their version, in
  the state: a run with delays is one compiled program, with the same result
  each time. Which worker is served when:

  - `round_robin`: in turn, so that :math:`\tau_k = \min(k, N - 1)`;
  - `random`: any worker whose turn breaks nobody's bound, each of these alike:
    :math:`\tau_k` varies around N - 1 and never passes :math:`K_0`;
  - `sampled`: in turn, but :math:`\tau_k` is drawn from
    :math:`\{0, \dots, \min(k, K_0)\}`, each alike.

  The oracle may be anything, and what it keeps for itself, a warm start for
  instance, is not delayed. It is told whose evaluation it is, by the extra
  argument `worker`, an int32 scalar, for workers that have something of their
  own. Where an oracle is evaluated several times in an update, by inner steps
  of `descend`, delays count evaluations.

  Args:
    oracle: what to evaluate.
    workers: N, at least 1. In turn, it may be a traced number, if `bound` is
      given.
    bound: :math:`K_0 \ge N - 1`, by default N - 1. It costs as many copies of
      the parameters, of all sequences that `descend` moves.
    service: `round_robin`, `random` or `sampled`. With the default bound,
      `random` is a fixed order, drawn once.
    key: PRNG key, or a whole number, for `random` and `sampled`.

  Returns:
    An oracle; `bj.values` gives `delay`, :math:`\tau_k` as it was read off the
    version of the parameters that were used.

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
    ...   found, state = step(None, state, jnp.float32(k))
    ...   print(found, bj.values(state)['delay'])
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
  most = _bound(workers, bound, service)
  draws = service != 'round_robin'
  if draws:
    _keys.as_key(key, f'delayed(service={service!r})')
  evaluated = base.as_oracle(oracle)
  places = most + 1

  def init_fn(params):
    # Copies by broadcasting: they are sharded like what they are copies of.
    ring = jax.tree.map(
      lambda x: jnp.array(
        jnp.broadcast_to(x, (places, *jnp.shape(x))), copy=True
      ),
      params,
    )
    names = ('delay',)
    return DelayedState(
      count=jnp.zeros([], jnp.int32),
      snapshots=ring,
      versions=jnp.zeros(places, jnp.int32),
      held=jnp.zeros(workers, jnp.int32) if service == 'random' else (),
      key=_keys.as_key(key) if draws else (),
      report=states.OracleState(
        types.named(names, jnp.zeros(1, _trees.widest_dtype(params))), None
      ),
      inner=evaluated.init(params),
    )

  def serve(state):
    """Whose gradient comes in, of which version, and what is left to say."""
    count = state.count
    if service == 'random':
      key, draw = jax.random.split(state.key)
      worker = _next(draw, state.held + most - count)
      version = state.held[worker]
      # Its gradient makes the next version, which it is handed.
      return worker, version, state.held.at[worker].set(count + 1), key
    worker = count % jnp.asarray(workers, jnp.int32)
    if service == 'sampled':
      key, draw = jax.random.split(state.key)
      delay = jax.random.randint(draw, (), 0, jnp.minimum(count, most) + 1)
      return worker, count - delay, (), key
    behind = jnp.asarray(workers, jnp.int32) - 1
    return worker, jnp.maximum(count - behind, 0), (), ()

  def update_fn(batch, state, params=None, **extra_args):
    base.require_batch(batch, params)
    _require_like(state.snapshots, params)
    worker, version, held, key = serve(state)
    place, at = state.count % places, version % places
    put = jax.lax.dynamic_update_index_in_dim
    ring = jax.tree.map(
      lambda kept, new: put(kept, jnp.asarray(new, kept.dtype), place, 0),
      state.snapshots,
      params,
    )
    versions = state.versions.at[place].set(state.count)
    pick = lambda kept: jax.lax.dynamic_index_in_dim(kept, at, 0, False)
    stale = jax.tree.map(pick, ring)
    found, inner = evaluated.update(
      batch, state.inner, stale, **{**extra_args, 'worker': worker}
    )
    values = state.report.values
    delay = (state.count - versions[at]).astype(values.array.dtype)
    return found, DelayedState(
      optax.safe_increment(state.count),
      ring,
      versions,
      held,
      key,
      state.report._replace(values=types.named(values.names, delay[None])),
      inner,
    )

  again = lambda one: delayed(
    one, workers, bound=bound, service=service, key=key
  )
  # All samples of a batch are seen at one point, whichever it is.
  return base.wrapped(
    evaluated,
    init_fn,
    update_fn,
    again=again,
    linear=evaluated.linear,
    inside=True,
  )


def _require_like(snapshots: Any, params: Any) -> None:
  """What is kept and what is given have one structure and the same shapes."""
  kept: Any = jax.tree.structure(snapshots)
  given: Any = jax.tree.structure(params)
  if kept != given:
    raise ValueError(
      'delayed: the state was made for parameters of the structure '
      f'{kept}, got {given}: make it anew, by init(params).'
    )
  for (path, old), new in zip(
    jax.tree.leaves_with_path(snapshots), jax.tree.leaves(params), strict=True
  ):
    if old.shape[1:] != jnp.shape(new):
      name = jax.tree_util.keystr(path) or 'the parameter'
      raise ValueError(
        f'delayed: the state was made for {name} of shape {old.shape[1:]}, got '
        f'{jnp.shape(new)}: make it anew, by init(params).'
      )


def _bound(workers: Any, bound: Any, service: str) -> int:
  """The largest delay, once all arguments are what they should be."""
  if service not in SERVICES:
    raise ValueError(
      f'delayed: service is one of {", ".join(SERVICES)}, got {service!r}.'
    )
  traced = isinstance(workers, jax.Array) and service == 'round_robin'
  if traced and bound is None:
    raise ValueError(
      'delayed: a traced number of workers needs a bound, the most workers '
      'that there are minus 1.'
    )
  if traced and isinstance(workers, jax.core.Tracer):
    return _checks.whole_number(
      'delayed', 'steps of delay as `bound`', bound, 0
    )
  number = int(workers) if traced else workers
  least = _checks.whole_number('delayed', 'workers', number) - 1
  if bound is None:
    return least
  most = _checks.whole_number('delayed', 'steps of delay as `bound`', bound, 0)
  if most < least:
    raise ValueError(
      f'delayed: {number} workers are served one at a time, so that a gradient '
      f'waits for {least} others: the bound is at least {least}, got {most}.'
    )
  return most


def _next(key: chex.PRNGKey, slack: chex.Array) -> chex.Array:
  """A worker, drawn among those whose turn lets all others keep their bound.

  Args:
    key: of the draw.
    slack: for each worker, how many others may be served before it.

  Returns:
    Its number, an int32 scalar.
  """
  order = jnp.argsort(slack)
  places = jnp.arange(len(slack), dtype=slack.dtype)
  # The first that can let nobody from behind go before it.
  tight = slack[order] <= places
  last = jnp.where(tight.any(), jnp.argmax(tight), len(slack) - 1)
  drawn = jax.random.randint(key, (), 0, last + 1)
  return order[drawn].astype(jnp.int32)
