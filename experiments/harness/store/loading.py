"""Reads checkpoints without the program that wrote them."""

import itertools
import pathlib
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from experiments.harness.app import errors, quiet
from experiments.harness.store import files
from experiments.harness.store import leaves as leaves_lib

_STEP = re.compile('0|[1-9][0-9]*')


class Best(NamedTuple):
  """The best params so far of each member, by the metric `select`.

  Attributes:
    params: params; leaves have a leading axis of members.
    step: step at which they were measured, int32 (members,).
    score: the metric, (members,); -inf before the first finite value.
  """

  params: Any
  step: chex.Array
  score: chex.Array


class Loaded(NamedTuple):
  """The newest checkpoint of a run.

  Attributes:
    params: params; leaves have a leading axis of members.
    best: a `Best`, or () if no metric selects.
    settings: settings by name, with arguments of `train` as `train.<name>`.
    step: steps taken.
    state: the solver's state with a leading axis of members; () unless `load`
      was asked for it.
  """

  params: Any
  best: Any
  settings: dict[str, Any]
  step: int
  state: Any = ()


def load(
  workdir: files.Path,
  *,
  name: str = 'run',
  like: Any = None,
  state: Any = None,
) -> Loaded:
  """Reads the newest checkpoint of a run, which may still be running.

  Does not change the folder.

  Args:
    workdir: `workdir` of the run.
    name: `name` of the run.
    like: a pytree with the structure of the params, such as the result of
      `init`; leaves with a shape have the shape of one member. None returns
      nested dicts, with names of fields and indices in sequences.
    state: a pytree like the solver's state, `solver.init(params)` or its shapes
      by `jax.eval_shape`, to read the state too, for example the statistics of
      a BatchNorm (`bj.outputs`). None leaves it out.

  Returns:
    A `Loaded`. Warns of a damaged checkpoint and reads the previous one.

  Raises:
    MissingDataError: if there is no checkpoint.
    OtherRunError: if params or state have another structure.
  """
  # orbax refuses relative paths.
  run = pathlib.Path(workdir).absolute() / name
  parts = ('params', 'best', *(() if state is None else ('state',)))
  for path in misnamed(run / 'checkpoints'):
    what = f'{path} is no checkpoint: its name is no step in plain digits.'
    warnings.warn(what, RuntimeWarning, stacklevel=2)
  with quiet.silenced():
    for step, checkpoint in saved_steps(run / 'checkpoints').items():
      try:
        about = read_about(checkpoint)
        wanted = {
          stored: leaf
          for stored, leaf in about.leaves.items()
          if leaf.path[0] in parts
        }
        _check_paths([leaf.path for leaf in wanted.values()])
        arrays = read_leaves(checkpoint, wanted)
      except Exception as error:  # A damaged file makes orbax raise anything.
        what = f'{damage(step, error)}: reading the previous one'
        warnings.warn(what, RuntimeWarning, stacklevel=2)
        continue
      items = [(leaf.path, arrays[stored]) for stored, leaf in wanted.items()]
      best = ()
      if _below(items, 'best'):
        best = Best(
          params=_restructure(_below(items, 'best', 'params'), like, run),
          step=jnp.asarray(_below(items, 'best', 'step')[0][1]),
          score=jnp.asarray(_below(items, 'best', 'score')[0][1]),
        )
      params = _restructure(_below(items, 'params'), like, run)
      loaded = Loaded(params, best, _settings(run), step)
      if state is None:
        return loaded
      solver_state = _restructure(_below(items, 'state'), state, run, 'state')
      return loaded._replace(state=solver_state)
  raise errors.MissingDataError(
    f'no checkpoint of a run {name!r} can be read in {workdir}'
    f'{_suggest(pathlib.Path(workdir))}.'
  )


def _suggest(workdir: pathlib.Path) -> str:
  """Suggests, for a message, which runs can be read instead."""
  if (workdir / 'checkpoints').is_dir():
    remedy = f'ask for name={workdir.name!r} in {workdir.parent}'
    return f'; it is the folder of a run itself: {remedy}'
  # A name may have several parts, like those of tuning runs.
  runs = [path.parent for path in workdir.glob('**/checkpoints')]
  known = sorted(path.relative_to(workdir).as_posix() for path in runs)
  return f'; there are {", ".join(known)}' if known else ': train there first'


def _check_paths(paths: Sequence[leaves_lib.Path]) -> None:
  """Raises ValueError if a path is invalid, or has another one below it."""
  distinct = {tuple(path) for path in paths}
  above = {path[:i] for path in distinct for i in range(len(path))}
  names = {type(name) for path in distinct for name in path}
  if not names <= {str, int} or len(distinct) < len(paths) or distinct & above:
    raise ValueError('its description has invalid paths')


def _below(items, *names):
  """Returns the leaves below a path, with the rest of their paths."""
  count = len(names)
  return [(p[count:], x) for p, x in items if tuple(p[:count]) == names]


def _restructure(items, like, run, what='params'):
  """Builds a pytree like another from leaves with their paths."""
  if like is None:
    return leaves_lib.nested([(path, jnp.asarray(x)) for path, x in items])
  here = zip(leaves_lib.paths(like), jax.tree.leaves(like), strict=True)
  pairs = itertools.zip_longest(here, items, fillvalue=(None, None))
  for (path, leaf), (stored, array) in pairs:
    shape = getattr(leaf, 'shape', None)
    if shape is not None:
      shape = leaves_lib.empty(leaf).shape  # A key has the shape of its data.
    if path != stored or shape not in (None, array.shape[1:]):
      there = _describe(stored, None if array is None else array.shape[1:])
      raise errors.OtherRunError(
        f'{what} in {run} are others than asked for: {there} there, '
        f'{_describe(path, shape)} here.'
      )
  fresh = [
    leaves_lib.from_numpy(array, leaf) if hasattr(leaf, 'dtype') else array
    for (_, array), leaf in zip(items, jax.tree.leaves(like), strict=True)
  ]
  return jax.tree.unflatten(jax.tree.structure(like), fresh)


def _describe(path, shape):
  if path is None:
    return 'nothing'
  return '.'.join(map(str, path)) + ('' if shape is None else str(list(shape)))


def _settings(run: pathlib.Path) -> dict[str, Any]:
  try:
    return files.unseal((run / 'settings.json').read_bytes())
  except (OSError, ValueError) as error:
    what = f'the settings in {run} cannot be read ({error}): returning {{}}'
    warnings.warn(what, RuntimeWarning, stacklevel=3)
    return {}


class Leaf(NamedTuple):
  """The description of a stored leaf.

  Attributes:
    kind: dtype and shape.
    digest: digest of its bytes.
    path: its path of names, and of indices in sequences.
  """

  kind: str
  digest: str
  path: leaves_lib.Path


class About(NamedTuple):
  """The description of a checkpoint.

  Attributes:
    leaves: a `Leaf` by stored name.
    extra: plain values saved with the leaves.
  """

  leaves: dict[str, Leaf]
  extra: dict[str, Any]


def read_about(folder: files.Path) -> About:
  """Reads the description of a checkpoint.

  Args:
    folder: folder of the checkpoint.

  Returns:
    An `About`.

  Raises:
    ValueError: if it is damaged.
    OSError: if it cannot be read.
  """
  path = pathlib.Path(folder) / 'about' / 'metadata'
  about = files.unseal(path.read_bytes())
  leaves = {name: Leaf(*leaf) for name, leaf in about['leaves'].items()}
  return About(leaves, about['extra'])


def read_leaves(
  folder: files.Path, about: Mapping[str, Leaf]
) -> dict[str, np.ndarray]:
  """Reads some leaves of a checkpoint.

  Args:
    folder: folder of the checkpoint.
    about: the leaves to read, from its `About`.

  Returns:
    Arrays by name.

  Raises:
    Exception: of any type, if orbax fails on a damaged file; ValueError if a
      digest differs.
  """
  shapes = {name: _shape(leaf.kind) for name, leaf in about.items()}
  leaves = {name: np.zeros(*shape) for name, shape in shapes.items()}
  stored = {name: x for name, x in leaves.items() if x.size}
  if stored:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
      args = ocp.args.PyTreeRestore(stored, partial_restore=True)
      leaves |= reader.restore(pathlib.Path(folder) / 'leaves', args=args)
  for name, leaf in leaves.items():
    if leaves_lib.digest(leaf) != about[name].digest:
      raise ValueError(f'{name} does not match its digest')
  return leaves


def _shape(kind: str) -> tuple[list[int], np.dtype]:
  name, _, sizes = kind.rstrip(']').partition('[')
  return [int(n) for n in sizes.split(',') if n], jnp.dtype(name)


def saved_steps(folder: files.Path) -> dict[int, pathlib.Path]:
  """Returns the checkpoints in a folder by step, the newest first."""
  paths = {
    int(path.name): path
    for path in pathlib.Path(folder).glob('*')
    if _STEP.fullmatch(path.name)  # Unfinished ones have longer names.
  }
  return dict(sorted(paths.items(), reverse=True))


def misnamed(folder: files.Path) -> list[pathlib.Path]:
  """Returns what looks like a checkpoint of another step than its name says.

  Python reads other digits of Unicode, and leading zeros, as numbers too.
  """
  return sorted(
    path
    for path in pathlib.Path(folder).glob('*')
    if path.name.isdigit() and not _STEP.fullmatch(path.name)
  )


def damage(step: int, error: Exception) -> str:
  """Describes a checkpoint that cannot be read, in one line."""
  reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
  return f'the checkpoint of step {step} is damaged ({reason})'
