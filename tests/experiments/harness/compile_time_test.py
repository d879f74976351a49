"""Seconds spent compiling: each one counts once."""

import threading

from experiments.harness.app import compile_time

EVENT = '/jax/core/compile/jaxpr_trace_duration'


def test_nested_spans_count_once():
  clock = compile_time.Clock()
  clock(EVENT, 1.0, 2.0)
  assert clock.seconds() == 1.0
  # While one is traced, two others are compiled, one of them within the other.
  clock(EVENT, 5.5, 6.0)
  clock(EVENT, 5.0, 7.0)
  clock(EVENT, 8.0, 8.25)
  clock(EVENT, 4.0, 10.0)
  assert clock.seconds() == 7.0
  clock('/jax/checkpoint/write', 11.0, 12.0)
  assert clock.seconds() == 7.0


def test_threads_compile_side_by_side():
  clock = compile_time.Clock()
  clock(EVENT, 1.0, 2.0)
  other = threading.Thread(target=clock, args=(EVENT, 0.0, 3.0))
  other.start()
  other.join()
  assert clock.seconds() == 4.0
