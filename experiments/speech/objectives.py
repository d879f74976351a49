"""Losses of transcripts (CTC) and of audio alone (self-supervised).

Encoded frames are (batch, out, width) with lengths. The target of an encoded
frame depends on its `stacked` input frames alone: a learnt target encoder could
collapse to a constant. Losses are means over frames or labels and do not depend
on padding.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, Literal

import chex
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments import harness
from experiments.speech import encoders, front_end

KINDS = ('cpc', 'contrastive', 'best_rq')
# Dimension of the projections of the contrastive losses and of the quantiser.
_PROJECTION_SIZE, _CODE_SIZE = 64, 16
_TEMPERATURE = 0.1
# Standard deviation of the noise that replaces masked frames.
_MASK_NOISE = 0.1


def ctc(
  logits: chex.Array,
  lengths: chex.Array,
  labels: chex.Array,
  label_lengths: chex.Array,
) -> chex.Array:
  r"""Computes the connectionist temporal classification loss per label.

  .. math::
    - \frac{1}{|B|} \sum_{i \in B} \frac{1}{L_i} \log p(l_i \mid x_i)

  Args:
    logits: (batch, out, units); unit 0 is the blank.
    lengths: number of valid frames, int (batch,), enough for the labels.
    labels: int (batch, longest labels).
    label_lengths: number of labels, int (batch,).

  Returns:
    A scalar.
  """
  padding = lambda n, size: 1.0 - front_end.length_mask(n, size)
  losses = optax.ctc_loss(
    logits,
    padding(lengths, logits.shape[1]).astype(logits.dtype),
    labels,
    padding(label_lengths, labels.shape[1]).astype(logits.dtype),
  )
  return jnp.mean(losses / jnp.maximum(label_lengths, 1))


def stacked(features: chex.Array, shrink: int) -> chex.Array:
  """Concatenates the input frames of each encoded frame.

  Args:
    features: (batch, frames, numbers).
    shrink: input frames per encoded frame.

  Returns:
    (batch, ceil(frames / shrink), shrink * numbers), padded with zeros.
  """
  rows, size, numbers = features.shape
  out = -(-size // shrink)
  padding = [(0, 0), (0, out * shrink - size), (0, 0)]
  return jnp.pad(features, padding).reshape(rows, out, shrink * numbers)


@dataclasses.dataclass(frozen=True)
class Ssl:
  """Settings of the self-supervised loss.

  Attributes:
    ssl_loss: self-supervised loss of audio alone.
    mask_prob: probability that a masked span starts at an encoded frame.
    mask_length: length of a masked span, in encoded frames.
    negatives: number of negatives of a contrastive loss.
    prediction_steps: number of future encoded frames that CPC predicts.
    codebook_size: number of codes of the random quantiser (BEST-RQ).
  """

  ssl_loss: Literal['cpc', 'contrastive', 'best_rq'] = 'best_rq'
  mask_prob: Annotated[float, harness.Allowed(0, 1)] = 0.15
  mask_length: int = 3
  negatives: int = 20
  prediction_steps: int = 3
  codebook_size: int = 256

  @property
  def causal(self) -> bool:
    """Whether the encoder has to be causal, as CPC predicts future frames."""
    return self.ssl_loss == 'cpc'


class Predictor(nnx.Module):
  """The head of a self-supervised loss."""

  def __init__(self, ssl: Ssl, width: int, stack: int, rngs: nnx.Rngs):
    """Initialises the weights for encoded (width,) and stacked frames."""
    outputs = {
      'cpc': ssl.prediction_steps * _PROJECTION_SIZE,
      'contrastive': _PROJECTION_SIZE,
      'best_rq': ssl.codebook_size,
    }
    self.predict = nnx.Linear(width, outputs[ssl.ssl_loss], rngs=rngs)
    self.target = (
      None
      if ssl.ssl_loss == 'best_rq'
      else nnx.Linear(stack, _PROJECTION_SIZE, rngs=rngs)
    )

  def __call__(
    self, encoded: chex.Array, stack: chex.Array
  ) -> tuple[chex.Array, chex.Array | None]:
    """Returns predictions, and targets unless they are fixed."""
    targets = None if self.target is None else self.target(stack)
    return self.predict(encoded), targets


def predictor(ssl: Ssl, *, width: int, stack: int) -> harness.Network:
  """Makes the head of a self-supervised loss as pure functions.

  Args:
    ssl: settings of the loss.
    width: width of encoded frames.
    stack: width of stacked frames.

  Returns:
    A network of encoded and stacked frames.
  """
  if ssl.ssl_loss not in KINDS:
    known = ', '.join(KINDS)
    raise harness.SettingsError(
      f'unknown ssl_loss {ssl.ssl_loss!r}; known: {known}.'
    )
  return encoders.flat(
    harness.pure(lambda rngs: Predictor(ssl, width, stack, rngs))
  )


def quantiser(ssl: Ssl, key: chex.PRNGKey, stack: int) -> dict[str, chex.Array]:
  """Draws a random projection and random codes, which are not trained.

  Source: Chiu and others, Self-supervised Learning with Random-projection
  Quantizer for Speech Recognition, 2022.
  """
  one, two = jax.random.split(key)
  return {
    'projection': jax.random.normal(one, (stack, _CODE_SIZE)) / stack**0.5,
    'codes': _unit(jax.random.normal(two, (ssl.codebook_size, _CODE_SIZE))),
  }


def nearest_codes(
  fixed: dict[str, chex.Array], stack: chex.Array
) -> chex.Array:
  """Index of the code with the smallest angle to each stacked frame."""
  projected = _unit(stack @ fixed['projection'])
  return jnp.argmax(projected @ fixed['codes'].T, axis=-1)


def draw_mask(
  ssl: Ssl, key: chex.PRNGKey, lengths: chex.Array, size: int
) -> chex.Array:
  """Draws masked spans, at least one per utterance.

  Args:
    ssl: settings of the loss.
    key: PRNG key.
    lengths: number of encoded frames, int (batch,).
    size: number of encoded frames with padding.

  Returns:
    bool (batch, size), False beyond the lengths.
  """
  # One call: compiling several random draws takes seconds.
  uniform = jax.random.uniform(key, (len(lengths), size + 1))
  starts = uniform[:, :size] < ssl.mask_prob
  certain = jnp.floor(uniform[:, size] * lengths)
  starts = starts | (jnp.arange(size) == certain[:, None])
  mask = starts
  for shift in range(1, ssl.mask_length):
    mask = mask | jnp.pad(starts, [(0, 0), (shift, 0)])[:, :size]
  return mask & front_end.length_mask(lengths, size)


def replace_by_noise(
  key: chex.PRNGKey, features: chex.Array, mask: chex.Array, shrink: int
) -> chex.Array:
  """Replaces the input frames of masked encoded frames by noise."""
  mask = jnp.repeat(mask, shrink, axis=1)[:, : features.shape[1], None]
  noise = _MASK_NOISE * jax.random.normal(key, features.shape, features.dtype)
  return jnp.where(mask, noise, features)


def masked_codes(
  logits: chex.Array, codes: chex.Array, mask: chex.Array
) -> chex.Array:
  """Computes the cross-entropy of the codes of masked frames.

  Args:
    logits: (batch, out, codes).
    codes: int (batch, out).
    mask: bool (batch, out).

  Returns:
    A scalar, the mean over masked frames.
  """
  losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, codes)
  return _mean(losses, mask)


def info_nce(
  key: chex.PRNGKey,
  predicted: chex.Array,
  targets: chex.Array,
  mask: chex.Array,
  groups: chex.Array,
  *,
  negatives: int,
  temperature: float,
) -> chex.Array:
  r"""Computes the InfoNCE loss of predictions with random negatives.

  .. math::
    - \log \frac{e^{\cos(p_t, z_t) / \tau}}{e^{\cos(p_t, z_t) / \tau}
      + \sum_{s} e^{\cos(p_t, z_s) / \tau}}

  Args:
    key: PRNG key for the negatives.
    predicted: (frames, size).
    targets: targets of the same frames, (frames, size).
    mask: frames to average over, bool (frames,).
    groups: frames from which the negatives of each group are drawn, bool
      (groups, frames); consecutive groups have equal numbers of frames.
    negatives: number of negatives per frame, drawn with replacement, never the
      frame itself.
    temperature: divides the cosines.

  Returns:
    A scalar, the mean over masked frames; log(negatives + 1) at chance.
  """
  count, frames = groups.shape
  place = jnp.arange(frames)
  # Draws ranks within a group, since its number of frames is not static.
  sizes = jnp.sum(groups, axis=1)
  order = jnp.argsort(~groups, axis=1, stable=True)
  uniform = jax.random.uniform(key, (frames, negatives))
  group = jnp.repeat(jnp.arange(count), frames // count)
  rank = jnp.cumsum(groups, axis=1)[group, place] - 1
  others = jnp.maximum(sizes[group] - 1, 1)[:, None]
  pick = jnp.floor(uniform * others).astype(jnp.int32)
  pick = jnp.minimum(pick, others - 1)
  # Skips the frame itself.
  pick = pick + (pick >= rank[:, None])
  pick = jnp.minimum(pick, jnp.maximum(sizes[group] - 1, 0)[:, None])
  wrong = order[group[:, None], pick]
  predicted, targets = _unit(predicted), _unit(targets)
  right = jnp.sum(predicted * targets, axis=-1)
  off = jnp.einsum('fd,fnd->fn', predicted, targets[wrong])
  # In a group of one frame, the negative is the frame itself.
  off = jnp.where(wrong == place[:, None], -jnp.inf, off)
  logits = jnp.concatenate([right[:, None], off], axis=1) / temperature
  return _mean(-jax.nn.log_softmax(logits)[:, 0], mask & (sizes[group] > 1))


def loss(
  ssl: Ssl,
  predict: Callable[..., tuple[chex.Array, chex.Array | None]],
  encode: Callable[..., tuple[chex.Array, chex.Array]],
  features: chex.Array,
  lengths: chex.Array,
  key: chex.PRNGKey,
  *,
  fixed: Any,
  shrink: int,
) -> chex.Array:
  """Computes the self-supervised loss.

  Args:
    ssl: settings of the loss.
    predict: (encoded, stacked) -> predictions and targets; a `predictor`.
    encode: (features, lengths, key) -> encoded frames and lengths.
    features: normalised features, (batch, frames, numbers).
    lengths: number of valid frames, int (batch,).
    key: PRNG key.
    fixed: arrays from `quantiser`, for 'best_rq'.
    shrink: input frames per encoded frame.

  Returns:
    A scalar.
  """
  mask_key, noise_key, negatives_key, drop_key = jax.random.split(key, 4)
  stack = stacked(features, shrink)
  rows, size, _ = stack.shape
  if ssl.ssl_loss == 'cpc':
    encoded, out = encode(features, lengths, drop_key)
    return _cpc(ssl, negatives_key, *predict(encoded, stack), out)
  mask = draw_mask(ssl, mask_key, -(-lengths // shrink), size)
  noisy = replace_by_noise(noise_key, features, mask, shrink)
  encoded, _ = encode(noisy, lengths, drop_key)
  predicted, targets = predict(encoded, stack)
  if ssl.ssl_loss == 'best_rq':
    return masked_codes(predicted, nearest_codes(fixed, stack), mask)
  flat = lambda x: x.reshape(rows * size, *x.shape[2:])
  # Negatives are masked frames of the same utterance.
  groups = jnp.eye(rows, dtype=bool)[:, :, None] & mask
  return info_nce(
    negatives_key,
    flat(predicted),
    flat(targets),
    flat(mask),
    groups.reshape(rows, rows * size),
    negatives=ssl.negatives,
    temperature=_TEMPERATURE,
  )


def _cpc(ssl, key, predicted, targets, lengths):
  """Contrastive predictive coding, with negatives from the whole batch."""
  rows, size, width = targets.shape
  predicted = predicted.reshape(rows, size, ssl.prediction_steps, width)
  valid = front_end.length_mask(lengths, size)
  flat = lambda x: x.reshape(rows * size, *x.shape[2:])
  total = jnp.zeros([], predicted.dtype)
  for step in range(1, ssl.prediction_steps + 1):
    # Frame t is predicted from frame t - step.
    shift = [(0, 0), (step, 0), (0, 0)]
    shifted = jnp.pad(predicted[:, :, step - 1], shift)[:, :size]
    total += info_nce(
      jax.random.fold_in(key, step),
      flat(shifted),
      flat(targets),
      flat(valid & (jnp.arange(size) >= step)),
      flat(valid)[None],
      negatives=ssl.negatives,
      temperature=_TEMPERATURE,
    )
  return total / ssl.prediction_steps


def _unit(x):
  return x * jax.lax.rsqrt(jnp.sum(x**2, axis=-1, keepdims=True) + 1e-8)


def _mean(values, mask):
  # 0 * inf would be NaN.
  total = jnp.sum(jnp.where(mask, values, 0))
  return total / jnp.maximum(jnp.sum(mask), 1)
