"""Intervals, tables and `results.json`."""

import dataclasses
import datetime
import json
import math
import os
import pathlib
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.special

from experiments.harness.app import compile_time, flags
from experiments.harness.data import sources
from experiments.harness.store import files, programs

_PACKAGES = ('jax', 'jaxlib', 'numpy', 'optax', 'flax')


class SeedMean(float):
  """A mean over seeds with its values, for paired intervals.

  It is a float; `write_results` also writes the values. Arithmetic drops them.

  Attributes:
    per_seed: values in the order of the seeds; NaN for a stopped seed.
  """

  per_seed: tuple[float, ...]

  def __new__(cls, mean: float, per_seed: Sequence[float]) -> 'SeedMean':
    number = super().__new__(cls, mean)
    number.per_seed = tuple(per_seed)
    return number


class Interval(NamedTuple):
  """A mean over seeds with its 95 % confidence interval.

  Attributes:
    mean: mean of the finite values; NaN without any.
    half_width: half of the interval's width; NaN for fewer than two values.
    count: number of finite values.
    total: number of values.
    per_seed: values in the order of the seeds; () if unknown.
    ends: ends of an asymmetric interval, otherwise None.
  """

  mean: float
  half_width: float
  count: int
  total: int
  per_seed: tuple[float, ...] = ()
  ends: tuple[float, float] | None = None

  def __str__(self) -> str:
    text = format_number(self.mean)
    if self.half_width > 0 and math.isfinite(self.mean):
      # Two digits of the half width, and the same decimals for the mean.
      decimals = max(0, 1 - math.floor(math.log10(self.half_width)))
      text = f'{self.mean:.{decimals}f} ± {self.half_width:.{decimals}f}'
      if decimals > 6:
        text = f'{self.mean:.3g} ± {self.half_width:.1g}'
    if self.count < self.total and self.total > 1:
      text += f' ({self.count} of {self.total})'
    return text

  def metrics(self, name: str) -> dict[str, float]:
    """Returns the metrics of a number.

    Args:
      name: name of the number.

    Returns:
      `name`, which keeps the values per seed, `name/half_width` (or `name/low`
      and `name/high`), and `name/stopped`, the number of missing seeds, if any.
    """
    mean = SeedMean(self.mean, self.per_seed) if self.per_seed else self.mean
    if self.ends is None:
      metrics = {name: mean, f'{name}/half_width': self.half_width}
    else:
      low, high = self.ends
      metrics = {name: mean, f'{name}/low': low, f'{name}/high': high}
    if self.count < self.total:
      metrics[f'{name}/stopped'] = self.total - self.count
    return metrics


def reduced(values: Any, how: str) -> float:
  """Reduces numbers to one; NaN if any of them is NaN or missing.

  Python's `min` and `max` may drop a NaN, and numpy's `nan` functions always
  do: a failed seed would then improve the result.

  Args:
    values: numbers, or None for a missing one. Infinite numbers count.
    how: 'min', 'max', 'mean', 'median', 'sum' or 'ptp' (the range).

  Returns:
    The number; NaN without values.
  """
  known = np.array([np.nan if x is None else x for x in values], np.float64)
  if not known.size or np.isnan(known).any():
    return math.nan
  return float(getattr(np, how)(known))


def mean_interval(values: Any) -> Interval:
  """Computes the mean and its 95 % Student t interval.

  Args:
    values: one value per seed; NaN for a stopped seed.

  Returns:
    An `Interval`.
  """
  values = np.ravel(np.asarray(values, np.float64))
  finite = values[np.isfinite(values)]
  count = finite.size
  mean = float(np.mean(finite)) if count else math.nan
  half_width = math.nan
  if count > 1:
    quantile = scipy.special.stdtrit(count - 1, 0.975)
    half_width = float(quantile * np.std(finite, ddof=1) / math.sqrt(count))
  return Interval(mean, half_width, count, values.size, tuple(values.tolist()))


def jackknife_interval(
  statistic: Callable[[np.ndarray], float], count: int
) -> Interval:
  r"""Computes the 95 % jackknife interval of a statistic other than a mean.

  .. math:: v = \frac{n - 1}{n} \sum_i (s_{-i} - \bar s)^2,\qquad
    s \pm t_{n-1, 0.975} \sqrt v

  with s for all n seeds and :math:`s_{-i}` without seed i.

  Args:
    statistic: from indices of seeds, int (any number,), to a number.
    count: n, the number of seeds.

  Returns:
    An `Interval` around the statistic of all seeds.

  Source: Tukey, Bias and confidence in not-quite large samples, 1958.
  """
  everyone = np.arange(count)
  value = float(statistic(everyone))
  if count < 2:
    return Interval(value, math.nan, count, count)
  without = np.array([statistic(np.delete(everyone, i)) for i in everyone])
  variance = (count - 1) / count * np.sum((without - without.mean()) ** 2)
  half_width = scipy.special.stdtrit(count - 1, 0.975) * math.sqrt(variance)
  return Interval(value, float(half_width), count, count)


def write_results(
  options: flags.Options,
  *,
  metrics: Mapping[str, float],
  seconds: float,
  data: Sequence[sources.Source] = (),
  published: Sequence[str] = (),
  curves: Mapping[str, Any] | None = None,
  **more: Any,
) -> pathlib.Path:
  """Writes `results.json`.

  It also has the compile time and the other time of this process, since the
  last resumption.

  Args:
    options: the options of the run.
    metrics: numbers by name; non-finite ones become null. Those with values per
      seed also get an entry in `per_seed`.
    seconds: wall time, s.
    data: the data that were read, for `data` and `data_digests`.
    published: names of the published data sets, for `substituted`.
    curves: see `Report`.
    **more: further plain values.

  Returns:
    The path of the file.

  Raises:
    WriteError: if the file cannot be written.
    TypeError: if a metric is not a number.
  """
  device = jax.devices()[0]
  results = {
    'paper': options.paper,
    'binary': options.binary,
    'preset': options.preset,
    'seeds': list(options.seeds),
    'settings': plain(options.settings),
    'versions': versions(),
    'device': f'{len(jax.devices())} x {device.device_kind}',
    'hardware': {
      'cores': len(os.sched_getaffinity(0)),
      'machine': platform.machine(),
    },
    'date': datetime.datetime.now(datetime.UTC).date().isoformat(),
    'data_dir': options.data_dir and pathlib.Path(options.data_dir).name,
    'wall_seconds': round(float(seconds), 3),
    **compile_time.split(),
    'curves': {k: _points(v) for k, v in (curves or {}).items()},
    'metrics': {k: _finite(metrics[k]) for k in sorted(metrics)},
    'per_seed': {
      k: [_finite(x) for x in metrics[k].per_seed]
      for k in sorted(metrics)
      if isinstance(metrics[k], SeedMean)
    },
    'data': '; '.join(source.words for source in data),
    'data_digests': {source.name: source.digest for source in data},
    'substituted': sources.substituted(data, published),
    **{k: plain(v) for k, v in more.items()},
  }
  path = pathlib.Path(options.workdir) / 'results.json'
  files.write_text(path, json.dumps(results, indent=2, allow_nan=False) + '\n')
  return path


def versions() -> dict[str, str]:
  """Returns the versions of Python and of packages that affect numbers."""
  return {
    'python': platform.python_version(),
    **programs.versions(_PACKAGES, missing='not installed'),
  }


def format_number(value: float) -> str:
  """Formats a number with four digits, an integer with all; - if non-finite."""
  if not math.isfinite(value):
    return '-'
  if value == round(value) and abs(value) < 1e12:
    return f'{value:.0f}'
  return f'{value:.4g}'


def format_table(
  rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None
) -> str:
  """Formats a Markdown table with aligned columns.

  Args:
    rows: cells by column; a missing one is empty.
    columns: order of the columns; None for the order in the rows.

  Returns:
    The table with a line end.
  """
  columns = list(columns or dict.fromkeys(c for row in rows for c in row))
  cells = [[_cell(row.get(c, '')) for c in columns] for row in rows]
  numeric = [
    all(not isinstance(row.get(c, 0), str) for row in rows) for c in columns
  ]
  widths = [
    max(3, len(column), *(len(row[i]) for row in cells), 0)
    for i, column in enumerate(columns)
  ]

  def line(row):
    aligned = [
      text.rjust(width) if right else text.ljust(width)
      for text, width, right in zip(row, widths, numeric, strict=True)
    ]
    return '| ' + ' | '.join(aligned) + ' |'

  rule = [
    '-' * (width - 1) + (':' if right else '-')
    for width, right in zip(widths, numeric, strict=True)
  ]
  return '\n'.join([line(columns), line(rule), *map(line, cells)]) + '\n'


def write_table(
  workdir: files.Path,
  rows: Sequence[Mapping[str, Any]],
  columns: Sequence[str] | None = None,
) -> str:
  """Prints a table and writes it to `table.md`; see `format_table`."""
  table = format_table(rows, columns)
  files.write_text(pathlib.Path(workdir) / 'table.md', table)
  if files.is_writer():
    print(table, end='', flush=True)
  return table


def _cell(value: Any) -> str:
  if isinstance(value, Interval):
    return str(value)
  if isinstance(value, str | bool | int | np.integer):
    return str(value)
  if value is None:
    return '-'
  return format_number(float(value))


def _points(values: Any, count: int = 16) -> list[float | None]:
  """Returns the mean over seeds at a few records; null if non-finite."""
  values = np.asarray(values, np.float64)
  values = values.reshape(len(values), -1).mean(axis=1)
  last = len(values) - 1
  at = np.unique(np.linspace(0, last, min(count, last + 1)).round().astype(int))
  return [float(f'{x:.4g}') if math.isfinite(x) else None for x in values[at]]


def _finite(value: Any) -> float | None:
  value = float(value)
  return value if math.isfinite(value) else None


def plain(value: Any) -> Any:
  """Converts values of settings and of numpy for JSON.

  A named tuple becomes a list.
  """
  if dataclasses.is_dataclass(value):
    value = dataclasses.asdict(value)
  if isinstance(value, Mapping):
    return {str(k): plain(v) for k, v in value.items()}
  if isinstance(value, tuple | list | np.ndarray):
    return [plain(v) for v in value]
  if isinstance(value, np.generic | jax.Array):
    value = value.item()
  if isinstance(value, float):
    return _finite(value)
  return value
