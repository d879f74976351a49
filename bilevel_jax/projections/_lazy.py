"""Lazy projection: only now and then, with a control variate in between."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _keys, _sequences, types
from bilevel_jax.projections import _project


class LazyProjectionState(NamedTuple):
  """State of `lazy_projection`.

  Attributes:
    key: PRNG key of the next coin.
    count: updates so far, int32 scalar.
    control: the control variate of each sequence, in units of an update; or
      None without one.
    counts: projections so far, by sequence, and communication rounds if a
      projection is a mean over clients; int32 scalars.
  """

  key: chex.PRNGKey
  count: chex.Array
  control: dict[str, Any] | None
  counts: dict[str, chex.Array]


def lazy_projection(
  probability: types.ScalarOrSchedule,
  *,
  key: Any,
  control_variate: bool = True,
  **sets: _project.Projection | None,
) -> optax.GradientTransformationExtraArgs:
  r"""Projects with a probability, and corrects the steps in between.

  With the step u that comes in, a control variate s, zero at the start, and
  one coin for all sequences, heads with probability p,

  .. math::
    \hat z = z + u + s, \qquad
    (z, s) \leftarrow \begin{cases}
      (z^+, \; s + p \, (z^+ - \hat z)) \quad
        \text{with } z^+ = \Pi(\hat z - s / p) & \text{heads} \\
      (\hat z, \; s) & \text{tails}
    \end{cases}

  The control variate learns the part of a step that the projection would undo,
  so that the iterates stay close to the set without projections. It is
  in units of a step: for a step size :math:`\beta`, the published variable is
  :math:`r = s / \beta`.

  Under `jax.vmap`, with a key for each member, both branches of the coin are
  computed; mapped by `jax.lax.map`, or with a key that is shared, only one is.

  Args:
    probability: p in (0, 1]; a constant, or a schedule from the number of
      updates so far. 1 is `project`, up to rounding.
    key: PRNG key of the coins, or a whole number to make it of.
    control_variate: False holds s at zero: a control that does not converge.
    **sets: as in `project`.

  Returns:
    A transformation; it belongs last in a chain.

  Raises:
    ValueError: if a constant probability is not in (0, 1], or at init, if a set
      has no point in it.
    TypeError: at the call, if the updates are a `Jacobian`.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> agree = bj.consensus_set()
    >>> link = bj.lazy_projection(0.5, key=0, lower=agree)
    >>> params = bj.BilevelParams(None, jnp.array([0.0, 0.0]))
    >>> state, pull = link.init(params), jnp.array([3.0, 5.0])
    >>> for _ in range(60):  # Two clients, each pulled to its own point.
    ...   towards = params._replace(lower=0.1 * (pull - params.lower))
    ...   updates, state = link.update(towards, state, params)
    ...   params = bj.apply_updates(params, updates)
    >>> print(params.lower.round(1), bj.counts(state)['projections/lower'] < 40)
    [4. 4.] True

  References:
    Xiao, Shen, Yin and Chen, `Alternating Projected SGD for
    Equality-constrained Bilevel Optimization
    <https://arxiv.org/abs/2211.07096>`_, 2023.

    Mishchenko, Malinovsky, Stich and Richtarik, `ProxSkip: Yes! Local Gradient
    Steps Provably Lead to Communication Acceleration! Finally!
    <https://arxiv.org/abs/2202.09357>`_, 2022.
  """
  if (
    not callable(probability)
    and not isinstance(probability, jax.core.Tracer)
    and not 0 < probability <= 1
  ):
    raise ValueError(f'probability is in (0, 1], got {probability}.')
  given = {name: set_ for name, set_ in sets.items() if set_ is not None}

  def init_fn(params):
    _sequences.require_sequences(params, tuple(given), 'lazy_projection')
    _project.check_sets(given, params)
    control = None
    if control_variate:
      control = {
        name: optax.tree.zeros_like(getattr(params, name)) for name in given
      }
    counts = {n: jnp.zeros([], jnp.int32) for n in _project.use_of(given)}
    return LazyProjectionState(
      _keys.as_key(key, 'lazy_projection'),
      jnp.zeros([], jnp.int32),
      control,
      counts,
    )

  def update_fn(updates, state, params=None, **extra_args):
    del extra_args
    _sequences.require_sequences(params, tuple(given), 'lazy_projection')
    _sequences.require_gradients(updates, params, 'lazy_projection')
    key, now = jax.random.split(state.key)
    p = probability(state.count) if callable(probability) else probability
    p = jnp.asarray(p, jnp.float32)
    heads = jax.random.uniform(now) < p
    moving = [name for name in given if getattr(updates, name) is not None]
    control = dict(state.control or {})
    after = _sequences.apply_updates(params, updates)

    def step(name, share):
      """The point after the step and a share of the control variate."""
      if not control_variate:
        return getattr(after, name)
      return jax.tree.map(
        lambda z, s: z + share.astype(s.dtype) * s,
        getattr(after, name),
        control[name],
      )

    loose = {name: step(name, jnp.float32(1)) for name in moving}

    def project():
      # Hat z minus s / p, without adding s first.
      moved = {
        name: _project.nearest(given[name], step(name, 1 - 1 / p), after)
        for name in moving
      }
      # In a shard_map, a mean over clients is of another type than its terms.
      return _sequences.vary_like(moved, loose)

    inside = jax.lax.cond(heads, project, lambda: loose)
    for name in moving if control_variate else ():
      # Zero change where the coin was tails.
      control[name] = jax.tree.map(
        lambda s, z, free: s + p.astype(s.dtype) * (z - free),
        control[name],
        inside[name],
        loose[name],
      )
    changes = {
      name: optax.tree.sub(inside[name], getattr(params, name))
      for name in moving
    }
    spent = {
      name: n * heads.astype(jnp.int32)
      for name, n in _project.use_of({n: given[n] for n in moving}).items()
    }
    state = LazyProjectionState(
      key,
      optax.safe_increment(state.count),
      control if control_variate else None,
      _sequences.add_counts(state.counts, spent),
    )
    return updates._replace(**changes), state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
