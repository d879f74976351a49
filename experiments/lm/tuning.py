"""How a model is trained: what moves, what is frozen, what is computed once."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments import harness
from experiments.lm import decoder, kept, log_probs, lora, tables
from experiments.lm.config import Config


class Tuning(NamedTuple):
  """What of a model is trained.

  Attributes:
    config: of the model.
    rank: of the adapters; 0 trains the weights themselves: of all layers with
      the embedding and the head, of a part of the layers nothing else.
    weights: which weights of a layer get adapters.
    alpha: adapters count alpha / rank.
    layers: of how many layers, the last ones; None for all.
    remat: whether the backward pass computes each layer anew, for memory.
    dtype: of the arithmetic, bfloat16 on accelerators; None for that of the
      weights, which keep theirs.
    rows: a sharding of (rows, length): how a batch lies on a mesh of devices.
  """

  config: Config
  rank: int = 16
  weights: tuple[str, ...] = ('q', 'v')
  alpha: float = 16.0
  layers: int | None = None
  remat: bool = False
  dtype: Any = None
  rows: jax.sharding.Sharding | None = None

  @property
  def scale(self) -> float:
    """What the products of adapters are multiplied by."""
    return self.alpha / self.rank if self.rank else 1.0

  @property
  def cut(self) -> int:
    """How many layers lie below those that are trained.

    Raises:
      SettingsError: if the model has fewer layers than are to be trained.
    """
    if (self.layers or 0) > self.config.layers:
      raise harness.SettingsError(
        f'layers={self.layers} are to be trained, but the model has '
        f'{self.config.layers}.'
      )
    return self.config.layers - (self.layers or self.config.layers)

  def split(self, params: decoder.Params) -> tuple[Any, Any]:
    """The layers below, for `cache`, and what `answers` takes as frozen."""
    if not self.cut:
      return None, params
    return decoder.split_layers(params, self.cut)

  def init(self, frozen: decoder.Params, key: jax.Array) -> Any:
    """What is trained, at its start: adapters that change nothing, or all."""
    if not self.rank:
      # Where layers below were run before, what they saw is to stay.
      names = ('layers',) if self.cut else decoder.shapes(self.config)
      part = {name: frozen[name] for name in names}
      # Small steps are lost in bfloat16.
      wide = lambda leaf: jnp.promote_types(leaf.dtype, jnp.float32)
      return jax.tree.map(lambda leaf: jnp.asarray(leaf, wide(leaf)), part)
    return lora.init(frozen, key, rank=self.rank, weights=self.weights)

  def params(self, trained: Any, frozen: decoder.Params) -> decoder.Params:
    """Params for `decoder`, of the layers that are trained."""
    if not self.rank:
      return {**frozen, **trained}
    return lora.attach(frozen, trained, scale=self.scale)

  def merged(self, trained: Any, params: decoder.Params) -> decoder.Params:
    """The whole model as trained, for generation and `hugging_face.export`."""
    if self.rank:
      return lora.merge(params, trained, scale=self.scale)
    if not self.cut:
      return trained
    whole = {
      name: jnp.concatenate([params['layers'][name][: self.cut], above])
      for name, above in trained['layers'].items()
    }
    return {**params, 'layers': whole}

  def answers(
    self,
    trained: Any,
    frozen: decoder.Params,
    rows: tables.Rows,
    names: Sequence[str] = ('tokens',),
    *,
    longest: int | None = None,
    read: Callable[..., log_probs.Answers] = log_probs.of_answers,
  ) -> log_probs.Answers:
    """Log-probabilities of answers, of several kinds in one pass.

    Args:
      trained: as `init` gives it.
      frozen: as `split` gives it.
      rows: tokens by name, with masks, and what `cache` has added; of packed
        rows `segments` and `positions`.
      names: of the tokens: ('chosen', 'rejected') for both answers, whose rows
        then follow one another.
      longest: as in `log_probs.of_answers`.
      read: that, or `log_probs.distributions`.

    Returns:
      The answers, (rows of all names, tokens).
    """
    params = self.params(trained, frozen)
    together = lambda found: jnp.concatenate(list(found))
    tokens = together(rows[n] for n in names)
    if self.rows is not None:
      tokens = jax.lax.with_sharding_constraint(tokens, self.rows)
    mask = together(rows[mask_name(n)] for n in names)
    if self.cut and f'{names[0]}_x' not in rows:
      raise ValueError(
        f'{self.cut} layers below are frozen, and the rows have no '
        f'{names[0]}_x: put them through `cache` first.'
      )
    if f'{names[0]}_x' in rows:
      x = together(rows[f'{n}_x'] for n in names)
      x = x if self.dtype is None else x.astype(self.dtype)
    else:
      x = decoder.embed(params, tokens, self.dtype)
    x = decoder.run_layers(
      self.config,
      params['layers'],
      x,
      segments=rows.get('segments'),
      positions=rows.get('positions'),
      remat=self.remat,
    )
    return read(self.config, params, x, tokens, mask, longest=longest)


def mask_name(tokens: str) -> str:
  """The name of the mask of tokens: `mask`, or `chosen_mask`."""
  return 'mask' if tokens == 'tokens' else f'{tokens}_mask'


def cache(
  config: Config,
  below: decoder.Params,
  table: tables.Table,
  *,
  dtype: Any = None,
  folder: Any = None,
  rows: int = 16,
) -> tables.Table:
  """Adds what leaves the frozen layers: they are never run again.

  Args:
    config: of the model.
    below: the frozen layers, as `Tuning.split` gives them.
    table: of tokens.
    dtype: what is computed in; None for that of the weights.
    folder: where it is kept; see `kept.arrays`.
    rows: at a time.

  Returns:
    The table with `tokens_x` and so on, (examples, length, width).
  """

  def run(below, tokens, packing):
    def one(row):
      row = jax.tree.map(lambda leaf: leaf[None], row)
      found = decoder.trunk(config, below, row['tokens'], dtype, **row['where'])
      return found[0]

    return jax.lax.map(
      one, {'tokens': tokens, 'where': packing}, batch_size=rows
    )

  compiled = jax.jit(run)
  parts = []
  for part in table.parts:
    names = [n for n in ('tokens', 'chosen', 'rejected') if n in part]
    tokens = {n: part[n] for n in names}
    packing = {n: part[n] for n in ('segments', 'positions') if n in part}
    found = kept.arrays(
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
    parts.append({**part, **found})
  return tables.with_parts(table, parts)
