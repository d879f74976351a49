r"""Motion of one tracklet: a Kalman filter of constant velocity, and features.

Each of centre x, y, log width and log height has a position and a velocity,
moved by white acceleration, and is measured with normal noise. Over a gap of d
frames

    P <- F P F^T + a^2 [[d^3/3, d^2/2], [d^2/2, d]],  F = [[1, d], [0, 1]],

and a measurement z of variance R updates by the gain P_11, P_12 over
P_11 + R. Deviations of x and y are in units of the width and of the height.

All functions take numpy arrays or jax ones, and work on any leading axes: the
tracker's few boxes are quicker in numpy, training is compiled.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

FEATURES = 15
_LONG = 12  # Detections, of which more make no difference.


class Noise(NamedTuple):
  """Deviations that a filter assumes; by maximum likelihood in `fit`.

  Attributes:
    measured: of x, y in sizes, and of log width and height.
    position: of the acceleration of x and y, sizes a frame^1.5.
    size: of that of log width and height, likewise.
    speed: of the first velocity of x and y, sizes a frame.
    growth: of that of the logarithms.
  """

  measured: float = 0.041
  position: float = 0.019
  size: float = 0.0055
  speed: float = 0.077
  growth: float = 0.005


NOISE = Noise()


class Motion(NamedTuple):
  """What is known of where a tracklet is; leading axes are free.

  Attributes:
    mean: positions and velocities of the four, (..., 4, 2).
    variance: P_11, P_12, P_22 of the four, (..., 4, 3).
    place: what was measured last, (..., 4).
    gap: frames since then, (...).
    seen: measurements so far, (...).
    look: the sum of the looks so far, (..., numbers).
  """

  mean: Any
  variance: Any
  place: Any
  gap: Any
  seen: Any
  look: Any


def namespace(x: Any) -> Any:
  """The module whose functions go with an array: numpy or `jax.numpy`."""
  return np if isinstance(x, np.ndarray) else jnp


def _columns(*given):
  """Arrays of one shape as columns of a last axis."""
  if not isinstance(given[0], np.ndarray):
    return jnp.stack(given, axis=-1)
  # For some boxes, numpy's stack takes longer than what is stacked.
  out = np.empty((*given[0].shape, len(given)), np.result_type(*given))
  for i, x in enumerate(given):
    out[..., i] = x
  return out


def _sizes(places):
  """Width and height; far from what boxes are, no further."""
  xp = namespace(places)  # Its clip is slow for some boxes.
  return xp.exp(xp.minimum(xp.maximum(places[..., 2:], -3), 12))


def units(places: Any) -> Any:
  """Width, height, 1, 1: the units of deviations."""
  xp = namespace(places)
  size = _sizes(places)
  return xp.concatenate([size, xp.ones_like(size)], axis=-1)


def _deviations(noise, position, size, like):
  return namespace(like).asarray((position, position, size, size), like.dtype)


def begin(places: Any, looks: Any, noise: Noise) -> Motion:
  """Tracklets of one measurement.

  Args:
    places: of `detections.places_of`, (..., 4).
    looks: (..., numbers); none of them for motion alone.
    noise: of the filter.

  Returns:
    `Motion` with gaps of 0.
  """
  xp = namespace(places)
  scale = units(places)
  at_first = _deviations(noise, noise.speed, noise.growth, places) * scale
  measured = (noise.measured * scale) ** 2
  return Motion(
    mean=_columns(places, xp.zeros_like(places)),
    variance=_columns(measured, xp.zeros_like(measured), at_first**2),
    place=places,
    gap=xp.zeros_like(places[..., 0]),
    seen=xp.ones_like(places[..., 0]),
    look=looks,
  )


def predict(motion: Motion, frames: Any, noise: Noise) -> Motion:
  """Moves tracklets on by a number of frames.

  Args:
    motion: before.
    frames: how many, (...) or one for all.
    noise: of the filter.

  Returns:
    `Motion` then; the gap is longer by so much.
  """
  xp = namespace(motion.mean)
  d = xp.asarray(frames, motion.mean.dtype)[..., None]
  position, speed = motion.mean[..., 0], motion.mean[..., 1]
  one, both, two = (motion.variance[..., i] for i in range(3))
  drift = _deviations(noise, noise.position, noise.size, position)
  drift = (drift * units(position)) ** 2
  return motion._replace(
    mean=_columns(position + d * speed, speed + 0 * d),
    variance=_columns(
      one + 2 * d * both + d * d * two + drift * d**3 / 3,
      both + d * two + drift * d * d / 2,
      two + drift * d,
    ),
    gap=motion.gap + d[..., 0],
  )


def update(motion: Motion, places: Any, looks: Any, noise: Noise) -> Motion:
  """Takes a measurement of each tracklet.

  Args:
    motion: predicted for its frame.
    places: measured, (..., 4).
    looks: likewise, (..., numbers).
    noise: of the filter.

  Returns:
    `Motion` with gaps of 0.
  """
  xp = namespace(places)
  one, both, two = (motion.variance[..., i] for i in range(3))
  measured = (noise.measured * units(motion.mean[..., 0])) ** 2
  total = one + measured
  off = places - motion.mean[..., 0]
  gains = one / total, both / total
  # Not one less a part of it: after a long gap that leaves no digits.
  left = measured / total
  return Motion(
    mean=motion.mean + _columns(*(g * off for g in gains)),
    variance=_columns(left * one, left * both, two - gains[1] * both),
    place=places,
    gap=xp.zeros_like(motion.gap),
    seen=motion.seen + 1,
    look=motion.look + looks,
  )


def innovations(motion: Motion, places: Any, noise: Noise) -> tuple[Any, Any]:
  """How far measurements are from predictions, by expected deviations.

  Args:
    motion: predicted, leading axes (...).
    places: candidates of each, (..., candidates, 4).
    noise: of the filter.

  Returns:
    Innovations over their deviations, (..., candidates, 4), and those
    deviations in sizes, (..., 4).
  """
  xp = namespace(places)
  middle = motion.mean[..., 0]
  scale = units(middle)
  deviation = xp.sqrt(motion.variance[..., 0] + (noise.measured * scale) ** 2)
  off = (places - middle[..., None, :]) / deviation[..., None, :]
  return off, deviation / scale


def distance(motion: Motion, places: Any, noise: Noise) -> Any:
  """Squared innovations of the four, summed, (..., candidates)."""
  return namespace(places).sum(innovations(motion, places, noise)[0] ** 2, -1)


def overlap(one: Any, two: Any) -> Any:
  """Intersection over union of places (..., 4), by broadcasting."""
  xp = namespace(one)
  sizes = [_sizes(p) for p in (one, two)]
  halves = [0.5 * size for size in sizes]
  centres = [p[..., :2] for p in (one, two)]
  low = xp.maximum(*(c - h for c, h in zip(centres, halves)))
  high = xp.minimum(*(c + h for c, h in zip(centres, halves)))
  sides = xp.maximum(high - low, 0)
  common = sides[..., 0] * sides[..., 1]
  areas = [s[..., 0] * s[..., 1] for s in sizes]
  return common / (areas[0] + areas[1] - common)


def features(
  motion: Motion, places: Any, sure: Any, looks: Any, noise: Noise
) -> Any:
  """What the network sees of candidates of tracklets.

  Args:
    motion: predicted, leading axes (...).
    places: (..., candidates, 4).
    sure: confidences, (..., candidates).
    looks: (..., candidates, numbers).
    noise: of the filter.

  Returns:
    (..., candidates, `FEATURES`), with looks one more, the cosine with the sum
    of the looks so far, and the look itself.
  """
  off, deviation = innovations(motion, places, noise)
  near = overlap(motion.mean[..., 0][..., None, :], places)
  last = (motion.place[..., None, :], units(motion.place)[..., None, :])
  rows = of_rows(motion, deviation)[..., None, :]
  look = motion.look[..., None, :]
  return of_pairs(rows, off, last, near, places, sure, look, looks)


def of_rows(motion: Motion, deviation: Any) -> Any:
  """What features say of tracklets alone, (..., 4); see `features`."""
  xp = namespace(deviation)
  # A tracklet may be longer than any window.
  known = xp.minimum(motion.seen, _LONG)
  times = _columns(motion.gap, known)
  return xp.concatenate(
    [xp.log(deviation[..., 1:3]), xp.log(1 + times)], axis=-1
  )


def of_pairs(
  rows: Any,
  off: Any,
  last: tuple[Any, Any],
  near: Any,
  places: Any,
  sure: Any,
  look: Any,
  looks: Any,
) -> Any:
  """Features of pairs of a tracklet and a detection; leading axes broadcast.

  Args:
    rows: of `of_rows`.
    off: of `innovations`.
    last: where tracklets were measured last, and its units, of `units`.
    near: overlap with the prediction.
    places: of the detections.
    sure: their confidences.
    look: sums of the tracklets' looks.
    looks: of the detections.

  Returns:
    (..., `FEATURES`), with looks more; see `features`.
  """
  xp = namespace(off)
  moves = xp.concatenate([off, 8 * (places - last[0]) / last[1]], axis=-1)
  far = xp.sum(off * off, axis=-1)
  columns = [
    xp.arcsinh(moves),
    _columns(0.1 * xp.minimum(far, 100), near, sure),
    rows if rows.shape[:-1] == sure.shape else _wide(rows, sure.shape),
  ]
  if looks.shape[-1]:
    norm = xp.sqrt(xp.sum(look**2, -1, keepdims=True) + 1e-6)
    cosine = xp.sum(looks * (look / norm), -1, keepdims=True)
    columns += [cosine, looks]
  return xp.concatenate(columns, axis=-1)


def _wide(rows, shape):
  return namespace(rows).broadcast_to(rows, shape + rows.shape[-1:])


def at_first(sure: Any, looks: Any, noise: Noise) -> Any:
  """Features of a tracklet's first detection, as of itself.

  Args:
    sure: confidences, (...).
    looks: (..., numbers).
    noise: of the filter; plain numbers, also where this is compiled.

  Returns:
    (..., `FEATURES`), with looks more; see `features`.
  """
  xp = namespace(sure)
  none = xp.zeros_like(sure)
  deviation = float(np.log(np.sqrt(2) * noise.measured))
  known = [none + deviation] * 2 + [none, none + float(np.log(2))]
  columns = [_columns(*[none] * 9, none + 1, sure, *known)]
  if looks.shape[-1]:
    square = xp.sum(looks**2, -1, keepdims=True)
    columns += [square / xp.sqrt(square + 1e-6), looks]
  return xp.concatenate(columns, axis=-1)


def choose(one: Motion, two: Motion, which: Any) -> Motion:
  """The first where `which`, (...), else the second."""
  xp = namespace(one.mean)

  def pick(a, b):
    return xp.where(
      which.reshape(which.shape + (1,) * (a.ndim - which.ndim)), a, b
    )

  return Motion(*(pick(a, b) for a, b in zip(one, two)))


def log_likelihood(
  places: np.ndarray, gaps: np.ndarray, noise: Noise
) -> np.ndarray:
  """Log-likelihood of measured trajectories, without constants.

  Args:
    places: (trajectories, steps, 4).
    gaps: frames since the step before, (trajectories, steps); 0 behind the
      end.
    noise: of the filter.

  Returns:
    A sum over the steps of each trajectory, (trajectories,).
  """
  none = np.zeros((len(places), 0), places.dtype)
  motion, total = begin(places[:, 0], none, noise), np.zeros(len(places))
  for step in range(1, places.shape[1]):
    there = gaps[:, step] > 0
    moved = predict(motion, gaps[:, step], noise)
    off, deviation = innovations(moved, places[:, step, None], noise)
    found = -0.5 * np.sum(off[:, 0] ** 2, -1) - np.sum(np.log(deviation), -1)
    total += np.where(there, found, 0)
    after = update(moved, places[:, step], none, noise)
    motion = choose(after, motion, there)
  return total


def fit(places: np.ndarray, gaps: np.ndarray, start: Noise = NOISE) -> Noise:
  """Noise by maximum likelihood: a coordinate at a time, in shrinking steps.

  They end below a tenth of a value: trackers do not tell what is finer.

  Args:
    places: see `log_likelihood`.
    gaps: likewise.
    start: where the search begins.

  Returns:
    `Noise`.
  """
  best = np.log(np.array(start))
  value = lambda x: float(
    log_likelihood(places, gaps, Noise(*map(float, np.exp(x)))).sum()
  )
  reached, step = value(best), 0.7
  while step > 0.05:
    before = reached
    for i in range(len(best)):
      for sign in (1, -1):
        tried = best.copy()
        tried[i] += sign * step
        if (found := value(tried)) > reached:
          best, reached = tried, found
          break
    if reached <= before:
      step /= 2
  return Noise(*(float(f'{x:.3g}') for x in np.exp(best)))
