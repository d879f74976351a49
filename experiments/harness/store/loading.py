"""What a run has saved, read without its program."""

import itertools
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from experiments.harness.app import errors, quiet
from experiments.harness.store import files
from experiments.harness.store import leaves as leaves_lib


class Best(NamedTuple):
  """The best params so far by the selecting metric, for every member.

  Attributes:
    params: params; leaves have a leading axis of members.
    step: when they were measured, int32 (members,).
    score: the metric then, (members,); -inf before the first finite one.
  """

  params: Any
  step: chex.Array
  score: chex.Array


class Loaded(NamedTuple):
  """What a run has learnt.

  Attributes:
    params: the newest saved params; leaves have a leading axis of members.
    best: a `Best`, or () where no metric selects.
    settings: by name, with the arguments of `train` as `train.<name>`.
    step: steps taken.
    state: the solver's state, likewise; () unless it was asked for.
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
  """Reads the params of a run that is finished, interrupted or under way.

  Nothing is changed in the folder.

  Args:
    workdir: of the run, as `train` had it.
    name: likewise.
    like: a pytree of the structure of the params, such as what `init` returned;
      its leaves, if they have a shape, are those of one member. None gives
      dicts in dicts, with the names of fields, and numbers in sequences.
    state: a pytree like the solver's state, `solver.init(params)` or its shapes
      by `jax.eval_shape`: that is read too, for what `bj.outputs` has of it,
      the statistics of a BatchNorm for instance. None leaves it out.

  Returns:
    A `Loaded`. Warns of a damaged checkpoint and reads the one before.

  Raises:
    MissingDataError: if nothing is saved there.
    OtherRunError: if params or state have another structure than asked for.
  """
  run = pathlib.Path(workdir) / name
  folder = run / 'checkpoints'
  steps = saved_steps(folder)
  parts = ('params', 'best', *(() if state is None else ('state',)))
  silence = quiet.Quiet()
  silence.start()
  try:
    for step, checkpoint in steps.items():
      try:
        about = read_about(checkpoint)
        wanted = {
          stored: leaf
          for stored, leaf in about.leaves.items()
          if leaf.path[0] in parts
        }
        leaves = read_leaves(checkpoint, wanted)
      except Exception as error:  # Whatever a damaged file makes orbax raise.
        what = f'{damage(step, error)}: reading the one before'
        warnings.warn(what, RuntimeWarning, stacklevel=2)
        continue
      found = [(leaf.path, leaves[stored]) for stored, leaf in wanted.items()]
      best = ()
      if _below(found, 'best'):
        best = Best(
          params=_shaped(_below(found, 'best', 'params'), like, run),
          step=jnp.asarray(_below(found, 'best', 'step')[0][1]),
          score=jnp.asarray(_below(found, 'best', 'score')[0][1]),
        )
      params = _shaped(_below(found, 'params'), like, run)
      kept = (
        ()
        if state is None
        else _shaped(_below(found, 'state'), state, run, 'state')
      )
      return Loaded(params, best, _settings(run), step, kept)
  finally:
    silence.stop()
  raise errors.MissingDataError(
    f'no checkpoint of a run {name!r} can be read in {workdir}'
    f'{_instead(pathlib.Path(workdir))}.'
  )


def _instead(workdir: pathlib.Path) -> str:
  """What can be read where something else was asked for, for a message."""
  if (workdir / 'checkpoints').is_dir():
    said = f'it is the folder of a run itself: ask for name={workdir.name!r}'
    return f'; {said} in {workdir.parent}'
  # A name may have several parts, as those of a comparison's tuning runs have.
  found = [path.parent for path in workdir.glob('**/checkpoints')]
  known = sorted(path.relative_to(workdir).as_posix() for path in found)
  return f'; there are {", ".join(known)}' if known else ': train there first'


def _below(found, *names):
  """Leaves whose path begins by names, with the rest of it."""
  count = len(names)
  return [(p[count:], x) for p, x in found if tuple(p[:count]) == names]


def _shaped(found, like, run, what='params'):
  if like is None:
    return leaves_lib.nested([(path, jnp.asarray(x)) for path, x in found])
  here = zip(leaves_lib.paths(like), jax.tree.leaves(like), strict=True)
  pairs = itertools.zip_longest(here, found, fillvalue=(None, None))
  for (path, leaf), (stored, array) in pairs:
    shape = getattr(leaf, 'shape', None)
    if shape is not None:
      shape = leaves_lib.empty(leaf).shape  # Of a key, that of its data.
    if path != stored or shape not in (None, array.shape[1:]):
      there = _said(stored, None if array is None else array.shape[1:])
      raise errors.OtherRunError(
        f'{what} in {run} are others than asked for: {there} there, '
        f'{_said(path, shape)} here.'
      )
  fresh = [
    leaves_lib.from_numpy(array, leaf) if hasattr(leaf, 'dtype') else array
    for (_, array), leaf in zip(found, jax.tree.leaves(like), strict=True)
  ]
  return jax.tree.unflatten(jax.tree.structure(like), fresh)


def _said(path, shape):
  if path is None:
    return 'nothing'
  return '.'.join(map(str, path)) + ('' if shape is None else str(list(shape)))


def _settings(run: pathlib.Path) -> dict[str, Any]:
  try:
    return files.unseal((run / 'settings.json').read_bytes())
  except (OSError, ValueError) as error:
    what = f'the settings in {run} cannot be read ({error}): none are given'
    warnings.warn(what, RuntimeWarning, stacklevel=3)
    return {}


class Leaf(NamedTuple):
  """What is known of a stored leaf without reading it.

  Attributes:
    kind: its dtype and shape.
    digest: of its bytes.
    path: names, and numbers in sequences, that lead to it.
  """

  kind: str
  digest: str
  path: leaves_lib.Path


class About(NamedTuple):
  """What lies beside the leaves of a checkpoint.

  Attributes:
    leaves: a `Leaf` by the name under which it is stored.
    extra: the plain values saved with it.
  """

  leaves: dict[str, Leaf]
  extra: dict[str, Any]


def read_about(folder: files.Path) -> About:
  """Reads what lies beside the leaves of a checkpoint.

  Args:
    folder: of the checkpoint.

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
    folder: of the checkpoint.
    about: which of them, from its `About`.

  Returns:
    Arrays by name.

  Raises:
    Exception: whatever a damaged file makes orbax raise; ValueError if what was
      read is not what was saved.
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
  """The checkpoints in a folder by step, the newest first."""
  found = {
    int(path.name): path
    for path in pathlib.Path(folder).glob('*')
    if path.name.isdigit()  # Those under way have longer names.
  }
  return dict(sorted(found.items(), reverse=True))


def damage(step: int, error: Exception) -> str:
  """One line on a checkpoint that cannot be read."""
  reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
  return f'the checkpoint of step {step} is damaged ({reason})'
