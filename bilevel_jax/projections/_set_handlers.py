"""When `descend` projects a sequence: every step, at random, or per update."""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _checks, _keys, _sequences, _trees, states, types
from bilevel_jax.projections import _affine, _set

# The sequences to replace, by name, and the state of the set.
Projected = tuple[dict[str, Any], Any]


class Lazy(NamedTuple):
  r"""A set with random projections, corrected by a control variate.

  With the step u, a control variate s that starts at zero, and a coin that
  shows heads with probability p,

  .. math::
    \hat z = z + u + s, \qquad
    (z, s) \leftarrow \begin{cases}
      (z^+, \; s + p \, (z^+ - \hat z)) \quad
        \text{with } z^+ = \Pi(\hat z - s / p) & \text{heads} \\
      (\hat z, \; s) & \text{tails}
    \end{cases}

  The control variate learns the part of a step that the projection would undo,
  so the iterates stay close to the set without projections. It is in units of a
  step: for a step size :math:`\beta`, the published variable is
  :math:`r = s / \beta`. The two are equivalent for a constant step size.

  Under `jax.vmap` with a key for each member, both branches of the coin are
  computed; under `jax.lax.map`, or with a shared key, only one.

  Attributes:
    set: a projection or an affine set.
    probability: p in (0, 1], a constant or a schedule from the number of
      updates so far; 1 always projects.
    key: PRNG key of the coins, or a whole number. Sequences of different names
      draw different coins from one key.
    control_variate: False keeps s at zero, a baseline that does not converge.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp, optax
    >>> pull = lambda p, targets: ((p.z - targets) ** 2).sum() / 2
    >>> agree = bj.projections.consensus_set()  # Two clients, one point.
    >>> rarely = bj.projections.Lazy(agree, 0.5, key=0)
    >>> solver = bj.descend(
    ...   bj.gradient(pull, of='z'), z=bj.Sequence(optax.sgd(0.1), set=rarely)
    ... )
    >>> params = bj.sequences(z=jnp.zeros(2))
    >>> state, targets = solver.init(params), jnp.array([3.0, 5.0])
    >>> for _ in range(60):
    ...   updates, state = solver.update(targets, state, params)
    ...   params = bj.apply_updates(params, updates)
    >>> print(params.z.round(1), bj.counts(state)['projections/z'] < 40)
    [4. 4.] True

  References:
    Xiao, Shen, Yin and Chen, `Alternating Projected SGD for
    Equality-constrained Bilevel Optimization
    <https://arxiv.org/abs/2211.07096>`_, 2023.

    Mishchenko, Malinovsky, Stich and Richtarik, `ProxSkip: Yes! Local Gradient
    Steps Provably Lead to Communication Acceleration! Finally!
    <https://arxiv.org/abs/2202.09357>`_, 2022.
  """

  set: Any
  probability: types.ScalarOrSchedule
  key: Any
  control_variate: bool = True


@states.counts_updates
class LazyState(NamedTuple):
  """State of a `Lazy` set.

  Attributes:
    key: PRNG key of the next coin.
    count: updates so far, an int32 scalar.
    control: the control variate, in units of a step; None without one.
    counts: projections so far, and rounds if the set is a mean over clients.
  """

  key: chex.PRNGKey
  count: chex.Array
  control: Any
  counts: types.Named | None


class Relaxed(NamedTuple):
  r"""A set with one projection per update, after an extrapolated step.

  .. math::
    z \leftarrow \Pi (z_0 + r \, (z_T - z_0))

  with the sequence :math:`z_0` before and :math:`z_T` after all steps of one
  update, which are not projected.

  Attributes:
    set: a projection or an affine set; None for the whole space.
    factor: :math:`r \ge 1`, a constant or a schedule from the number of
      updates so far.
  """

  set: Any
  factor: types.ScalarOrSchedule = 1.0


class Joint(NamedTuple):
  r"""A joint set of several sequences.

  .. math::
    (z, z', \dots) \leftarrow \Pi (z, z', \dots)

  It belongs to the record of one sequence and also moves the others.

  Attributes:
    projection: maps a tuple of the sequence and the others, in this order, to
      the nearest tuple in the set.
    others: names of the other sequences.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp, optax
    >>> size = lambda p, batch: (p.a - 1) ** 2 + (p.b - 2) ** 2
    >>> def same(both):
    ...   mean = (both[0] + both[1]) / 2
    ...   return mean, mean
    >>> both = bj.projections.Joint(same, ('b',))
    >>> solver = bj.descend(
    ...   bj.gradient(size, of=('a', 'b')),
    ...   a=bj.Sequence(optax.sgd(0.5), set=both), b=optax.sgd(0.5),
    ... )
    >>> params = bj.sequences(a=jnp.float32(0.0), b=jnp.float32(0.0))
    >>> updates, _ = solver.update(None, solver.init(params), params)
    >>> print(updates.a, updates.b)
    1.5 1.5
  """

  projection: Callable[[Any], Any]
  others: tuple[str, ...]


class SetHandler(NamedTuple):
  """How `descend` keeps one sequence in its set.

  Attributes:
    order: projections run in this order: 0 for a set of its own, 1 for a set
      that depends on the upper variable, 2 for a joint set.
    init: maps all sequences to the state of the set; raises if it is empty.
    each: after each step, maps (sequences after it, sequences before it, state)
      to the sequences to replace and the state; None to do nothing.
    finish: the same after all steps of an update, with the sequences before the
      first step.
    uses: the cost of each projection, if it is constant, by the keys of
      `bj.counts`.
    others: names of further sequences that it moves.
  """

  order: int
  init: Callable[[Any], Any]
  each: Callable[[Any, Any, Any], Projected] | None
  finish: Callable[[Any, Any, Any], Projected] | None
  uses: dict[str, int]
  others: tuple[str, ...] = ()


def make_handler(name: str, set_: Any) -> SetHandler:
  """Makes the handler of a sequence's set of any kind."""
  if isinstance(set_, Lazy):
    return _lazy(name, set_)
  if isinstance(set_, Relaxed):
    return _relaxed(name, set_)
  if isinstance(set_, Joint):
    return _joint(name, set_)
  if set_ is None:
    return SetHandler(0, lambda z: (), None, None, {})

  def init(z):
    _set.check(set_, z, name)
    return ()

  def each(loose, before, state):
    del before
    return {name: _set.nearest(set_, getattr(loose, name), loose)}, state

  return SetHandler(_set.depends(set_), init, each, None, _uses(name, set_))


def _uses(name, set_):
  uses = {f'projections/{name}': 1}
  if isinstance(set_, _affine.AffineSet) and set_.rounds:
    uses[f'rounds/{name}'] = set_.rounds
  return uses


def _joint(name, set_):
  names = (name, *set_.others)

  def check(z):
    _sequences.require_sequences(z, names, 'a joint set')
    point = tuple(getattr(z, n) for n in names)
    _set.check_set(set_.projection, point, ' and '.join(names))
    return ()

  def each(loose, before, state):
    del before
    inside = set_.projection(tuple(getattr(loose, n) for n in names))
    return dict(zip(names, inside, strict=True)), state

  uses = {f'projections/{"+".join(names)}': 1}
  return SetHandler(2, check, each, None, uses, set_.others)


@states.counts_updates
class _RelaxedState(NamedTuple):
  count: chex.Array


def _relaxed(name, set_):
  plain = make_handler(name, set_.set)
  _checks.within('Relaxed', 'the factor', set_.factor, 1)

  def init(z):
    plain.init(z)
    return _RelaxedState(_trees.zeros([], jnp.int32))

  def finish(loose, before, state):
    factor = set_.factor
    if callable(factor):
      factor = factor(state.count)
    start = getattr(before, name)
    moved = optax.tree.sub(getattr(loose, name), start)
    point = _trees.add_scaled(start, factor, moved)
    loose = loose._replace(**{name: point})
    fields = {name: point}
    if plain.each is not None:
      fields, _ = plain.each(loose, before, ())
    return fields, _RelaxedState(optax.safe_increment(state.count))

  return SetHandler(plain.order, init, None, finish, plain.uses)


def _lazy(name, set_):
  if not callable(set_.probability):
    _checks.within(
      'Lazy', 'the probability', set_.probability, 0, 1, open_low=True
    )
  uses = _uses(name, set_.set)

  def init(z):
    _set.check(set_.set, z, name)
    key = _keys.as_key(set_.key, 'Lazy')
    control = None
    if set_.control_variate:
      control = optax.tree.zeros_like(getattr(z, name))
    return LazyState(
      # Sequences that share a key draw different coins.
      jax.random.fold_in(key, zlib.crc32(name.encode())),
      _trees.zeros([], jnp.int32),
      control,
      types.Named(tuple(uses), _trees.zeros(len(uses), jnp.int32)),
    )

  def each(loose, before, state):
    del before
    next_key, now = jax.random.split(state.key)
    p = set_.probability
    p = p(state.count) if callable(p) else p
    point = getattr(loose, name)
    p = jnp.asarray(p, _trees.widest_dtype(point))
    heads = jax.random.uniform(now, dtype=p.dtype) < p
    control = state.control
    shifted = lambda share: (
      point if control is None else _trees.add_scaled(point, share, control)
    )
    free = shifted(1.0)

    def project():
      # The point z + u + s - s / p, without adding s first.
      inside = _set.nearest(set_.set, shifted(1 - 1 / p), loose)
      inside = _trees.cast_like(inside, free)
      # In a shard_map, the type of a mean over clients differs from its terms.
      return _sequences.vary_like(inside, free)

    inside = jax.lax.cond(heads, project, lambda: free)
    if control is not None:
      # The change is zero for tails.
      change = optax.tree.sub(inside, free)
      control = _trees.add_scaled(control, p, change)
    spent = {n: use * heads.astype(jnp.int32) for n, use in uses.items()}
    counts = states.add_counts(state.counts, spent)
    count = optax.safe_increment(state.count)
    return {name: inside}, LazyState(next_key, count, control, counts)

  return SetHandler(_set.depends(set_.set), init, each, None, {})
