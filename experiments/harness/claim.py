"""Claims of a paper, and what a finished run says about them.

A paper's folder declares its claims once, in `claims.py`:

    CLAIMS = (
      harness.Claim(
        'Nearly all starts end at a local minimum.',
        binary='toy', metric='fraction_at_minima', at_least=0.99,
        published='all'),
    )

`python -m experiments.reproduce` finds that file, runs the binaries and judges.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments.harness import files, report

PRESETS = ('smoke', 'quick', 'paper')
# What `reproduce` says itself.
_RESERVED = ('preset', 'workdir', 'data_dir')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
  """One claim of a paper, and the number that shows it.

  Attributes:
    words: the claim, one sentence.
    binary: the module of the paper's folder that measures it.
    metric: the name of the number in the binary's `results.json`.
    at_least: its lower bound: a number, or the name of another metric.
    at_most: its upper bound, likewise; with both, it lies between them.
    margin: how far beyond a bound still counts, in the metric's unit.
    published: the paper's number, as a text; '-' if it has none.
    flags: further flags of the binary, such as '--model=mlp'.
    presets: those in which the claim is judged.
    substituted: what stands in for the paper's data, whatever the flags. A
      binary whose data depends on its flags says it in its results instead.
  """

  words: str = dataclasses.field(kw_only=False)
  binary: str
  metric: str
  at_least: float | str | None = None
  at_most: float | str | None = None
  margin: float = 0.0
  published: str = '-'
  flags: tuple[str, ...] = ()
  presets: tuple[str, ...] = PRESETS
  substituted: str = ''

  def __post_init__(self):
    if self.at_least is None and self.at_most is None:
      raise ValueError(
        f'the claim {self.words!r} needs a bound: at_least or at_most.'
      )
    if self.margin < 0:
      raise ValueError(
        f'the margin of {self.words!r} is not negative, got {self.margin}.'
      )
    for flag in self.flags:
      name = flag.removeprefix('--').partition('=')[0]
      if not flag.startswith('--') or name in _RESERVED:
        raise ValueError(
          f'the flags of {self.words!r} are written --name=value and are none '
          f'of {", ".join(_RESERVED)}, got {flag!r}.'
        )
    unknown = [p for p in self.presets if p not in PRESETS]
    if unknown or not self.presets:
      raise ValueError(
        f'the presets of {self.words!r} are among {", ".join(PRESETS)}, got '
        f'{self.presets}.'
      )

  def bound(self) -> str:
    """The bound in words, such as `≥ 0.99`."""
    low, high = _bound(self.at_least), _bound(self.at_most)
    within = f', within {self.margin:g}' if self.margin else ''
    if self.at_most is None:
      return f'≥ {low}{within}'
    if self.at_least is None:
      return f'≤ {high}{within}'
    return f'in [{low}, {high}]{within}'


class Judgement(NamedTuple):
  """What a run says about a claim.

  Attributes:
    ours: the number with its interval, as a text.
    bound: the bound, with the values of the metrics that it names.
    holds: whether the number is within the bound.
    verdict: `shown`, `not shown`, or `substituted data` with what the number
      says on those.
  """

  ours: str
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
    ValueError: if it is missing, damaged, or has no metrics; names it.
  """
  path = pathlib.Path(path)
  try:
    results = json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    raise ValueError(f'the run wrote no {path.name}') from None
  except json.JSONDecodeError as error:
    raise ValueError(f'{path.name} is damaged: {error}') from error
  if not isinstance(results, dict) or 'metrics' not in results:
    raise ValueError(f'{path.name} has no metrics')
  return results


def judge(claim: Claim, results: Mapping[str, Any]) -> Judgement:
  """Compares a claim with the results of a run.

  Args:
    claim: the claim.
    results: the content of its `results.json`. A metric's interval is the
      metric `name/half_width`, where there is one. `substituted` says what
      stands in for the paper's data, if anything does.

  Returns:
    A `Judgement`. A number that is not finite shows nothing.

  Raises:
    ValueError: if the results lack a metric that the claim names.
  """
  metrics = results['metrics']
  ours = _value(metrics, claim.metric)
  half_width = metrics.get(f'{claim.metric}/half_width')
  half_width = math.nan if half_width is None else half_width
  low = _limit(metrics, claim.at_least, -math.inf)
  high = _limit(metrics, claim.at_most, math.inf)
  holds = low - claim.margin <= ours <= high + claim.margin
  others = [
    f'{name} is {report.format_number(_value(metrics, name))}'
    for name in (claim.at_least, claim.at_most)
    if isinstance(name, str)
  ]
  substituted = claim.substituted or results.get('substituted') or ''
  verdict = 'shown' if holds else 'not shown'
  if substituted:
    verdict = (
      f'substituted data ({substituted}): the bound '
      f'{"holds" if holds else "fails"} there'
    )
  return Judgement(
    ours=str(report.Interval(ours, half_width, 1, 1)),
    bound='; '.join([claim.bound(), *others]),
    holds=holds,
    verdict=verdict,
  )


def _bound(bound: float | str | None) -> str:
  return bound if isinstance(bound, str) else f'{bound or 0:g}'


def _limit(metrics, bound, default) -> float:
  if isinstance(bound, str):
    return _value(metrics, bound)
  return default if bound is None else bound


def _value(metrics: Mapping[str, Any], name: str) -> float:
  if name not in metrics:
    raise ValueError(f'results.json has no metric {name}')
  return math.nan if metrics[name] is None else float(metrics[name])
