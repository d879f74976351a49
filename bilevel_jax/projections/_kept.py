"""How a sequence is kept in its set: each step, now and then, or in the end."""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _checks, _keys, _sequences, _trees, states, types
from bilevel_jax.projections import _affine, _set

# What a step of a sequence leaves: the sequences after it, and the state.
Settled = tuple[dict[str, Any], Any]


class Lazy(NamedTuple):
  r"""A set that is projected on only now and then, with corrections between.

  With the step u, a control variate s, zero at the start, and a coin that shows
  heads with probability p,

  .. math::
    \hat z = z + u + s, \qquad
    (z, s) \leftarrow \begin{cases}
      (z^+, \; s + p \, (z^+ - \hat z)) \quad
        \text{with } z^+ = \Pi(\hat z - s / p) & \text{heads} \\
      (\hat z, \; s) & \text{tails}
    \end{cases}

  The control variate learns the part of a step that the projection would undo,
  so that the iterates stay close to the set without projections. It is in units
  of a step: for a step size :math:`\beta`, the published variable is
  :math:`r = s / \beta`, which are alike while the step size is constant.

  Under `jax.vmap`, with a key for each member, both branches of the coin are
  computed; mapped by `jax.lax.map`, or with a key that is shared, only one is.

  Attributes:
    set: a projection or an affine set.
    probability: p in (0, 1], a constant or a schedule from the number of
      updates so far; 1 projects always.
    key: PRNG key of the coins, or a whole number. Sequences of different names
      draw different coins from one key.
    control_variate: False holds s at zero: a control that does not converge.

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
    counts: projections so far, and rounds if one is a mean over clients.
  """

  key: chex.PRNGKey
  count: chex.Array
  control: Any
  counts: types.Named | None


class Relaxed(NamedTuple):
  r"""A set that is projected on once an update, after a longer step.

  .. math::
    z \leftarrow \Pi (z_0 + r \, (z_T - z_0))

  with the sequence :math:`z_0` before and :math:`z_T` after all steps of one
  update, none of which is projected.

  Attributes:
    set: a projection or an affine set; None for the whole space.
    factor: :math:`r \ge 1`, a constant or a schedule from the number of
      updates so far.
  """

  set: Any
  factor: types.ScalarOrSchedule = 1.0


class Joint(NamedTuple):
  r"""A set of several sequences at once.

  .. math::
    (z, z', \dots) \leftarrow \Pi (z, z', \dots)

  It belongs to one of the sequences, and moves the others too.

  Attributes:
    projection: from a tuple of the sequence and the others, in this order, to
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


class Kept(NamedTuple):
  """What `descend` does with the set of one sequence.

  Attributes:
    last: when it is settled: 0 before sets that depend on other sequences, 1
      as one of these.
    init: from all sequences to the state; raises if the set has no point.
    each: after a step, from (loose sequences, sequences before it, state) to
      the sequences to replace and the state; None if nothing is to do.
    finish: the same after all steps of an update, with the sequences before the
      first of them.
    uses: what settling once costs, where that is known beforehand, by the keys
      of `bj.counts`.
    others: names of further sequences that it moves.
  """

  last: int
  init: Callable[[Any], Any]
  each: Callable[[Any, Any, Any], Settled] | None
  finish: Callable[[Any, Any, Any], Settled] | None
  uses: dict[str, int]
  others: tuple[str, ...] = ()


def kept(name: str, given: Any) -> Kept:
  """Makes the set of a sequence ready, whichever kind it is."""
  if isinstance(given, Lazy):
    return _lazy(name, given)
  if isinstance(given, Relaxed):
    return _relaxed(name, given)
  if isinstance(given, Joint):
    return _joint(name, given)
  if given is None:
    return Kept(0, lambda z: (), None, None, {})

  def each(loose, before, state):
    del before
    return {name: _set.nearest(given, getattr(loose, name), loose)}, state

  return Kept(
    _set.depends(given), _checker(name, given), each, None, _uses(name, given)
  )


def _checker(name, given):
  def init(z):
    _set.check(given, z, name)
    return ()

  return init


def _uses(name, given):
  uses = {f'projections/{name}': 1}
  if isinstance(given, _affine.AffineSet) and given.rounds:
    uses[f'rounds/{name}'] = given.rounds
  return uses


def _joint(name, given):
  names = (name, *given.others)

  def check(z):
    _sequences.require_sequences(z, names, 'a joint set')
    point = tuple(getattr(z, n) for n in names)
    _set.check_set(given.projection, point, ' and '.join(names))
    return ()

  def each(loose, before, state):
    del before
    inside = given.projection(tuple(getattr(loose, n) for n in names))
    return dict(zip(names, inside, strict=True)), state

  uses = {f'projections/{"+".join(names)}': 1}
  return Kept(2, check, each, None, uses, given.others)


@states.counts_updates
class _RelaxedState(NamedTuple):
  count: chex.Array


def _relaxed(name, given):
  plain = kept(name, given.set)
  _checks.within('Relaxed', 'the factor', given.factor, 1)

  def init(z):
    plain.init(z)
    return _RelaxedState(_trees.zeros([], jnp.int32))

  def finish(loose, before, state):
    factor = given.factor
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

  return Kept(plain.last, init, None, finish, plain.uses)


def _lazy(name, given):
  if not callable(given.probability):
    _checks.within(
      'Lazy', 'the probability', given.probability, 0, 1, open_low=True
    )
  uses = _uses(name, given.set)

  def init(z):
    _set.check(given.set, z, name)
    key = _keys.as_key(given.key, 'Lazy')
    control = None
    if given.control_variate:
      control = optax.tree.zeros_like(getattr(z, name))
    return LazyState(
      # Names apart: two sequences with one key draw coins of their own.
      jax.random.fold_in(key, zlib.crc32(name.encode())),
      _trees.zeros([], jnp.int32),
      control,
      types.Named(tuple(uses), _trees.zeros(len(uses), jnp.int32)),
    )

  def each(loose, before, state):
    del before
    following, now = jax.random.split(state.key)
    p = given.probability
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
      # Hat z minus s / p, without adding s first.
      inside = _set.nearest(given.set, shifted(1 - 1 / p), loose)
      inside = _trees.cast_like(inside, free)
      # In a shard_map, a mean over clients is of another type than its terms.
      return _sequences.vary_like(inside, free)

    inside = jax.lax.cond(heads, project, lambda: free)
    if control is not None:
      # No change where the coin was tails.
      change = optax.tree.sub(inside, free)
      control = _trees.add_scaled(control, p, change)
    spent = {n: use * heads.astype(jnp.int32) for n, use in uses.items()}
    counts = states.add_counts(state.counts, spent)
    count = optax.safe_increment(state.count)
    return {name: inside}, LazyState(following, count, control, counts)

  return Kept(_set.depends(given.set), init, each, None, {})
