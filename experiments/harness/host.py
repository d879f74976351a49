"""Python beside a compiled run: metrics that are no jax functions, and state.

The first of several processes decides: its metrics are recorded, and its state
is kept in the checkpoints.
"""

import base64
import pickle
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def measure(
  evaluate_host: Callable[[Any, int, Any], Mapping[str, Any]],
  params: Any,
  step: int,
  state: Any,
  *,
  count: int,
) -> dict[str, np.ndarray]:
  """Calls a function of the host on all members.

  Args:
    evaluate_host: see `train`.
    params: with a leading axis of members.
    step: steps taken.
    state: the solver's.
    count: of members.

  Returns:
    By metric, a value for each member, float64 (members,).

  Raises:
    ValueError: if a metric has another shape.
    TypeError: if there is no dict of metrics.
  """
  found = evaluate_host(params, step, state)
  if not isinstance(found, Mapping):
    raise TypeError(
      'evaluate_host returns a dict from metric to numbers, got '
      f'{type(found).__name__}.'
    )
  rows = {}
  for name in sorted(found):
    value = np.asarray(found[name], np.float64)
    if value.shape not in ((), (count,)):
      raise ValueError(
        f'metric {name!r} of evaluate_host is one number, or one for each of '
        f'{count} seeds, got shape {value.shape}.'
      )
    rows[name] = np.broadcast_to(value, (count,))
  if jax.process_count() > 1:
    # As bits: jax would round to float32.
    bits = {name: row.copy().view(np.uint32) for name, row in rows.items()}
    bits = multihost_utils.broadcast_one_to_all(bits)
    rows = {n: np.asarray(x).copy().view(np.float64) for n, x in bits.items()}
  return rows


def pack(states: Mapping[str, Any]) -> str:
  """What `states` hold now, as a text for a checkpoint."""
  held = {
    name: x.get_state() if hasattr(x, 'get_state') else x
    for name, x in states.items()
  }
  return base64.b64encode(pickle.dumps(held)).decode()


def unpack(states: MutableMapping[str, Any], text: str) -> None:
  """Puts what `pack` has made back into `states`."""
  for name, held in pickle.loads(base64.b64decode(text)).items():
    if hasattr(states.get(name), 'set_state'):
      states[name].set_state(held)
    else:
      states[name] = held
