"""Runs that Python steps: their folder, records and checkpoints.

They go on after a kill from what was saved, not bit for bit: episodes that were
under way begin anew.
"""

import contextlib
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from experiments import harness
from experiments.harness.app import termination
from experiments.harness.store import checkpoints, files


class Session:
  """An opened run; see `opened`.

  Attributes:
    terminated: tells whether there was a SIGTERM, after which a run ends.
    restored: the newest checkpoint, or None.
    records: of metrics.
    saved_step: the step of the newest checkpoint; 0 without one.
  """

  def __init__(
    self,
    terminated: Callable[[], bool],
    saved: checkpoints.Checkpoints,
    restored: harness.Restored | None,
    records: harness.MetricsWriter,
    save_seconds: float,
  ):
    """Keeps what is opened."""
    self.terminated, self.records = terminated, records
    self.restored = restored
    self.saved_step = 0 if restored is None else restored.step
    self._saved, self._save_seconds = saved, save_seconds
    self._saved_at = time.monotonic()

  def due(self) -> bool:
    """Whether it is time for a checkpoint."""
    return time.monotonic() - self._saved_at >= self._save_seconds

  def save(self, step: int, tree: Any, extra: dict[str, Any]) -> None:
    """Saves a checkpoint, and waits until it is written."""
    if step != self.saved_step:
      self._saved.save(step, tree, extra)
      self._saved.wait()
    self._saved_at, self.saved_step = time.monotonic(), step


@contextlib.contextmanager
def opened(
  folder: files.Path,
  settings: Mapping[str, Any],
  like: Any,
  save_seconds: float,
) -> Iterator[Session]:
  """Opens the folder of a run, and reads its newest checkpoint.

  Args:
    folder: of the run; locked while it is open.
    settings: a run with others in the same folder is refused.
    like: what a checkpoint holds, or its shapes.
    save_seconds: least time between two checkpoints.

  Yields:
    A `Session`.
  """
  with contextlib.ExitStack() as stack:
    terminated = stack.enter_context(termination.deferred())
    folder = files.make_folder(pathlib.Path(folder))
    stack.enter_context(files.locked(folder))
    checkpoints.check_settings(folder / 'settings.json', dict(settings))
    saved = checkpoints.Checkpoints(folder / 'checkpoints')
    stack.callback(saved.close)
    restored = saved.restore(like)
    step = -1 if restored is None else restored.step
    records = harness.MetricsWriter(folder, step=step)
    stack.callback(records.close)
    yield Session(terminated, saved, restored, records, save_seconds)


def say_terminated(name: str, step: str) -> None:
  """Tells that a run ended early, and how it goes on."""
  message = f'{name}: terminated after {step}; the same command goes on.'
  print(message, file=sys.stderr, flush=True)
