"""Metrics of a run, in a JSON-lines file and for TensorBoard.

A line is a record such as `{"step": 100, "loss/upper": [0.5, null], ...}`, with
a value per member, null for a number that is not finite, and a digest that
reveals damage. A kill and a resumption do not change the lines.
"""

import contextlib
import itertools
import math
import pathlib
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from tensorboardX import record_writer, summary
from tensorboardX.proto import event_pb2

from experiments.harness.store import files

_MOST_LINE = 2**24  # Bytes of a record.

Record = dict[str, Any]


class Records:
  """Records of a run in memory.

  Attributes:
    records: all records in order of steps.
  """

  def __init__(self, records: list[Record] | None = None):
    self.records = records or []

  def write(self, step: int, metrics: Mapping[str, np.ndarray]) -> None:
    """Adds a record.

    Args:
      step: steps taken so far.
      metrics: values (members,) by metric.

    Raises:
      WriteError: if the file cannot be written.
    """
    record: Record = {'step': step}
    for name in sorted(metrics):
      row = np.asarray(metrics[name], np.float64).tolist()
      record[name] = [x if math.isfinite(x) else None for x in row]
    self.records.append(record)
    self._keep(record)

  def history(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns the records as arrays.

    Returns:
      Steps, int (records,); values by metric, float64 (records, members), NaN
      where not finite or not measured.
    """
    steps = np.array([record['step'] for record in self.records], np.int64)
    history = {}
    for name in dict.fromkeys(n for record in self.records for n in record):
      if name != 'step':
        # `evaluate_host` does not measure at every record.
        missing = next([None] * len(r[name]) for r in self.records if name in r)
        rows = [record.get(name, missing) for record in self.records]
        history[name] = np.array(rows, np.float64)
    return steps, history

  def close(self) -> None:
    """Closes the files."""

  def _keep(self, record: Record) -> None:
    pass


class MetricsWriter(Records):
  """Records that also go to `metrics.jsonl` and to TensorBoard event files.

  Args:
    folder: folder of the files.
    step: step of the checkpoint from which the run resumes; later records are
      dropped. -1 drops all.
    count: number of records up to this step; None if unknown.
  """

  def __init__(
    self, folder: files.Path, *, step: int = -1, count: int | None = None
  ):
    self._folder = files.make_folder(folder)
    path = self._folder / 'metrics.jsonl'
    records, damage = _read(path, step)
    super().__init__(records)
    if damage:
      files.put_aside(path, damage, self._folder)
    elif step > 0 and not _complete(records, step, count):
      warnings.warn(
        f'{path} lacks records before step {step}, where the run resumes: the '
        'history has a gap.',
        RuntimeWarning,
        stacklevel=2,
      )
    # Rewriting also drops an incomplete last line.
    files.write_text(path, ''.join(map(_line, self.records)))
    with files.writing(self._folder):
      self._file = open(path, 'a', encoding='utf-8')  # noqa: SIM115
      self._board = _Board(self._folder / 'tensorboard', step + 1)

  def close(self) -> None:
    """Flushes and closes the files."""
    with files.writing(self._folder), contextlib.ExitStack() as stack:
      # Closes both even if one fails.
      stack.callback(self._file.close)
      stack.callback(self._board.close)

  def _keep(self, record: Record) -> None:
    with files.writing(self._folder):
      self._file.write(_line(record))
      self._file.flush()
      self._board.write(record)


class _Board:
  """An event file of TensorBoard.

  tensorboardX's own writer uses a thread, which hides the error of a full disk.
  """

  def __init__(self, folder: pathlib.Path, purge_step: int):
    files.make_folder(folder)
    # The step distinguishes two processes that start in the same second.
    name = f'events.out.tfevents.{int(time.time())}.{purge_step}'
    self._writer = record_writer.RecordWriter(str(folder / name))
    # TensorBoard drops earlier events from this step on.
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._event(purge_step, file_version='brain.Event:2')
    self._event(purge_step, session_log=start)

  def write(self, record: Record) -> None:
    """Adds the mean over members of each metric."""
    for name, row in record.items():
      finite = [x for x in np.atleast_1d(row) if x is not None]
      if name != 'step' and finite:
        mean = summary.scalar(name, float(np.mean(finite)))
        self._event(record['step'], summary=mean)
    self._writer.flush()

  def close(self) -> None:
    """Closes the file."""
    self._writer.close()

  def _event(self, step: int, **content: Any) -> None:
    event = event_pb2.Event(step=step, wall_time=time.time(), **content)
    self._writer.write(event.SerializeToString())


def read_records(path: files.Path, *, until: float = math.inf) -> list[Record]:
  """Reads records, and warns of damaged lines.

  Args:
    path: a JSON-lines file; may be missing.
    until: last step to read.

  Returns:
    The undamaged records in order.
  """
  records, damage = _read(pathlib.Path(path), until)
  if damage:
    warnings.warn(damage, RuntimeWarning, stacklevel=2)
  return records


def _complete(records: list[Record], step: int, count: int | None) -> bool:
  if not records or records[-1]['step'] != step:
    return False
  return count is None or len(records) >= count


def _read(path: pathlib.Path, until: float) -> tuple[list[Record], str]:
  """Returns the undamaged records, and a report of damage, '' if none."""
  if kind := files.describe_irregular(path):
    return [], f'{path} is {kind}: its records are missing'
  parsed = [_parse(line) for line in _lines(path)] if path.exists() else []
  usable = [x for x in parsed if x is not None and x['step'] <= until]
  by_step = {record['step']: record for record in reversed(usable)}
  records = [by_step[step] for step in sorted(by_step)]
  # After the record of `until`, damaged lines would be dropped.
  reached = bool(records) and records[-1]['step'] >= until
  end = parsed.index(usable[-1]) if reached else len(parsed)
  damaged = [str(i + 1) for i in range(end) if parsed[i] is None]
  damage = []
  if damaged:
    then = 'a gap stays there' if until >= 0 else 'the run starts again'
    damage.append(f'is damaged in line {", ".join(damaged)}: {then}')
  good = [(i + 1, x['step']) for i, x in enumerate(parsed) if x is not None]
  pairs = itertools.pairwise(good if until >= 0 else [])
  moved = [str(line) for (_, before), (line, step) in pairs if step <= before]
  if moved:
    damage.append(
      f'has steps out of order in line {", ".join(moved)}: they are sorted, '
      'and the first record of each step stays'
    )
  return records, f'{path} {", and ".join(damage)}' if damage else ''


def _lines(path: pathlib.Path) -> Iterator[bytes]:
  """Yields the lines of records; an empty one for a line that is too long."""
  with open(path, 'rb') as file:
    while line := file.readline(_MOST_LINE + 1):
      if line.endswith(b'\n'):
        yield line[:-1]
      # A kill may leave an incomplete last line: that is no damage.
      elif len(line) > _MOST_LINE:
        while line and not line.endswith(b'\n'):
          line = file.readline(_MOST_LINE + 1)
        yield b''


def _parse(line: bytes) -> Record | None:
  """Returns the record of a line; None if it is damaged."""
  with contextlib.suppress(ValueError):
    record = files.unseal(line)
    if isinstance(record.get('step'), int):
      return record
  return None


def _line(record: Record) -> str:
  return files.seal(record, allow_nan=False) + '\n'
