"""Members of a run: a seed each, with data and hyperparameters of its own.

All of them share one compiled program. What its functions see of one member at
one step is a `Context`.
"""

import itertools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp


class Context(NamedTuple):
  """What a function of a run sees: one member, one step.

  Attributes:
    data: shared by all members; a pytree of arrays.
    own: this member's own data, or ().
    hyper: this member's hyperparameters, or ().
    seed_key: PRNG key of the seed, the same at every step.
    key: PRNG key of this step; batches, evaluations, the initial params and
      the solver draw from different streams.
    step: steps taken so far, int32 scalar.
    frozen: weights that are not trained, whole; or ().
    streamed: what the stream gives this step, the same for all members; or ().
  """

  data: Any
  own: Any
  hyper: Any
  seed_key: chex.PRNGKey
  key: chex.PRNGKey
  step: chex.Array
  frozen: Any = ()
  streamed: Any = ()


class Members(NamedTuple):
  """What tells members apart; every leaf has a leading axis of members."""

  seed: chex.Array
  own: Any
  hyper: Any


def members(
  seeds: int | Sequence[int], **grid: Sequence[float]
) -> tuple[tuple[int, ...], dict[str, chex.Array]]:
  """Crosses seeds with a grid of hyperparameters.

  Args:
    seeds: seeds, or their number.
    **grid: values for each hyperparameter.

  Returns:
    Seeds and hyperparameters of all members, for `train`. The first
    hyperparameter varies slowest and the seed fastest, so an array of members
    reshapes to (len(first), ..., len(last), len(seeds)).

  Example:
    >>> members(2, rate=(0.1, 0.2))[0]
    (0, 1, 0, 1)
  """
  seeds = as_seeds(seeds)
  rows = list(itertools.product(*grid.values(), seeds))
  columns = list(zip(*rows, strict=True))
  hyper = {
    name: jnp.asarray(column)
    for name, column in zip(grid, columns[:-1], strict=True)
  }
  return columns[-1], hyper


def as_seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
  """Seeds 0 to n - 1 for a number n, or the seeds as given.

  Raises:
    ValueError: if there is none, or one is not in [0, 2**32).
  """
  seeds = range(seeds) if isinstance(seeds, int) else seeds
  seeds = tuple(int(s) for s in seeds)
  if not seeds or any(not 0 <= s < 2**32 for s in seeds):
    raise ValueError(f'seeds are one or more of 0 ... 2**32 - 1, got {seeds}.')
  return seeds


class Shared(NamedTuple):
  """What all members see."""

  data: Any = ()
  frozen: Any = ()


def context_of(
  member: Members, shared: Shared, stream: str, step: Any, streamed: Any = None
) -> Context:
  """What a function of `stream` sees of one member at one step."""
  seed_key = jax.random.key(member.seed)
  # A long tag, so that fold_in(seed_key, 0, 1, ...) is free for other uses.
  tagged = jax.random.fold_in(seed_key, zlib.crc32(stream.encode()))
  key = jax.random.fold_in(tagged, step)
  return Context(
    data=shared.data,
    own=member.own,
    hyper=member.hyper,
    seed_key=seed_key,
    key=key,
    step=step,
    frozen=shared.frozen,
    streamed=() if streamed is None else streamed,
  )


def over_members(fn: Callable[..., Any], at_once: int | None):
  """Maps fn(arrays, member, shared) over the members of the first two.

  Args:
    fn: of one member; what is shared is not mapped.
    at_once: members that run side by side, or None for all.

  Returns:
    A function of trees with a leading axis of members, and of what is shared.
  """
  if at_once is None:
    # A product of shared data with the weights of all members becomes one
    # matrix product.
    return jax.vmap(fn, in_axes=(0, 0, None))
  # A batch of one would still be a vmap, which takes every branch.
  size = None if at_once == 1 else at_once

  def mapped(arrays, every, shared):
    one = lambda each: fn(*each, shared)
    return jax.lax.map(one, (arrays, every), batch_size=size)

  return mapped
