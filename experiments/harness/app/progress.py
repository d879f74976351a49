"""How far a run is: a bar on a terminal, else a line now and then."""

import sys
import time

import tqdm


class Progress:
  """Shows steps taken and time left.

  Args:
    name: what runs.
    steps: steps in all.
    step: steps taken already.
    every: seconds between lines where stderr is no terminal.
  """

  def __init__(self, name: str, steps: int, step: int, *, every: float = 30.0):
    self._name, self._steps, self._every = name, steps, every
    self._from, self._step = step, step
    self._start = self._last = time.monotonic()
    self._bar = None
    if sys.stderr.isatty():
      self._bar = tqdm.tqdm(
        total=steps, initial=step, desc=name, unit='step', dynamic_ncols=True
      )

  def update(self, step: int) -> None:
    """Shows that so many steps are taken."""
    if self._bar is not None:
      self._bar.update(step - self._step)
    self._step = step
    now = time.monotonic()
    if self._bar is None and now - self._last >= self._every:
      self._last = now
      rate = (step - self._from) / (now - self._start)
      left = (self._steps - step) / rate if rate else float('nan')
      left = tqdm.tqdm.format_interval(left) if rate else '?'
      print(
        f'{self._name}: step {step}/{self._steps}, {left} left',
        file=sys.stderr,
        flush=True,
      )

  def close(self) -> None:
    """Ends the bar."""
    if self._bar is not None:
      self._bar.close()
