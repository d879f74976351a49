"""Sharding of weights and adapters over a mesh, for `harness.Layout`.

    mesh = jax.make_mesh((4, 2), ('fsdp', 'tp'))
    layout = harness.Layout(
      mesh, sharding.specs(config, mesh), examples=('fsdp',))

Over `fsdp`, each device stores a part of every matrix and gathers the rest when
a layer needs it; examples are split over it too. Over `tp`, the heads and the
hidden units of a layer are split, so that its products are computed in parts.
Dimensions that an axis does not divide are replicated; heads are never split.

Results are equal up to rounding. To save more memory on accelerators:
`dtype=jnp.bfloat16` of `log_probs.from_tokens` computes in bfloat16 from
float32 weights, `remat=True` stores the activations of one layer, and
`bj.evaluation.accumulate(oracle, micro_batches)` splits a batch (a mean over
tokens becomes a mean of the means of the micro-batches).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments import harness
from experiments.lm.config import Config

_OUT = ('q', 'k', 'v', 'gate', 'up')  # Split over tp along their outputs.
_IN = ('o', 'down')  # Split over tp along their inputs, then summed.


def parse_layout(
  config: Config, axes: str
) -> tuple[harness.Layout, NamedSharding]:
  """Makes a layout over all devices from a text.

  Args:
    config: config of the model.
    axes: sizes such as 'fsdp=4,tp=2', or one of them; their product is the
      number of devices.

  Returns:
    The layout, and the sharding of (rows, length).

  Raises:
    SettingsError: if the text is invalid or does not match the devices.
  """
  sizes: dict[str, int] = {}
  for word in axes.split(','):
    name, _, size = word.strip().partition('=')
    if name not in ('fsdp', 'tp') or not size.isdigit() or int(size) < 1:
      raise harness.SettingsError(
        f'invalid mesh {axes!r}, expected for instance fsdp=4,tp=2, or one of '
        'these.'
      )
    sizes[name] = int(size)
  count = len(jax.devices())
  if math.prod(sizes.values()) != count:
    raise harness.SettingsError(
      f'the mesh {axes} needs {math.prod(sizes.values())} devices, but there '
      f'are {count}.'
    )
  mesh = jax.make_mesh(
    tuple(sizes.values()),
    tuple(sizes),
    axis_types=(jax.sharding.AxisType.Auto,) * len(sizes),
  )
  has = lambda name: name if name in sizes else None
  examples = ('fsdp',) if 'fsdp' in sizes else ()
  rules = specs(config, mesh, fsdp=has('fsdp'), tp=has('tp'))
  return (
    harness.Layout(mesh, rules, examples=examples),
    NamedSharding(mesh, PartitionSpec(has('fsdp'))),
  )


def specs(
  config: Config,
  mesh: Mesh,
  *,
  fsdp: str | None = 'fsdp',
  tp: str | None = 'tp',
) -> Callable[[Any], Any]:
  """Makes the sharding rules of a model and its adapters.

  Args:
    config: config of the model.
    mesh: mesh of devices.
    fsdp: name of the axis over which weights are stored in parts, or None.
    tp: name of the axis over which layers are computed in parts, or None.

  Returns:
    A function from a pytree of arrays or shapes to one of `PartitionSpec`.
    Weights have the names of `decoder` and `lora` at any depth; arrays with
    other names are replicated.

  Raises:
    SettingsError: if the mesh has no such axis.
  """
  for axis in (fsdp, tp):
    if axis is not None and axis not in mesh.axis_names:
      raise harness.SettingsError(
        f'the mesh has the axes {mesh.axis_names}, not {axis!r}: give one of '
        'these, or None.'
      )

  def parts(axis):
    return 1 if axis is None else mesh.shape[axis]

  heads = {'q': config.heads, 'o': config.heads}
  heads |= {'k': config.kv_heads, 'v': config.kv_heads}

  def weight_axes(name):
    """Returns the axes of the last dimensions of a weight."""
    if name == 'embed':
      return tp, fsdp
    if name == 'head':
      return fsdp, tp
    base, _, kind = name.partition('.')
    if kind == '':
      base = base.removesuffix('_bias')
    # Heads are not split.
    split = tp if heads.get(base, parts(tp)) % parts(tp) == 0 else None
    into, out = (fsdp, split) if base in _OUT else (split, fsdp)
    if base not in _OUT + _IN:
      return ()
    if name.endswith('_bias'):
      return (out,)
    return {'': (into, out), 'a': (into, None), 'b': (None, out)}[kind]

  def spec(path, leaf):
    names = [getattr(k, 'key', getattr(k, 'name', None)) for k in path]
    name = names[-1] if names else None
    axes = weight_axes(name) if isinstance(name, str) else ()
    if not axes or len(leaf.shape) < len(axes):
      return PartitionSpec()
    before = (None,) * (len(leaf.shape) - len(axes))
    sizes = leaf.shape[len(before) :]
    fits = [
      axis if size % parts(axis) == 0 else None
      for axis, size in zip(axes, sizes)
    ]
    return PartitionSpec(*before, *fits)

  return lambda tree: jax.tree_util.tree_map_with_path(spec, tree)
