"""Parses JSON that others wrote."""

import json
from collections.abc import Sequence
from typing import Any


def parse_json(text: str) -> Any:
  """Parses JSON; raises ValueError for deep values and repeated keys."""
  try:
    return json.loads(text, object_pairs_hook=_unique)
  except RecursionError as error:
    raise ValueError('too deeply nested JSON') from error


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
  fields: dict[str, Any] = {}
  for key, value in pairs:
    if key in fields:
      raise ValueError(f'the key {key!r} occurs more than once in an object')
    fields[key] = value
  return fields
