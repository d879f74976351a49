"""Compile time of this process, as JAX reports it.

It includes tracing, lowering, compiling and reading the cache. Nested events
count once.
"""

import threading
import time
from typing import Any

import jax

_EVENTS = '/jax/core/compile/'


class Clock:
  """Sums the durations of JAX's events, without counting nested ones twice."""

  def __init__(self):
    self._total, self._lock = 0.0, threading.Lock()
    self._local = threading.local()

  def __call__(self, event: str, start: float, end: float, **_: Any) -> None:
    """Adds a span in seconds; in each thread, spans come in order of `end`."""
    if not event.startswith(_EVENTS):
      return
    spans = vars(self._local).setdefault('spans', [])
    added = end - start
    while spans and spans[-1][0] >= start:
      inner_start, inner_end = spans.pop()
      added -= inner_end - inner_start
    spans.append((start, end))
    with self._lock:
      self._total += max(0.0, added)

  def seconds(self) -> float:
    """Returns the total so far."""
    return self._total


_CLOCK, _START = Clock(), time.monotonic()
jax.monitoring.register_event_time_span_listener(_CLOCK)


def seconds() -> float:
  """Returns the seconds this process has spent compiling."""
  return _CLOCK.seconds()


def split() -> dict[str, float]:
  """Splits the age of this process into `compile_seconds` and `run_seconds`."""
  compiling = seconds()
  running = time.monotonic() - _START - compiling
  return {
    'compile_seconds': round(compiling, 3),
    'run_seconds': round(max(0.0, running), 3),
  }
