"""Losses: of transcripts, and of audio alone.

Encoded frames are (batch, out, width) with lengths. A frame's target is made of
the input frames that it stands for, `stacked`: a learnt encoder of targets
could make them constant. Losses are means over frames, or over labels, so that
their size does not depend on a batch's padding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments import harness
from experiments.speech import encoders, front_end

KINDS = ('cpc', 'contrastive', 'best_rq')


def ctc(
  logits: chex.Array,
  lengths: chex.Array,
  labels: chex.Array,
  label_lengths: chex.Array,
) -> chex.Array:
  r"""Connectionist temporal classification, a label.

  .. math::
    - \frac{1}{|B|} \sum_{i \in B} \frac{1}{L_i} \log p(l_i \mid x_i)

  Args:
    logits: (batch, out, units), unit 0 the blank.
    lengths: frames of each, int (batch,); enough for its labels.
    labels: int (batch, most labels).
    label_lengths: of each, int (batch,).

  Returns:
    A scalar.
  """
  padding = lambda n, size: 1.0 - front_end.mask_of(n, size)
  each = optax.ctc_loss(
    logits,
    padding(lengths, logits.shape[1]).astype(logits.dtype),
    labels,
    padding(label_lengths, labels.shape[1]).astype(logits.dtype),
  )
  return jnp.mean(each / jnp.maximum(label_lengths, 1))


def stacked(features: chex.Array, shrink: int) -> chex.Array:
  """The input frames of each encoded one, side by side.

  Args:
    features: (batch, frames, numbers).
    shrink: input frames of an encoded one.

  Returns:
    (batch, ceil(frames / shrink), shrink * numbers), filled up with zeros.
  """
  rows, size, numbers = features.shape
  out = -(-size // shrink)
  padding = [(0, 0), (0, out * shrink - size), (0, 0)]
  return jnp.pad(features, padding).reshape(rows, out, shrink * numbers)


class Task(NamedTuple):
  """A loss of audio alone, and its sizes.

  Attributes:
    kind: one of `KINDS`.
    probability: that a span of hidden frames begins at an encoded frame.
    span: encoded frames of a span.
    negatives: frames among which the right one is to be told.
    temperature: by which cosines are divided.
    ahead: encoded frames that are predicted.
    codes: of the random quantiser.
    noise: deviation of what stands for hidden frames.
    size: of projections.
  """

  kind: str = 'best_rq'
  probability: float = 0.15
  span: int = 3
  negatives: int = 20
  temperature: float = 0.1
  ahead: int = 3
  codes: int = 256
  noise: float = 0.1
  size: int = 64

  @property
  def causal(self) -> bool:
    """Whether the encoder has to be: else it would see what it predicts."""
    return self.kind == 'cpc'


class Predictor(nnx.Module):
  """The head that only a loss of audio has."""

  def __init__(self, task: Task, width: int, stack: int, rngs: nnx.Rngs):
    """Initial weights, for encoded frames of `width` and stacked ones."""
    count = {'cpc': task.ahead * task.size, 'best_rq': task.codes}
    self.predict = nnx.Linear(width, count.get(task.kind, task.size), rngs=rngs)
    self.target = (
      None
      if task.kind == 'best_rq'
      else nnx.Linear(stack, task.size, rngs=rngs)
    )

  def __call__(
    self, encoded: chex.Array, stack: chex.Array
  ) -> tuple[chex.Array, chex.Array | None]:
    """What is predicted, and the targets unless they are fixed."""
    targets = None if self.target is None else self.target(stack)
    return self.predict(encoded), targets


def predictor(task: Task, *, width: int, stack: int) -> harness.Network:
  """The head as pure functions.

  Args:
    task: the loss.
    width: of encoded frames.
    stack: numbers of a stacked frame.

  Returns:
    A network of encoded and stacked frames.
  """
  if task.kind not in KINDS:
    known = ', '.join(KINDS)
    raise harness.SettingsError(
      f'unknown loss of audio {task.kind!r}; known: {known}.'
    )
  return encoders.flat(
    harness.pure(lambda rngs: Predictor(task, width, stack, rngs))
  )


def quantiser(
  task: Task, key: chex.PRNGKey, stack: int
) -> dict[str, chex.Array]:
  """A random projection and random codes, which are not trained.

  Source: Chiu and others, Self-supervised Learning with Random-projection
  Quantizer for Speech Recognition, 2022.
  """
  one, two = jax.random.split(key)
  dims = 16
  return {
    'projection': jax.random.normal(one, (stack, dims)) / stack**0.5,
    'codes': _unit(jax.random.normal(two, (task.codes, dims))),
  }


def codes_of(fixed: dict[str, chex.Array], stack: chex.Array) -> chex.Array:
  """The nearest code of each stacked frame, by the angle; int."""
  projected = _unit(stack @ fixed['projection'])
  return jnp.argmax(projected @ fixed['codes'].T, axis=-1)


def hidden_frames(
  task: Task, key: chex.PRNGKey, lengths: chex.Array, size: int
) -> chex.Array:
  """Which encoded frames are hidden; at least one span of each utterance.

  Args:
    task: with probability and span.
    key: PRNG key.
    lengths: encoded frames, int (batch,).
    size: that a batch is padded to.

  Returns:
    bool (batch, size), False beyond the lengths.
  """
  # In one draw: to compile several takes seconds.
  drawn = jax.random.uniform(key, (len(lengths), size + 1))
  begins = drawn[:, :size] < task.probability
  sure = jnp.floor(drawn[:, size] * lengths)
  begins = begins | (jnp.arange(size) == sure[:, None])
  inside = begins
  for shift in range(1, task.span):
    inside = inside | jnp.pad(begins, [(0, 0), (shift, 0)])[:, :size]
  return inside & front_end.mask_of(lengths, size)


def blurred(
  task: Task,
  key: chex.PRNGKey,
  features: chex.Array,
  hidden: chex.Array,
  shrink: int,
) -> chex.Array:
  """Features with noise in place of the hidden frames."""
  cover = jnp.repeat(hidden, shrink, axis=1)[:, : features.shape[1], None]
  noise = task.noise * jax.random.normal(key, features.shape, features.dtype)
  return jnp.where(cover, noise, features)


def masked_codes(
  logits: chex.Array, codes: chex.Array, hidden: chex.Array
) -> chex.Array:
  """Cross-entropy of the codes of hidden frames.

  Args:
    logits: (batch, out, codes).
    codes: int (batch, out).
    hidden: bool (batch, out).

  Returns:
    A scalar, the mean over hidden frames.
  """
  each = optax.losses.softmax_cross_entropy_with_integer_labels(logits, codes)
  return _mean(each, hidden)


def contrast(
  key: chex.PRNGKey,
  predicted: chex.Array,
  targets: chex.Array,
  asked: chex.Array,
  among: chex.Array,
  *,
  negatives: int,
  temperature: float,
) -> chex.Array:
  r"""Which target is right, among random others: InfoNCE.

  .. math::
    - \log \frac{e^{\cos(p_t, z_t) / \tau}}{e^{\cos(p_t, z_t) / \tau}
      + \sum_{s} e^{\cos(p_t, z_s) / \tau}}

  Args:
    key: PRNG key, of the others.
    predicted: (frames, size).
    targets: of the same frames, (frames, size).
    asked: which frames count, bool (frames,).
    among: for each group that others are drawn from, its frames, bool
      (groups, frames); frames are in equal parts of consecutive groups.
    negatives: others of a frame, drawn with replacement, never itself.
    temperature: of the cosines.

  Returns:
    A scalar, the mean over asked frames; log(negatives + 1) for a coin.
  """
  groups, frames = among.shape
  size = frames // groups
  place = jnp.arange(frames)
  # A random frame of the group: the count of its frames is not static.
  count = jnp.sum(among, axis=1)
  order = jnp.argsort(~among, axis=1, stable=True)
  drawn = jax.random.uniform(key, (frames, negatives))
  own = jnp.repeat(jnp.arange(groups), size)
  rank = jnp.cumsum(among, axis=1)[own, place] - 1
  others = jnp.maximum(count[own] - 1, 1)[:, None]
  pick = jnp.floor(drawn * others).astype(jnp.int32)
  pick = jnp.minimum(pick, others - 1)
  # What comes after the frame itself moves up by one.
  pick = pick + (pick >= rank[:, None])
  pick = jnp.minimum(pick, jnp.maximum(count[own] - 1, 0)[:, None])
  wrong = order[own[:, None], pick]
  predicted, targets = _unit(predicted), _unit(targets)
  right = jnp.sum(predicted * targets, axis=-1)
  off = jnp.einsum('fd,fnd->fn', predicted, targets[wrong])
  # A group of one frame has no other.
  off = jnp.where(wrong == place[:, None], -jnp.inf, off)
  logits = jnp.concatenate([right[:, None], off], axis=1) / temperature
  # Where there is no other, nothing is asked.
  return _mean(-jax.nn.log_softmax(logits)[:, 0], asked & (count[own] > 1))


def loss(
  task: Task,
  predict: Callable[..., tuple[chex.Array, chex.Array | None]],
  encode: Callable[..., tuple[chex.Array, chex.Array]],
  features: chex.Array,
  lengths: chex.Array,
  key: chex.PRNGKey,
  *,
  fixed: Any,
  shrink: int,
) -> chex.Array:
  """A loss of audio alone.

  Args:
    task: the loss.
    predict: (encoded, stacked) -> predictions and targets; a `predictor`.
    encode: (features, lengths, key) -> encoded frames and lengths.
    features: normalised, (batch, frames, numbers).
    lengths: frames of each, int (batch,).
    key: PRNG key.
    fixed: of `quantiser`, for 'best_rq'.
    shrink: input frames of an encoded one.

  Returns:
    A scalar.
  """
  hide, blur, draw, drop = jax.random.split(key, 4)
  stack = stacked(features, shrink)
  rows, size, _ = stack.shape
  if task.kind == 'cpc':
    encoded, out = encode(features, lengths, drop)
    return _predictive(task, draw, *predict(encoded, stack), out)
  out = -(-lengths // shrink)
  hidden = hidden_frames(task, hide, out, size)
  seen = blurred(task, blur, features, hidden, shrink)
  encoded, _ = encode(seen, lengths, drop)
  predicted, targets = predict(encoded, stack)
  if task.kind == 'best_rq':
    return masked_codes(predicted, codes_of(fixed, stack), hidden)
  flat = lambda x: x.reshape(rows * size, *x.shape[2:])
  # Others are hidden frames of the same utterance.
  own = jnp.eye(rows, dtype=bool)[:, :, None] & hidden
  return contrast(
    draw,
    flat(predicted),
    flat(targets),
    flat(hidden),
    own.reshape(rows, rows * size),
    negatives=task.negatives,
    temperature=task.temperature,
  )


def _predictive(task, key, predicted, targets, lengths):
  """Contrastive predictive coding: others are any frames of the batch."""
  rows, size, _ = targets.shape
  predicted = predicted.reshape(rows, size, task.ahead, task.size)
  there = front_end.mask_of(lengths, size)
  flat = lambda x: x.reshape(rows * size, *x.shape[2:])
  total = jnp.zeros([], predicted.dtype)
  for step in range(1, task.ahead + 1):
    # Frame t is predicted from frame t - step.
    late = [(0, 0), (step, 0), (0, 0)]
    guess = jnp.pad(predicted[:, :, step - 1], late)[:, :size]
    asked = there & (jnp.arange(size) >= step)
    total += contrast(
      jax.random.fold_in(key, step),
      flat(guess),
      flat(targets),
      flat(asked),
      flat(there)[None],
      negatives=task.negatives,
      temperature=task.temperature,
    )
  return total / task.ahead


def _unit(x):
  return x * jax.lax.rsqrt(jnp.sum(x**2, axis=-1, keepdims=True) + 1e-8)


def _mean(each, mask):
  # 0 * inf would be NaN.
  total = jnp.sum(jnp.where(mask, each, 0))
  return total / jnp.maximum(jnp.sum(mask), 1)
