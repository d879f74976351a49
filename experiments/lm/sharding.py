"""How weights and adapters lie on a mesh of devices, for `harness.Layout`.

    mesh = jax.make_mesh((4, 2), ('fsdp', 'tp'))
    layout = harness.Layout(
      mesh, sharding.specs(config, mesh), examples=('fsdp',))

Over `fsdp`, each device keeps a part of every matrix and gathers the rest when
a layer needs it; examples are split over it too. Over `tp`, the heads and the
hidden units of a layer are split, so that its products are computed in parts.
What an axis does not divide is whole along it: heads are never cut.

What is computed is the same up to rounding. Beside it, on accelerators:
`dtype=jnp.bfloat16` of `log_probs.of_model` computes in bfloat16 from float32
weights, `remat=True` keeps one layer's activations, and
`bj.evaluation.accumulate(oracle, parts)` evaluates a batch in parts (of a mean
over tokens, where all parts have as many, or as a mean of the parts' means).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments import harness
from experiments.lm.config import Config

# Of each matrix, which axis is split: 'in' is what enters, over fsdp or tp.
_OUT = ('q', 'k', 'v', 'gate', 'up')  # In parts of what leaves.
_IN = ('o', 'down')  # In parts of what enters, and summed.


def layout_of(
  config: Config, axes: str
) -> tuple[harness.Layout, NamedSharding]:
  """A layout over all devices, from words.

  Args:
    config: of the model.
    axes: 'fsdp=4,tp=2', or one of them: what they come to is the number of
      devices.

  Returns:
    The layout, and how (rows, length) lie on it.

  Raises:
    SettingsError: if the words are others, or the devices are.
  """
  sizes: dict[str, int] = {}
  for word in axes.split(','):
    name, _, size = word.strip().partition('=')
    if name not in ('fsdp', 'tp') or not size.isdigit() or int(size) < 1:
      raise harness.SettingsError(
        f'a mesh is fsdp=4,tp=2 for instance, or one of these; got {axes!r}.'
      )
    sizes[name] = int(size)
  count = len(jax.devices())
  if math.prod(sizes.values()) != count:
    raise harness.SettingsError(
      f'the mesh {axes} has {math.prod(sizes.values())} places, but there are '
      f'{count} devices.'
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
  """The rules for a model, its adapters, and what is trained of them.

  Args:
    config: of the model.
    mesh: of devices.
    fsdp: the axis over which weights are kept in parts; None for none.
    tp: the axis over which layers are computed in parts; None for none.

  Returns:
    From a pytree of arrays or shapes, at any depth of which weights have the
    names of `decoder` and `lora`, to one of `PartitionSpec`. What has another
    name is whole on each device.

  Raises:
    SettingsError: if the mesh has no such axis.
  """
  for axis in (fsdp, tp):
    if axis is not None and axis not in mesh.axis_names:
      raise harness.SettingsError(
        f'the mesh has the axes {mesh.axis_names}, and none called {axis!r}: '
        'name its axes, or give None.'
      )

  def parts(axis):
    return 1 if axis is None else mesh.shape[axis]

  heads = {'q': config.heads, 'o': config.heads}
  heads |= {'k': config.kv_heads, 'v': config.kv_heads}

  def axes_of(name):
    """The axes of the last dimensions of a weight of this name."""
    if name == 'embed':
      return tp, fsdp
    if name == 'head':
      return fsdp, tp
    base, _, kind = name.partition('.')
    if kind == '':
      base = base.removesuffix('_bias')
    # Heads stay whole.
    split = tp if heads.get(base, parts(tp)) % parts(tp) == 0 else None
    into, out = (fsdp, split) if base in _OUT else (split, fsdp)
    if base not in _OUT + _IN:
      return ()
    if name.endswith('_bias'):
      return (out,)
    return {'': (into, out), 'a': (into, None), 'b': (None, out)}[kind]

  def one(path, leaf):
    names = [getattr(k, 'key', getattr(k, 'name', None)) for k in path]
    axes = axes_of(names[-1]) if names and isinstance(names[-1], str) else ()
    if not axes or len(leaf.shape) < len(axes):
      return PartitionSpec()
    before = (None,) * (len(leaf.shape) - len(axes))
    sizes = leaf.shape[len(before) :]
    fits = [
      axis if size % parts(axis) == 0 else None
      for axis, size in zip(axes, sizes)
    ]
    return PartitionSpec(*before, *fits)

  return lambda tree: jax.tree_util.tree_map_with_path(one, tree)
