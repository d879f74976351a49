"""Curves of stored results as SVG, drawn without a script."""

import html
import json
import math
import pathlib
import re
from collections.abc import Mapping, Sequence

ROOT = pathlib.Path(__file__).parents[2]

# The table of a stored run that draws its curves.
_CURVES = re.compile(
  r'<!-- table: (?!benchmarks/)(\S+) \|([^>]*\| curve\b[^>]*?)-->'
)
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 640, 260, 56, 26, 8


def _ticks(low: float, high: float, log: bool) -> list[float]:
  if log:
    first, last = math.ceil(low), math.floor(high)
    step = max(1, math.ceil((last - first + 1) / 6))
    return [float(t) for t in range(first, last + 1, step)]
  step = 10 ** math.floor(math.log10((high - low) or 1.0))
  for factor in (1, 2, 5, 10):
    if (high - low) / (step * factor) <= 6:
      step *= factor
      break
  first = math.ceil(low / step)
  return [step * k for k in range(first, math.floor(high / step) + 1)]


def _label(value: float, log: bool) -> str:
  return f'1e{value:.0f}' if log else f'{value:.4g}'


def chart(name: str, curves: Mapping[str, Sequence[float | None]]) -> str:
  """A figure of curves over the run, with a legend.

  The scale is logarithmic where positive values span two decades.

  Args:
    name: what the figure shows, for its caption.
    curves: values at equal distances, by name; None where not finite.

  Returns:
    HTML; a pointer on a name of the legend shows its curve.
  """
  known = [v for c in curves.values() for v in c if v is not None]
  if not known:
    return ''
  log = min(known) > 0 and max(known) > 100 * min(known)
  scale = math.log10 if log else float
  low, high = scale(min(known)), scale(max(known))
  span = (high - low) or 1.0
  right, bottom = _WIDTH - 8, _HEIGHT - _BOTTOM
  x = lambda k, count: _LEFT + (right - _LEFT) * k / max(count - 1, 1)
  y = lambda v: bottom - (bottom - _TOP) * (v - low) / span
  lines = []
  for tick in _ticks(low, high, log):
    at = y(tick)
    lines.append(
      f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{at:.1f}" '
      f'y2="{at:.1f}"/><text x="{_LEFT - 6}" y="{at + 4:.1f}" '
      f'text-anchor="end">{_label(tick, log)}</text>'
    )
  lines.append(f'<text x="{_LEFT}" y="{_HEIGHT - 8}">start of the run</text>')
  lines.append(
    f'<text x="{right}" y="{_HEIGHT - 8}" text-anchor="end">end</text>'
  )
  legend = []
  for k, (curve, values) in enumerate(curves.items()):
    colour = f'hsl({(k * 137.5) % 360:.0f} 65% 45%)'
    # A missing value interrupts the line.
    path, pen = [], 'M'
    for at, value in enumerate(values):
      if value is None or (log and value <= 0):
        pen = 'M'
        continue
      path.append(f'{pen}{x(at, len(values)):.1f} {y(scale(value)):.1f}')
      pen = 'L'
    drawn = ''.join(path)
    lines.append(f'<path data-curve="{k}" stroke="{colour}" d="{drawn}"/>')
    legend.append(
      f'<button type="button" data-curve="{k}"><i style="background:{colour}">'
      f'</i>{html.escape(curve)}</button>'
    )
  return (
    f'<figure class="curves"><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" '
    f'role="img" aria-label="{html.escape(name)}">{"".join(lines)}</svg>'
    f'<div class="legend">{"".join(legend)}</div></figure>'
  )


def _groups(curves: Mapping[str, Sequence]) -> dict[str, dict]:
  """Curves by their problem: the first part, where several runs share it."""
  heads = [name.partition('/')[0] for name in curves]
  methods = {name.partition('/')[2] for name in curves}
  problems = set(heads)
  # `control/direct` is a method; `a9a/soba` is a method on a problem.
  shared = all('/' in name for name in curves) and len(methods) < len(curves)
  if not shared or len(problems) < 2:
    return {'': dict(curves)}
  groups: dict[str, dict] = {}
  for name, values in curves.items():
    head, _, rest = name.partition('/')
    groups.setdefault(head, {})[rest] = values
  return groups


def with_charts(text: str) -> str:
  """Puts the curves of a stored run before each table that lists them."""

  def one(match):
    paper, _, run = match[1].partition('/')
    path = ROOT / 'experiments' / paper / 'results' / f'{run}.json'
    if not path.exists():
      return match[0]
    curves = json.loads(path.read_text(encoding='utf-8')).get('curves') or {}
    chosen = re.search(r'\| (\w+) == (\S+)', match[2])
    figures = []
    for group, members in _groups(curves).items():
      if chosen and group and group != chosen[2]:
        continue
      heading = f'**{group}**\n\n' if group else ''
      figures.append(heading + chart(f'{match[1]} {group}'.strip(), members))
    return '\n\n'.join([*filter(None, figures), match[0]])

  return _CURVES.sub(one, text)
