"""Where the metrics of a run go: a JSON-lines file and TensorBoard.

One line is one record: `{"step": 100, "loss/upper": [0.5, null], ...}`, with a
value for each member and null for what is not a finite number. Lines do not
depend on when or how often a run was killed.
"""

import json
import math
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorboardX

from experiments.harness import files

Record = dict[str, Any]


class Records:
  """Records of a run, in memory.

  Attributes:
    records: all records, in order.
  """

  def __init__(self, records: list[Record] | None = None):
    self.records = records or []

  def write(self, step: int, metrics: Mapping[str, np.ndarray]) -> None:
    """Adds a record.

    Args:
      step: steps taken.
      metrics: values, (members,), for each metric.

    Raises:
      WriteError: if it goes to a file that cannot be written; names the folder.
    """
    record: Record = {'step': step}
    for name in sorted(metrics):
      row = np.asarray(metrics[name], np.float64).tolist()
      record[name] = [x if math.isfinite(x) else None for x in row]
    self.records.append(record)
    self._keep(record)

  def history(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The records as arrays.

    Returns:
      Steps, int (records,), and for each metric its values, float64
      (records, members), NaN where not finite.
    """
    steps = np.array([record['step'] for record in self.records], np.int64)
    names = [name for name in (*self.records, {})[0] if name != 'step']
    history = {
      name: np.array([record[name] for record in self.records], np.float64)
      for name in names
    }
    return steps, history

  def close(self) -> None:
    """Closes the files, if there are any."""

  def _keep(self, record: Record) -> None:
    pass


class MetricsWriter(Records):
  """Records that also go to `metrics.jsonl` and to TensorBoard event files.

  Args:
    folder: where both lie.
    step: the step of the checkpoint from which the run goes on: later records
      are dropped. -1 drops all.
  """

  def __init__(self, folder: files.Path, *, step: int = -1):
    self._folder = files.make_folder(folder)
    path = self._folder / 'metrics.jsonl'
    super().__init__(read_records(path, until=step))
    if step > 0 and (not self.records or self.records[-1]['step'] != step):
      warnings.warn(
        f'{path} lacks records before step {step}, where the run goes on: the '
        'history has a gap.',
        RuntimeWarning,
        stacklevel=2,
      )
    # Rewritten, not cut: a half-written last line goes as well.
    files.write_text(path, ''.join(map(_line, self.records)))
    with files.writing(self._folder):
      self._file = open(path, 'a', encoding='utf-8')  # noqa: SIM115
      self._board = tensorboardX.SummaryWriter(
        str(self._folder / 'tensorboard'),
        purge_step=step + 1,
        # Files are named after the second: a quick resumption would overwrite.
        filename_suffix=f'.{step + 1}',
      )

  def close(self) -> None:
    """Flushes and closes the files."""
    with files.writing(self._folder):
      self._file.close()
      self._board.close()

  def _keep(self, record: Record) -> None:
    with files.writing(self._folder):
      self._file.write(_line(record))
      self._file.flush()
      for name, row in record.items():
        finite = [x for x in np.atleast_1d(row) if x is not None]
        if name != 'step' and finite:
          self._board.add_scalar(name, float(np.mean(finite)), record['step'])


def read_records(path: files.Path, *, until: float = math.inf) -> list[Record]:
  """Reads records, up to a step or to the first line that is not whole.

  Args:
    path: a JSON-lines file; need not exist.
    until: the last step to read.

  Returns:
    The records, in order.
  """
  path = pathlib.Path(path)
  records: list[Record] = []
  if not path.exists():
    return records
  for line in path.read_text(encoding='utf-8', errors='replace').splitlines():
    try:
      record = json.loads(line)
    except json.JSONDecodeError:
      break
    if not isinstance(record, dict) or record.get('step', math.inf) > until:
      break
    records.append(record)
  return records


def _line(record: Record) -> str:
  return json.dumps(record, allow_nan=False) + '\n'
