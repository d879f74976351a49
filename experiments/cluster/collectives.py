"""Counts the numbers that a compiled program exchanges between devices.

XLA's text of a partitioned program names each collective with the shape of its
result. A collective in a loop counts as often as the loop runs, one in a branch
if its branch exchanges the most.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = (
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
)
_BYTES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's16': 2, 'u16': 2}
_BYTES |= {'f32': 4, 's32': 4, 'u32': 4, 'f64': 8, 's64': 8, 'u64': 8}
_COMPUTATION = re.compile(r'^(?:ENTRY )?%?([\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z\-]+)\(')
_SHAPE = re.compile(r'(\w+)\[([\d,]*)\]')
_CALLED = re.compile(
  r'(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)'
)
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


class Exchange(NamedTuple):
  """What a program exchanges in one call.

  Attributes:
    bytes: bytes of the results of collectives that have a dimension.
    scalars: number of scalars, such as losses; that of all seeds is one.
    calls: number of collectives.
  """

  bytes: int = 0
  scalars: int = 0
  calls: int = 0

  def plus(self, other: 'Exchange', times: int = 1) -> 'Exchange':
    """Adds another exchange, repeated."""
    return Exchange(*(a + times * b for a, b in zip(self, other, strict=True)))


def count(
  text: str, kinds: tuple[str, ...] = KINDS, *, seeds: int = 1
) -> Exchange:
  """Counts what a program exchanges.

  Args:
    text: `compiled.as_text()` of a program for several devices.
    kinds: collectives that count.
    seeds: seeds that the program maps; a scalar has a number for each.

  Returns:
    An `Exchange`.

  Raises:
    ValueError: if a loop with a collective has no known number of steps.
  """
  bodies, entry = _computations(text)
  known: dict[str, Exchange] = {}

  def visit(name: str) -> Exchange:
    if name not in known:
      total = Exchange()
      for line in bodies.get(name, ()):
        total = total.plus(*instruction(line))
      known[name] = total
    return known[name]

  def instruction(line: str) -> tuple[Exchange, int]:
    match = _INSTRUCTION.match(line)
    if not match:
      return Exchange(), 1
    result, kind = match.groups()
    if kind.removesuffix('-start') in kinds:
      return _result(result, seeds), 1
    branches = _BRANCHES.search(line)
    names = _CALLED.findall(line)
    if kind == 'conditional':
      listed = branches[1].split(',') if branches else names
      each = [visit(one.strip().lstrip('%')) for one in listed]
      return max(each, key=lambda x: x.bytes), 1
    if kind not in ('while', 'call', 'fusion', 'async-start'):
      return Exchange(), 1  # Calls a sum of two numbers, or nothing.
    inner = Exchange()
    for one in names:
      inner = inner.plus(visit(one))
    if kind != 'while' or not inner.calls:
      return inner, 1
    trips = _TRIPS.search(line)
    if not trips:
      raise ValueError(f'unknown number of steps of the loop {line.strip()}')
    return inner, int(trips[1])

  return visit(entry)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  """Returns the lines of each computation, and the name of the first one."""
  bodies: dict[str, list[str]] = {}
  entry = name = ''
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      name = match[1]
      bodies[name] = []
      entry = name if line.startswith('ENTRY') else entry
    elif name:
      bodies[name].append(line)
  return bodies, entry


def _result(shapes: str, seeds: int) -> Exchange:
  parts = list(_sizes(shapes, seeds))
  return Exchange(
    sum(size for size, scalar in parts if not scalar),
    sum(scalar for _, scalar in parts),
    1,
  )


def _sizes(shapes: str, seeds: int) -> Iterator[tuple[int, bool]]:
  for kind, dims in _SHAPE.findall(shapes):
    numbers = math.prod(int(d) for d in dims.split(',') if d)
    yield _BYTES[kind] * numbers, numbers in (1, seeds)
