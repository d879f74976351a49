"""Members of a run: one per seed and point of hyperparameters.

All members share one compiled program. Its functions get the `Context` of one
member at one step.
"""

import itertools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp


class Context(NamedTuple):
  """One member at one step.

  Attributes:
    data: the data of all members, a pytree of arrays.
    own: the data of this member, or ().
    hyper: the hyperparameters of this member, or ().
    seed_key: PRNG key of the seed, the same at every step.
    key: PRNG key of this step; `init`, `batch`, `evaluate` and the solver get
      independent ones.
    step: steps taken so far, int32 scalar.
    frozen: weights that are not trained, or ().
    streamed: the stream's batch of this step, or ().
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
  """Seeds, own data and hyperparameters; leaves have an axis of members."""

  seed: chex.Array
  own: Any
  hyper: Any


def members(
  seeds: int | Sequence[int], **grid: Sequence[float]
) -> tuple[tuple[int, ...], dict[str, chex.Array]]:
  """Crosses seeds with a grid of hyperparameters.

  Args:
    seeds: seeds, or their number.
    **grid: values by hyperparameter.

  Returns:
    Seeds and hyperparameters of all members, for `train`. The first
    hyperparameter varies slowest and the seed fastest: an array over members
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
  """Converts a number n to the seeds 0 to n - 1; keeps a list of seeds.

  Raises:
    ValueError: if there is no seed, or one is outside of [0, 2**32).
  """
  seeds = range(seeds) if isinstance(seeds, int) else seeds
  seeds = tuple(int(s) for s in seeds)
  if not seeds or any(not 0 <= s < 2**32 for s in seeds):
    raise ValueError(f'seeds are one or more of 0 ... 2**32 - 1, got {seeds}.')
  return seeds


class Shared(NamedTuple):
  """The data and frozen weights of all members."""

  data: Any = ()
  frozen: Any = ()


def make_context(
  member: Members, shared: Shared, stream: str, step: Any, streamed: Any = None
) -> Context:
  """Returns a member's context at a step, with keys of a random stream."""
  seed_key = jax.random.key(member.seed)
  # A large number: fold_in(seed_key, 0, 1, ...) stays free for other uses.
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
  """Maps fn(arrays, member, shared) over members.

  Args:
    fn: a function of one member.
    at_once: members that are mapped by `vmap`, or None for all.

  Returns:
    The function of arrays and members with a leading axis; `shared` is not
    mapped.
  """
  if at_once is None:
    # Products of shared data with all weights become one matrix product.
    return jax.vmap(fn, in_axes=(0, 0, None))
  # Not a batch of one, which is a vmap and takes both branches of a `cond`.
  size = None if at_once == 1 else at_once

  def mapped(arrays, every, shared):
    one = lambda each: fn(*each, shared)
    return jax.lax.map(one, (arrays, every), batch_size=size)

  return mapped
