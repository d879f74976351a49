"""Runs of games that Python steps: folder, records and checkpoints.

After a kill they resume from the last checkpoint, but not bit for bit: current
episodes begin again.
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
    terminated: whether there was a SIGTERM, after which a run has to end.
    restored: the newest checkpoint, or None.
    records: writer of metrics.
    saved_step: step of the newest checkpoint; 0 without one.
  """

  def __init__(
    self,
    terminated: Callable[[], bool],
    saved: checkpoints.Checkpoints,
    restored: harness.Restored | None,
    records: harness.MetricsWriter,
    save_seconds: float,
  ):
    """Stores the parts of an opened run."""
    self.terminated, self.records = terminated, records
    self.restored = restored
    self.saved_step = 0 if restored is None else restored.step
    self._saved, self._save_seconds = saved, save_seconds
    self._saved_at = time.monotonic()

  def due(self) -> bool:
    """Whether a checkpoint is due."""
    return time.monotonic() - self._saved_at >= self._save_seconds

  def save(self, step: int, tree: Any, extra: dict[str, Any]) -> None:
    """Saves a checkpoint and waits until it is written."""
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
  """Opens the folder of a run and reads its newest checkpoint.

  Args:
    folder: of the run; locked while it is open.
    settings: of the run; a folder with other settings is refused.
    like: the tree of a checkpoint, or its shapes.
    save_seconds: minimum time between two checkpoints.

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
  """Prints that a run ended early, and how to resume it."""
  message = f'{name}: terminated after {step}; the same command resumes it.'
  print(message, file=sys.stderr, flush=True)
