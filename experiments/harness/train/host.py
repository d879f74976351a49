"""Python beside a compiled run: metrics that are no jax functions, and state.

The first of several processes decides: its metrics are recorded, and its state
is kept in the checkpoints, as JSON values and bytes of arrays: to read one runs
no code.
"""

import base64
import contextlib
import random
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from experiments.harness.app import errors
from experiments.harness.store import files


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


def pack(states: Mapping[str, Any]) -> dict[str, Any]:
  """Copies what `states` hold now into plain JSON values for a checkpoint.

  Args:
    states: see `host_state` of `train`.

  Returns:
    JSON values by name; arrays as their bytes in base64.

  Raises:
    TypeError: if a state has a value of another type; names it.
  """
  packed = {}
  for name, state in states.items():
    value = state.get_state() if hasattr(state, 'get_state') else state
    packed[name] = _encode(value, f'host_state[{name!r}]')
  return packed


def unpack(
  states: MutableMapping[str, Any], packed: Any, folder: files.Path
) -> None:
  """Puts what `pack` returned back into `states`.

  Args:
    states: as given to `pack`.
    packed: from a checkpoint; whatever it is, no code in it is run.
    folder: of the run, for messages.

  Raises:
    OtherRunError: if `pack` returned something else; says what to do.
  """
  if isinstance(packed, str):
    raise errors.OtherRunError(
      f'{folder} holds a run whose host_state an earlier version has pickled; '
      'a pickle can run any code and is not read. Finish the run with the '
      'version that began it, or start again with another --workdir.'
    )
  try:
    values = {name: _decode(value) for name, value in packed.items()}
  except Exception as error:  # Whatever crafted values raise in numpy and jax.
    reason = ' '.join(str(error).split())[:200] or type(error).__name__
    raise errors.OtherRunError(
      f'{folder} holds a run whose host_state is invalid '
      f'({reason.rstrip(".")}). Start again with another --workdir.'
    ) from error
  for name, value in values.items():
    if hasattr(states.get(name), 'set_state'):
      states[name].set_state(value)
    else:
      states[name] = value


# Types that JSON keeps as they are; of subclasses it would keep the base only.
_PLAIN = (type(None), bool, int, float, str)
_BIT_GENERATORS = {
  generator.__name__: generator
  for generator in (
    np.random.MT19937,
    np.random.PCG64,
    np.random.PCG64DXSM,
    np.random.Philox,
    np.random.SFC64,
  )
}


def _encode(value: Any, where: str) -> Any:
  """Encodes a value as plain ones, lists, and {kind: content} of all others."""
  inside = lambda items: [
    _encode(item, f'{where}[{i}]') for i, item in enumerate(items)
  ]
  kind = type(value)
  if kind in _PLAIN:
    return value
  if kind is list:
    return inside(value)
  if kind is tuple:
    return {'tuple': inside(value)}
  if kind is dict:
    # Keys may be of any kind, not only strings.
    pairs = [
      [_encode(key, f'a key of {where}'), _encode(item, f'{where}[{key!r}]')]
      for key, item in value.items()
    ]
    return {'dict': pairs}
  if kind is bytes:
    return {'bytes': _base64(value)}
  if kind is random.Random:
    return {'random': _encode(value.getstate(), where)}
  if kind is np.random.Generator:
    state = value.bit_generator.state
    if state['bit_generator'] in _BIT_GENERATORS:
      return {'generator': _encode(state, where)}
  if isinstance(value, jax.Array):
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
      data = _encode(np.asarray(jax.random.key_data(value)), where)
      return {'key': [str(jax.random.key_impl(value)), data]}
    return {'jax': _encode(np.asarray(value), where)}
  is_array = kind is np.ndarray
  if (is_array or isinstance(value, np.generic)) and (
    dtype := _describe(value.dtype)
  ):
    content = [dtype, list(value.shape), _base64(value.tobytes())]
    return {'array' if is_array else 'scalar': content}
  raise TypeError(
    f'{where} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint '
    'cannot hold: it holds numbers, texts, bytes, arrays, random generators, '
    'and lists, tuples and dicts of these. Give an object get_state() and '
    'set_state() that turn it into such values and back.'
  )


def _decode(value: Any) -> Any:
  """Inverts `_encode`; other values raise exceptions of any type."""
  if type(value) in _PLAIN:
    return value
  if isinstance(value, list):
    return [_decode(item) for item in value]
  ((kind, content),) = value.items()
  match kind:
    case 'tuple':
      return tuple(_decode(item) for item in content)
    case 'dict':
      return {_decode(key): _decode(item) for key, item in content}
    case 'bytes':
      return base64.b64decode(content)
    case 'random':
      generator = random.Random()
      generator.setstate(_decode(content))
      return generator
    case 'generator':
      state = _decode(content)
      bits = _BIT_GENERATORS[state['bit_generator']]()
      bits.state = state
      return np.random.Generator(bits)
    case 'key':
      implementation, data = content
      return jax.random.wrap_key_data(_decode(data), impl=implementation)
    case 'jax':
      return jnp.asarray(_decode(content))
    case 'array' | 'scalar':
      dtype, shape, data = content
      flat = np.frombuffer(base64.b64decode(data), jnp.dtype(dtype))
      array = flat.reshape(shape).copy()
      return array if kind == 'array' else array[()]
  raise ValueError(f'there is no kind {kind!r}')


def _describe(dtype: np.dtype) -> str | None:
  """Returns the name of a dtype; None for Python objects and records."""
  for text in (dtype.str, dtype.name):
    with contextlib.suppress(TypeError):
      if not dtype.hasobject and jnp.dtype(text) == dtype:
        return text
  return None


def _base64(content: bytes) -> str:
  return base64.b64encode(content).decode()
