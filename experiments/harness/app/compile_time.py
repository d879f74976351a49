"""Seconds that this process has spent compiling, as JAX measures them.

Tracing, lowering, compiling and reading from the cache all count; a program
that is compiled while another one is traced counts once.
"""

import threading
import time
from typing import Any

import jax

_EVENTS = '/jax/core/compile/'


class Clock:
  """Adds up the time spans of JAX's events, nested ones once."""

  def __init__(self):
    self._total, self._lock = 0.0, threading.Lock()
    self._local = threading.local()

  def __call__(self, event: str, start: float, end: float, **_: Any) -> None:
    """Takes one span, s; of a thread, in the order of their ends."""
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
    """The total so far."""
    return self._total


_CLOCK, _BEGINNING = Clock(), time.monotonic()
jax.monitoring.register_event_time_span_listener(_CLOCK)


def seconds() -> float:
  """Seconds spent compiling so far."""
  return _CLOCK.seconds()


def split() -> dict[str, float]:
  """Seconds of this process so far: `compile_seconds`, and `run_seconds`."""
  compiling = seconds()
  running = time.monotonic() - _BEGINNING - compiling
  return {
    'compile_seconds': round(compiling, 3),
    'run_seconds': round(max(0.0, running), 3),
  }
