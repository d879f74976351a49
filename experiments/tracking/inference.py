"""The networks of `network` in numpy, for the few pairs of a frame.

The weights are combined once, so that a frame takes few products: inputs side
by side, several networks in one array, and logistic gates as
(tanh(z / 2) + 1) / 2 with halved weights. The memory of a tracklet is h, c and
the two terms of the score that depend on h only.
"""

import contextlib
import functools
import threading
from typing import Any

import numpy as np
import threadpoolctl

from experiments.tracking import motion, network

_CONFIDENCE = 10  # Column of the confidence in the features.
# Gates: entering, forgetting, showing, then the new cell.
_ORDER = (0, 1, 3, 2)


class Networks:
  """Several networks, whose mean score counts.

  Memories are (tracklets, networks, 4, hidden), embedded features x are
  (pairs, networks, hidden).

  Args:
    weights: of one network, or of several with a leading axis.
    noise: of the filter.
  """

  def __init__(self, weights: network.Weights, noise: motion.Noise):
    w = {name: np.asarray(x) for name, x in weights.items()}
    if w['embed'].ndim == 2:
      w = {name: x[None] for name, x in w.items()}
    self._count, inputs, self._hidden = w['embed'].shape
    first = np.stack([w['embed'], w['from_features']], axis=2)
    self._first = first.swapaxes(0, 1).reshape(inputs, -1)
    self._embed_bias = w['embed_bias']
    second = [w['from_embedding'], w['from_difference']]
    self._second = np.concatenate(second, axis=1)
    self._last = w['last'].reshape(-1) / self._count
    self._last_bias = w['last_bias'].mean()
    self._terms = np.concatenate([w['expect'], w['from_state']], axis=2)
    self._terms_bias = np.stack([w['expect_bias'], w['hidden_bias']], axis=1)
    gates = np.concatenate([w['input'], w['state']], axis=1)
    self._gates = self._arrange(gates)
    self._gate_bias = self._arrange(w['gate_bias'])
    # A first detection is scored with itself: only some columns vary.
    none = np.zeros((1, max(inputs - motion.FEATURES - 1, 0)), np.float32)
    base = motion.first_features(np.zeros(1, np.float32), none, noise)
    self._base = (base @ w['embed'])[:, 0] + w['embed_bias']
    varying = [_CONFIDENCE, *range(motion.FEATURES, inputs)]
    varying = w['embed'][:, varying].swapaxes(0, 1)
    self._varying = varying.reshape(len(varying), -1)

  def _arrange(self, gates):
    """Puts the logistic gates first, with inputs that are halved."""
    shape = *gates.shape[:-1], 4, self._hidden
    scale = np.array([[0.5], [0.5], [0.5], [1]], gates.dtype)
    return (gates.reshape(shape)[..., _ORDER, :] * scale).reshape(gates.shape)

  def begin(
    self, confidence: np.ndarray, embedding: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns empty memories, and x of the first detections.

    Args:
      confidence: (tracklets,).
      embedding: (tracklets, embedding_size).
    """
    inputs = confidence[:, None]
    if embedding.shape[1]:
      square = np.sum(embedding**2, -1, keepdims=True)
      cosine = square / np.sqrt(square + 1e-6)
      inputs = np.concatenate([inputs, cosine, embedding], axis=1)
    shape = len(confidence), self._count, self._hidden
    x = (inputs @ self._varying).reshape(shape)
    x += self._base
    empty = np.zeros((*shape[:2], 4, shape[2]), x.dtype)
    return empty, np.maximum(x, 0, out=x)

  def score(
    self, memory: np.ndarray, track: np.ndarray, features: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Scores pairs of a tracklet and a detection.

    Args:
      memory: of all tracklets.
      track: tracklet of each pair, int (pairs,).
      features: (pairs, features).

    Returns:
      The mean scores, (pairs,), and x.
    """
    shape = len(track), self._count, 2, self._hidden
    first = (features @ self._first).reshape(shape)
    terms = memory[:, :, 2:].take(track, axis=0)
    both = np.empty(shape, first.dtype)  # x, and its distance to the expected.
    x, distance = both[:, :, 0], both[:, :, 1]
    np.add(first[:, :, 0], self._embed_bias, out=x)
    np.maximum(x, 0, out=x)
    np.subtract(terms[:, :, 0], x, out=distance)
    np.abs(distance, out=distance)
    hidden = self._product(both, self._second)
    hidden += first[:, :, 1]
    hidden += terms[:, :, 1]
    np.maximum(hidden, 0, out=hidden)
    scores = hidden.reshape(len(track), len(self._last)) @ self._last
    scores += self._last_bias
    return scores, x

  def remember(self, memory: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Advances memories by detections."""
    count, shape = len(x), (len(x), self._count, 4, self._hidden)
    both = np.empty((count, self._count, 2, self._hidden), x.dtype)
    both[:, :, 0], both[:, :, 1] = x, memory[:, :, 0]
    gates = self._product(both, self._gates)
    gates += self._gate_bias
    gates = np.tanh(gates, out=gates).reshape(shape)
    logistic = gates[:, :, :3]
    logistic *= 0.5
    logistic += 0.5
    after = np.empty(shape, x.dtype)
    state, cell = after[:, :, 0], after[:, :, 1]
    np.multiply(gates[:, :, 1], memory[:, :, 1], out=cell)
    cell += gates[:, :, 0] * gates[:, :, 3]
    np.multiply(gates[:, :, 2], np.tanh(cell), out=state)
    terms = self._product(state, self._terms)
    np.add(terms.reshape(both.shape), self._terms_bias, out=after[:, :, 2:])
    return after

  def _product(self, inputs, matrices):
    """A product for each network: (rows, networks, ...) by its matrix."""
    rows, count = inputs.shape[:2]
    outputs = np.empty((rows, count, matrices.shape[2]), inputs.dtype)
    inputs = inputs.reshape(rows, count, matrices.shape[1])
    if rows < 4:
      # Vector by matrix, since products of matrices copy the second one first.
      np.matmul(inputs[:, :, None], matrices, out=outputs[:, :, None])
    else:
      np.matmul(inputs.swapaxes(0, 1), matrices, out=outputs.swapaxes(0, 1))
    return outputs


@functools.cache
def _libraries() -> list[Any]:
  controllers = threadpoolctl.ThreadpoolController().lib_controllers
  return [one for one in controllers if one.user_api == 'blas']


class OneThread(contextlib.ContextDecorator):
  """A context, or a decorator, in which products use one thread.

  More threads do not shorten the small products of a frame, and wait busily
  after them. The number is one of the process, so contexts are counted.
  """

  _lock, _entered, _before = threading.Lock(), 0, ()

  def __enter__(self) -> None:
    with OneThread._lock:
      OneThread._entered += 1
      if OneThread._entered == 1:
        OneThread._before = [one.num_threads for one in _libraries()]
        self._set([1] * len(OneThread._before))

  def __exit__(self, *error: object) -> None:
    with OneThread._lock:
      OneThread._entered -= 1
      if not OneThread._entered:
        self._set(OneThread._before)

  @staticmethod
  def _set(counts):
    for one, count in zip(_libraries(), counts):
      one.set_num_threads(count)
