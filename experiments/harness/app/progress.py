"""Progress of a run: a bar on a terminal, otherwise a line every 30 s."""

import sys
import time
from collections.abc import Mapping
from typing import Any

import tqdm

SHOWN = 3  # Metrics in a line.


def describe(record: Mapping[str, Any]) -> str:
  """Describes a record by means over seeds of its first metrics.

  What a study measures comes before losses; counts are omitted.

  Args:
    record: see `Records`; None is a number that is not finite.
  """
  names = [n for n in record if n != 'step' and not n.startswith('count/')]
  texts = []
  for name in sorted(names, key=lambda n: '/' in n):
    values = [x for x in record[name] if x is not None]
    if values:
      texts.append(f'{name} {sum(values) / len(values):.4g}')
  return ', '.join(texts[:SHOWN])


class Progress:
  """Shows the steps taken and the time left.

  Args:
    name: name of the run.
    steps: total number of steps.
    step: steps taken so far.
    every: seconds between lines if stderr is no terminal.
  """

  def __init__(self, name: str, steps: int, step: int, *, every: float = 30.0):
    self._name, self._steps, self._every = name, steps, every
    self._first, self._step = step, step
    self._start = self._printed = time.monotonic()
    self._bar = None
    if sys.stderr.isatty():
      self._bar = tqdm.tqdm(
        total=steps, initial=step, desc=name, unit='step', dynamic_ncols=True
      )

  def update(self, step: int, metrics: str = '') -> None:
    """Shows the number of steps taken and the last metrics."""
    if self._bar is not None:
      self._bar.set_postfix_str(metrics, refresh=False)
      self._bar.update(step - self._step)
    self._step = step
    now = time.monotonic()
    if self._bar is None and now - self._printed >= self._every:
      self._printed = now
      rate = (step - self._first) / (now - self._start)
      left = (self._steps - step) / rate if rate else float('nan')
      left = tqdm.tqdm.format_interval(left) if rate else '?'
      print(
        f'{self._name}: step {step}/{self._steps}, {left} left'
        + (f'; {metrics}' if metrics else ''),
        file=sys.stderr,
        flush=True,
      )

  def close(self) -> None:
    """Closes the bar."""
    if self._bar is not None:
      self._bar.close()
