"""Log-probabilities of answers: the head sees their positions only."""

import hashlib
import io
import pathlib
import zipfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

import bilevel_jax as bj
from experiments import harness
from experiments.harness import files
from experiments.lm import decoder
from experiments.lm.config import Config


class Answers(NamedTuple):
  """Log-probabilities of the tokens of answers.

  Attributes:
    log_probs: (rows, tokens), nats, float32 or wider.
    mask: 1 where there is a token, 0 behind the end, (rows, tokens).
  """

  log_probs: jax.Array
  mask: jax.Array

  @property
  def total(self) -> jax.Array:
    """Sums over the tokens of each answer, (rows,)."""
    return bj.losses.masked_sum(self.log_probs, self.mask)

  @property
  def mean(self) -> jax.Array:
    """Means over the tokens of each answer, (rows,)."""
    return bj.losses.masked_mean(self.log_probs, self.mask)


def of_answers(
  config: Config,
  params: decoder.Params,
  x: jax.Array,
  tokens: jax.Array,
  mask: jax.Array,
  *,
  longest: int | None = None,
) -> Answers:
  """From what left the last layer.

  Args:
    config: of the model.
    params: of its head: `norm`, and `head` or `embed`.
    x: what left the last layer, (rows, length, width).
    tokens: (rows, length).
    mask: 1 for the tokens of the answer, or of the answers of a packed row.
    longest: most tokens of answers in a row: only so many positions are given
      to the head, which for a small model with many words is a fifth of its
      cost. What a row has beyond is not seen. By default all positions.

  Returns:
    An `Answers`, of `longest` tokens or of one less than the length.
  """
  length = tokens.shape[1]
  if longest is None:
    found = decoder.logits(config, params, x[:, :-1])
    kept = bj.losses.token_log_probs(found, tokens[:, 1:])
    return Answers(kept, mask[:, 1:])
  # The first token of a row is predicted by nothing.
  each = jnp.arange(length)
  at = jnp.sort(jnp.where((mask > 0) & (each > 0), each, length), axis=1)
  at = at[:, : min(longest, length - 1)]
  inside = jnp.minimum(at, length - 1)
  take = lambda array: jnp.take_along_axis(array, inside, axis=1)
  near = jnp.take_along_axis(x, inside[..., None] - 1, axis=1)
  found = decoder.logits(config, params, near)
  kept = jnp.where(at < length, take(mask), 0)
  return Answers(bj.losses.token_log_probs(found, take(tokens)), kept)


def of_model(
  config: Config,
  params: decoder.Params,
  tokens: jax.Array,
  mask: jax.Array,
  *,
  segments: jax.Array | None = None,
  positions: jax.Array | None = None,
  longest: int | None = None,
  remat: bool = False,
  dtype: Any = None,
) -> Answers:
  """The same from tokens, by the whole model.

  Args:
    config: of the model.
    params: of the model, adapters attached.
    tokens: (rows, length).
    mask: as in `of_answers`.
    segments: of packed rows, as in `decoder.run_layers`.
    positions: likewise.
    longest: as in `of_answers`.
    remat: as in `decoder.run_layers`.
    dtype: what is computed in, bfloat16 on accelerators for instance, while
      weights and their gradients keep theirs. None for that of the weights.

  Returns:
    An `Answers`; its numbers are float32 or wider whatever the dtype.
  """
  x = decoder.run_layers(
    config,
    params['layers'],
    decoder.embed(params, tokens, dtype),
    segments=segments,
    positions=positions,
    remat=remat,
  )
  return of_answers(config, params, x, tokens, mask, longest=longest)


def reference_of(
  config: Config,
  params: decoder.Params,
  pairs: dict[str, Any],
  *,
  rows: int = 8,
  dtype: Any = None,
) -> dict[str, jax.Array]:
  """Log-probabilities of all comparisons under a fixed model, once.

  Args:
    config: of the model.
    params: of the model that stays.
    pairs: arrays of comparisons, as `batches.stacked` gives them.
    rows: at a time.
    dtype: as in `of_model`: that of training, so that both round alike.

  Returns:
    `reference_chosen` and `reference_rejected`, sums over tokens, (examples,).
  """

  def run(params, *both):
    one = lambda each: of_model(
      config, params, *(a[None] for a in each), dtype=dtype
    )
    return jax.lax.map(lambda each: one(each).total[0], both, batch_size=rows)

  # The weights are an argument: as constants they would be in the program.
  compiled = jax.jit(run)
  return {
    f'reference_{name}': compiled(params, pairs[name], pairs[f'{name}_mask'])
    for name in ('chosen', 'rejected')
  }


def cached_reference(
  folder: files.Path,
  config: Config,
  params: decoder.Params,
  pairs: dict[str, Any],
  *,
  rows: int = 8,
  dtype: Any = None,
) -> dict[str, Any]:
  """`reference_of`, computed once for each model and data, and kept in a file.

  The file's name is a digest of all that the numbers depend on, every weight
  and token included: other weights, other rows or another order are another
  file. A file that is damaged is put aside with a warning, and made anew.

  Args:
    folder: of such files; of several processes, all may see the same.
    config: as in `reference_of`.
    params: likewise.
    pairs: likewise.
    rows: likewise; it changes rounding only, and is not in the digest.
    dtype: likewise.

  Returns:
    As `reference_of`.

  Raises:
    WriteError: if the folder cannot be written.
  """
  used = {
    name: np.asarray(pairs[name])
    for name in ('chosen', 'chosen_mask', 'rejected', 'rejected_mask')
  }
  said = None if dtype is None else jnp.dtype(dtype).name
  key = _digest(f'1 {config} {said}', {'params': params, 'pairs': used})
  path = pathlib.Path(folder) / f'reference-{key}.npz'
  found = _read(path, len(used['chosen']))
  here = found is not None
  if jax.process_count() > 1:
    here = bool(np.all(multihost_utils.process_allgather(np.array(here))))
  if here and found is not None:
    return found
  made = reference_of(config, params, used, rows=rows, dtype=dtype)
  found = {name: np.asarray(harness.whole(one)) for name, one in made.items()}
  buffer = io.BytesIO()
  np.savez(buffer, **found)
  files.write_bytes(path, buffer.getvalue())
  return found


def _digest(text: str, tree: Any) -> str:
  """Of all numbers: a sample of them would not see a changed token."""
  found = hashlib.blake2b(text.encode(), digest_size=16)
  for path, leaf in jax.tree.leaves_with_path(tree):
    array = np.ascontiguousarray(harness.whole(leaf))
    name = jax.tree_util.keystr(path)
    found.update(f'{name} {array.dtype} {array.shape}'.encode())
    found.update(array.view(np.uint8).data if array.size else b'')
  return found.hexdigest()


def _read(path: pathlib.Path, count: int) -> dict[str, Any] | None:
  """What a file holds; None if there is none, or it is damaged."""
  names = ('reference_chosen', 'reference_rejected')
  try:
    with np.load(io.BytesIO(path.read_bytes())) as file:
      found = {name: file[name] for name in names}
    if all(one.shape == (count,) for one in found.values()):
      return found
  except FileNotFoundError:
    return None
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
    pass
  files.put_aside(
    path,
    f'{path} is damaged; the log-probabilities of the reference are computed '
    'anew',
    path.parent,
  )
  return None
