"""How a model is trained: what moves, what is frozen, what is computed once."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lm import decoder, log_probs, lora, tables
from experiments.lm.config import Config


class Tuning(NamedTuple):
  """What of a model is trained.

  Attributes:
    config: of the model.
    rank: of the adapters; 0 trains all weights instead.
    weights: which weights of a layer get adapters.
    alpha: adapters count alpha / rank.
    layers: of how many layers, the last ones; None for all.
    remat: whether the backward pass computes each layer anew, for memory.
  """

  config: Config
  rank: int = 16
  weights: tuple[str, ...] = ('q', 'v')
  alpha: float = 16.0
  layers: int | None = None
  remat: bool = False

  @property
  def scale(self) -> float:
    """What the products of adapters are multiplied by."""
    return self.alpha / self.rank if self.rank else 1.0

  @property
  def cut(self) -> int:
    """How many layers lie below those that are trained."""
    return self.config.layers - (self.layers or self.config.layers)

  def split(self, params: decoder.Params) -> tuple[Any, Any]:
    """The layers below, for `cache`, and what `answers` takes as frozen."""
    if not self.cut:
      return None, params
    return decoder.split_layers(params, self.cut)

  def init(self, frozen: decoder.Params, key: jax.Array) -> Any:
    """What is trained, at its start: adapters that change nothing, or all."""
    if not self.rank:
      return jax.tree.map(jnp.asarray, frozen)
    return lora.init(frozen, key, rank=self.rank, weights=self.weights)

  def params(self, trained: Any, frozen: decoder.Params) -> decoder.Params:
    """Params for `decoder`, of the layers that are trained."""
    if not self.rank:
      return trained
    return lora.attach(frozen, trained, scale=self.scale)

  def merged(self, trained: Any, params: decoder.Params) -> decoder.Params:
    """The whole model as trained, for generation and `weights.export`."""
    if self.rank:
      return lora.merge(params, trained, scale=self.scale)
    if not self.cut:
      return trained
    below, _ = self.split(params)
    whole = lambda n: jnp.concatenate(
      [below['layers'][n], trained['layers'][n]]
    )
    return {**trained, 'layers': {n: whole(n) for n in trained['layers']}}

  def answers(
    self,
    trained: Any,
    frozen: decoder.Params,
    rows: tables.Rows,
    names: Sequence[str] = ('tokens',),
    *,
    longest: int | None = None,
  ) -> log_probs.Answers:
    """Log-probabilities of answers, of several kinds in one pass.

    Args:
      trained: as `init` gives it.
      frozen: as `split` gives it.
      rows: tokens by name, with masks, and what `cache` has added.
      names: of the tokens: ('chosen', 'rejected') for both answers, whose rows
        then follow one another.
      longest: as in `log_probs.of_answers`.

    Returns:
      The answers, (rows of all names, tokens).
    """
    params = self.params(trained, frozen)
    together = lambda found: jnp.concatenate(list(found))
    tokens = together(rows[n] for n in names)
    mask = together(rows[mask_name(n)] for n in names)
    if f'{names[0]}_x' in rows:
      x = together(rows[f'{n}_x'] for n in names)
    else:
      x = decoder.embed(params, tokens)
    x = decoder.run_layers(self.config, params['layers'], x, remat=self.remat)
    return log_probs.of_answers(
      self.config, params, x, tokens, mask, longest=longest
    )


def mask_name(tokens: str) -> str:
  """The name of the mask of tokens: `mask`, or `chosen_mask`."""
  return 'mask' if tokens == 'tokens' else f'{tokens}_mask'


def cache(
  config: Config,
  below: decoder.Params,
  table: tables.Table,
  *,
  rows: int = 16,
) -> tables.Table:
  """Adds what leaves the frozen layers: they are never run again.

  Args:
    config: of the model.
    below: the frozen layers, as `Tuning.split` gives them.
    table: of tokens.
    rows: at a time.

  Returns:
    The table with `tokens_x` and so on, (examples, length, width).
  """

  def run(below, tokens):
    one = lambda row: decoder.trunk(config, below, row[None])[0]
    return jax.lax.map(one, tokens, batch_size=rows)

  compiled = jax.jit(run)
  parts = []
  for part in table.parts:
    names = [n for n in ('tokens', 'chosen', 'rejected') if n in part]
    found = {f'{n}_x': np.asarray(compiled(below, part[n])) for n in names}
    parts.append({**part, **found})
  return tables.with_parts(table, parts)
