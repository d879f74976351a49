"""Runs and claims of a paper, and the judgement of claims.

A paper's folder declares both in `claims.py`:

    RUNS = {
      'toy': harness.Run('toy'),
      'lr5e-3': harness.Run('pareto', flags=('--learning_rate=5e-3',)),
    }
    CLAIMS = (
      harness.Claim(
        'Nearly all starts end at a local minimum.',
        run='toy', metric='fraction_at_minima', at_least=0.99,
        published='all'),
    )

`python -m experiments.reproduce` makes the runs and judges the claims. Stored
results and documents use the names of the runs.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments.harness.store import files
from experiments.harness.study import report

PRESETS = ('smoke', 'quick', 'paper')
ENOUGH_SEEDS = 5  # With fewer seeds, the verdict states their number.
# Flags that `reproduce` sets.
_RESERVED = ('preset', 'workdir', 'data_dir')


@dataclasses.dataclass(frozen=True)
class Paper:
  """A paper in the README's table.

  Attributes:
    title: the topic and the year.
    solvers: names of its solvers, or other names of the library.
    headlines: short texts of claims by metric, with {} for the number.
  """

  title: str
  solvers: tuple[str, ...]
  headlines: Mapping[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """A run of a binary, whose results are stored under its name.

  Attributes:
    binary: module in the paper's folder.
    preset: preset of the stored results.
    flags: further flags, such as '--model=mlp'.
    mode: mode of the binary, such as 'evaluate'; '' to train.
    data: subfolder of the folder of data sets; '' for the folder itself, or for
      packaged data.
    extra: pip extra that it needs besides `experiments`.
    presets: presets of `reproduce` that include it; () for a run that is made
      only by name.
  """

  binary: str = dataclasses.field(kw_only=False)
  preset: str = 'quick'
  flags: tuple[str, ...] = ()
  mode: str = ''
  data: str = ''
  extra: str = ''
  presets: tuple[str, ...] = PRESETS

  def __post_init__(self):
    for flag in self.flags:
      name = flag.removeprefix('--').partition('=')[0]
      if not flag.startswith('--') or name in _RESERVED:
        raise ValueError(
          f'the flags of a run of {self.binary} are written --name=value, '
          f'without {", ".join(_RESERVED)}, got {flag!r}.'
        )
    if self.presets:
      _check_presets(f'a run of {self.binary}', self.presets)

  def words(self, preset: str, data_dir: str | None = None) -> tuple[str, ...]:
    """Returns the arguments of the command, without the workdir.

    Args:
      preset: the preset.
      data_dir: folder of data sets, or None.
    """
    mode = (self.mode,) if self.mode else ()
    folder = os.path.join(data_dir or '', self.data).rstrip('/')
    data = () if data_dir is None else (f'--data_dir={folder}',)
    return (*mode, f'--preset={preset}', *data, *self.flags)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
  """A claim of a paper, with the metric and the bound that show it.

  Attributes:
    words: the claim in one sentence.
    run: name of the run that measures it.
    metric: name of the metric in the run's `results.json`.
    at_least: lower bound: a number, or the name of another metric.
    at_most: upper bound: a number, or the name of another metric.
    factor: factor of a bound that is another metric.
    lead: margin to a bound that is another metric, in its unit; negative to
      allow a difference.
    published: the paper's number as a text; '-' if it has none.
    presets: presets in which the claim is judged.
    substituted: the data that always replace the paper's. If they depend on
      flags, the binary reports them in its results instead.
  """

  words: str = dataclasses.field(kw_only=False)
  run: str
  metric: str
  at_least: float | str | None = None
  at_most: float | str | None = None
  factor: float = 1.0
  lead: float = 0.0
  published: str = '-'
  presets: tuple[str, ...] = PRESETS
  substituted: str = ''

  def __post_init__(self):
    if self.at_least is None and self.at_most is None:
      raise ValueError(
        f'the claim {self.words!r} needs a bound: at_least or at_most.'
      )
    relative = any(isinstance(x, str) for x in (self.at_least, self.at_most))
    if not relative and (self.factor != 1 or self.lead):
      raise ValueError(
        f'factor and lead of {self.words!r} are relative to another metric: '
        'write them into the number that is its bound.'
      )
    if not self.factor > 0:
      raise ValueError(
        f'the factor of {self.words!r} is above zero, got {self.factor}.'
      )
    _check_presets(repr(self.words), self.presets)

  def bound(self) -> str:
    """Formats the bound, such as `≥ 0.99` or `≥ 1.5 x b + 0.01`."""
    if self.at_most is None:
      return f'≥ {self._words(self.at_least, 1)}'
    if self.at_least is None:
      return f'≤ {self._words(self.at_most, -1)}'
    low, high = self._words(self.at_least, 1), self._words(self.at_most, -1)
    return f'in [{low}, {high}]'

  def _words(self, bound: Any, side: int) -> str:
    if not isinstance(bound, str):
      return f'{bound:g}'
    lead = side * self.lead
    text = bound if self.factor == 1 else f'{self.factor:g} x {bound}'
    return text + (f' {"+" if lead > 0 else "-"} {abs(lead):g}' if lead else '')


def _check_presets(owner: str, presets: tuple[str, ...]) -> None:
  if not presets or not set(presets) <= set(PRESETS):
    raise ValueError(
      f'the presets of {owner} are among {", ".join(PRESETS)}, got {presets}.'
    )


class Judgement(NamedTuple):
  """The judgement of a claim.

  Attributes:
    result: the number with its interval, as a text.
    bound: the bound, with the values of the metrics that it names.
    holds: whether the number is within the bound.
    verdict: `shown` if the whole 95 % interval is within the bound, with the
      number of seeds if they are fewer than five; `mean only` if only the
      number is; `shown, no interval` without an interval; `not shown`, with a
      reason if a number is missing; `substituted data`, with the verdict on
      these.
  """

  result: str
  bound: str
  holds: bool
  verdict: str


def read_results(path: files.Path) -> dict[str, Any]:
  """Reads a `results.json`.

  Args:
    path: the file.

  Returns:
    Its content.

  Raises:
    ValueError: if it is missing, damaged, or has no metrics.
  """
  path = pathlib.Path(path)
  try:
    results = json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    raise ValueError(f'the run wrote no {path.name}') from None
  except (OSError, ValueError) as error:
    reason = str(error).splitlines()[0]
    raise ValueError(f'{path.name} is damaged: {reason}') from error
  metrics = results.get('metrics') if isinstance(results, dict) else None
  if not isinstance(metrics, dict):
    raise ValueError(f'{path.name} has no metrics')
  for name, value in metrics.items():
    if value is not None and not isinstance(value, int | float):
      raise ValueError(f'{path.name} is damaged: metric {name} is no number')
  return results


class _Number(NamedTuple):
  """A metric and the reach of its interval; NaN without an interval."""

  value: float
  below: float
  above: float


def judge(claim: Claim, results: Mapping[str, Any]) -> Judgement:
  """Judges a claim by the results of a run.

  A claim relative to another metric concerns their difference. Its interval is
  the paired t interval over differences per seed, or that of two independent
  numbers if the values per seed are unknown.

  Args:
    claim: the claim.
    results: the content of `results.json`. The interval of a metric is
      `name/half_width`, or `name/low` and `name/high`; `name/stopped` counts
      missing seeds. `per_seed` has the values of a mean by its name.
      `substituted` names the data that replace the paper's.

  Returns:
    A `Judgement`: `not shown` if a number is non-finite or lacks seeds.

  Raises:
    ValueError: if the results lack a metric of the claim.
  """
  metrics = results['metrics']
  number = _number(metrics, claim.metric)
  others = {
    name: _number(metrics, name)
    for name in (claim.at_least, claim.at_most)
    if isinstance(name, str)
  }
  reasons = [
    f'{name} {why}'
    for name in (claim.metric, *others)
    if (why := _unusable(metrics, name))
  ]
  # The margin to each bound, and the reach of the interval towards it.
  margins, paired = [], []
  for bound, side in ((claim.at_least, 1), (claim.at_most, -1)):
    if bound is None:
      continue
    reach = number.below if side > 0 else number.above
    limit = bound
    if isinstance(bound, str):
      other = others[bound]
      limit = claim.factor * other.value + side * claim.lead
      difference = paired_interval(results, claim.metric, bound, claim.factor)
      if difference:
        reach = difference.half_width
        paired.append(difference)
      else:
        other_reach = other.above if side > 0 else other.below
        reach = math.hypot(reach, claim.factor * other_reach)
    margins.append((side * (number.value - limit), reach))
  holds = not reasons and all(margin >= 0 for margin, _ in margins)
  if reasons:
    verdict = f'not shown: {"; ".join(reasons)}'
  elif not holds:
    verdict = 'not shown'
  elif any(math.isnan(reach) for _, reach in margins):
    verdict = 'shown, no interval'
  else:
    beyond = all(margin >= reach for margin, reach in margins)
    verdict = 'shown' if beyond else 'mean only'
    seeds = len((results.get('per_seed') or {}).get(claim.metric, ()))
    if beyond and 1 < seeds < ENOUGH_SEEDS:
      verdict = f'shown, {seeds} seeds'
  substituted = claim.substituted or results.get('substituted') or ''
  if substituted:
    verdict = f'substituted data ({substituted}): {verdict} there'
  return Judgement(
    result=_text(number),
    bound='; '.join(
      [
        claim.bound(),
        *(f'{k} is {_text(x)}' for k, x in others.items()),
        *(f'paired difference {x}' for x in paired),
      ]
    ),
    holds=holds,
    verdict=verdict,
  )


def paired_interval(
  results: Mapping[str, Any], metric: str, other: str, factor: float = 1.0
) -> report.Interval | None:
  """Computes the paired t interval of `metric - factor * other` over seeds.

  Args:
    results: the content of a `results.json`, or of a stored result.
    metric: name of a mean over seeds.
    other: name of another mean over the same seeds.
    factor: factor of `other`.

  Returns:
    An `Interval`; None if the values per seed of one mean are unknown.
  """
  per_seed = results.get('per_seed') or {}
  first, second = (per_seed.get(name, ()) for name in (metric, other))
  if not 1 < len(first) == len(second) or None in (*first, *second):
    return None
  return report.mean_interval(np.subtract(first, np.multiply(factor, second)))


def _number(metrics: Mapping[str, Any], name: str) -> _Number:
  if name not in metrics:
    raise ValueError(f'results.json has no metric {name}')

  def read(key):
    value = metrics.get(key)
    return math.nan if value is None else float(value)

  value, half = read(name), read(f'{name}/half_width')
  if f'{name}/low' in metrics:
    low, high = read(f'{name}/low'), read(f'{name}/high')
    return _Number(value, value - low, high - value)
  return _Number(value, half, half)


def _unusable(metrics: Mapping[str, Any], name: str) -> str:
  if not math.isfinite(_number(metrics, name).value):
    return 'is not a finite number'
  stopped = metrics.get(f'{name}/stopped')
  return f'lacks {stopped:g} seeds, which stopped' if stopped else ''


def _text(number: _Number) -> str:
  half = (number.below + number.above) / 2
  return str(report.Interval(number.value, half, 1, 1))
