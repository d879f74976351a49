"""Trained and frozen parts of a model, and outputs of frozen layers."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from experiments import harness
from experiments.lm import (
  array_cache,
  batches,
  decoder,
  log_probs,
  lora,
  tables,
)
from experiments.lm.config import Config

# Bytes of stored activations from which layers are recomputed by default.
REMAT_BYTES = 2**31


class Tuning(NamedTuple):
  """The trained part of a model.

  Attributes:
    config: config of the model.
    rank: rank of the adapters; 0 trains the weights: all of them, or those of
      the last layers without the embedding and the head.
    weights: names of the adapted weights of a layer.
    alpha: scale of the adapters times their rank.
    layers: number of trained layers, the last ones; None for all.
    remat: whether the backward pass recomputes each layer, to save memory;
      'auto' for batches whose stored activations exceed `REMAT_BYTES`.
    dtype: dtype of the arithmetic; None for that of the weights.
    rows: sharding of (rows, length) over a mesh, or None.
  """

  config: Config
  rank: int = 16
  weights: tuple[str, ...] = ('q', 'v')
  alpha: float = 16.0
  layers: int | None = None
  remat: bool | Literal['auto'] = False
  dtype: Any = None
  rows: jax.sharding.Sharding | None = None

  @property
  def scale(self) -> float:
    """Scale of the products of adapters."""
    return self.alpha / self.rank if self.rank else 1.0

  @property
  def cut(self) -> int:
    """Number of frozen layers below the trained ones.

    Raises:
      SettingsError: if the model has fewer than `layers` layers.
    """
    if (self.layers or 0) > self.config.layers:
      raise harness.SettingsError(
        f'layers={self.layers}, but the model has {self.config.layers}: train '
        'fewer layers.'
      )
    return self.config.layers - (self.layers or self.config.layers)

  def recomputes(self, rows: int, length: int) -> bool:
    """Whether the backward pass of a batch recomputes each layer.

    Args:
      rows: number of sequences, on all devices together.
      length: tokens of a sequence.
    """
    if self.remat != 'auto':
      return self.remat
    layers = self.layers or self.config.layers
    numbers = rows * length * layers * self.config.stored_per_token(length)
    itemsize = jnp.dtype(self.dtype or jnp.float32).itemsize
    return numbers * itemsize > REMAT_BYTES

  def split(self, params: decoder.Params) -> tuple[Any, Any]:
    """Splits a model into layers for `cache`, and weights for `answers`."""
    if not self.cut:
      return None, params
    return decoder.split_layers(params, self.cut)

  def init(self, frozen: decoder.Params, key: jax.Array) -> Any:
    """Initialises what is trained: adapters without effect, or weights."""
    if not self.rank:
      # The cached outputs of frozen layers depend on the embedding.
      names = ('layers',) if self.cut else decoder.shapes(self.config)
      part = {name: frozen[name] for name in names}
      # Small steps would be lost in bfloat16.
      wide = lambda leaf: jnp.promote_types(leaf.dtype, jnp.float32)
      return jax.tree.map(lambda leaf: jnp.asarray(leaf, wide(leaf)), part)
    return lora.init(frozen, key, rank=self.rank, weights=self.weights)

  def params(self, trained: Any, frozen: decoder.Params) -> decoder.Params:
    """Combines trained and frozen weights to params for `decoder`."""
    if not self.rank:
      return {**frozen, **trained}
    return lora.attach(frozen, trained, scale=self.scale)

  def merged(self, trained: Any, params: decoder.Params) -> decoder.Params:
    """Merges the trained part into the model, for generation and export."""
    if self.rank:
      return lora.merge(params, trained, scale=self.scale)
    if not self.cut:
      return trained
    layers = {
      name: jnp.concatenate([params['layers'][name][: self.cut], above])
      for name, above in trained['layers'].items()
    }
    return {**params, 'layers': layers}

  def answers(
    self,
    trained: Any,
    frozen: decoder.Params,
    rows: tables.Rows,
    names: Sequence[str] = ('tokens',),
    *,
    max_answer: int | None = None,
    read: Callable[..., log_probs.Answers] = log_probs.from_hidden,
  ) -> log_probs.Answers:
    """Computes log-probabilities of answers in one pass.

    Args:
      trained: trained weights, from `init`.
      frozen: frozen weights, from `split`.
      rows: tokens and masks by name, with arrays of `cache`, and `segments` and
        `positions` of packed rows.
      names: names of the tokens; ('chosen', 'rejected') concatenates the rows
        of both answers.
      max_answer: as in `log_probs.from_hidden`.
      read: `log_probs.from_hidden` or `log_probs.distributions`.

    Returns:
      The answers, (rows of all names, tokens).
    """
    params = self.params(trained, frozen)
    join = lambda suffix: jnp.concatenate([rows[f'{n}{suffix}'] for n in names])
    tokens = join('')
    if self.rows is not None:
      tokens = jax.lax.with_sharding_constraint(tokens, self.rows)
    mask = jnp.concatenate([rows[batches.mask_name(n)] for n in names])
    if self.cut and f'{names[0]}_x' not in rows:
      raise ValueError(
        f'{self.cut} layers are frozen, but the rows have no {names[0]}_x: '
        'call `cache` first.'
      )
    if f'{names[0]}_x' in rows:
      x = join('_x')
      x = x if self.dtype is None else x.astype(self.dtype)
    else:
      x = decoder.embed(params, tokens, self.dtype)
    if self.rows is not None:
      # The embedding is split over its width: without this, the compiler splits
      # the width of x too, and each device computes the attention of all rows.
      x = jax.lax.with_sharding_constraint(x, self.rows)
    x = decoder.run_layers(
      self.config,
      params['layers'],
      x,
      segments=rows.get('segments'),
      positions=rows.get('positions'),
      remat=self.recomputes(*tokens.shape),
    )
    return read(self.config, params, x, tokens, mask, max_answer=max_answer)


def cache(
  config: Config,
  below: decoder.Params,
  table: tables.Table,
  *,
  dtype: Any = None,
  folder: Any = None,
  rows: int = 16,
) -> tables.Table:
  """Adds the outputs of the frozen layers to a table.

  Args:
    config: config of the model.
    below: frozen layers, from `Tuning.split`.
    table: table with tokens.
    dtype: dtype of the arithmetic; None for that of the weights.
    folder: folder of stored arrays, see `array_cache.load_or_compute`.
    rows: rows per batch.

  Returns:
    The table with `tokens_x`, or `chosen_x` and `rejected_x`, (examples,
    length, width).
  """

  def run(below, tokens, packing):
    def one(row):
      row = jax.tree.map(lambda leaf: leaf[None], row)
      x = decoder.trunk(config, below, row['tokens'], dtype, **row['packing'])
      return x[0]

    return jax.lax.map(
      one, {'tokens': tokens, 'packing': packing}, batch_size=rows
    )

  compiled = jax.jit(run)
  parts = []
  for part in table.parts:
    names = [n for n in ('tokens', 'chosen', 'rejected') if n in part]
    tokens = {n: part[n] for n in names}
    packing = {n: part[n] for n in ('segments', 'positions') if n in part}
    outputs = array_cache.load_or_compute(
      folder,
      'trunk',
      f'{config} {dtype}',
      {'below': below, 'tokens': tokens}
      | ({'packing': packing} if packing else {}),
      lambda tokens=tokens, packing=packing: {
        f'{n}_x': compiled(below, array, packing) for n, array in tokens.items()
      },
      names=[f'{n}_x' for n in names],
      count=len(part['index']),
    )
    parts.append({**part, **outputs})
  return tables.with_parts(table, parts)
