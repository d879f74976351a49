"""Checkpoints of a whole run, checked when they are read.

Orbax writes them atomically, in the background: the run goes on as soon as what
it saves is copied. The leaves of the carry are stored under their
paths, beside digests of their bytes: a checkpoint that a full disk or a crash
has damaged is put aside with a warning, and the one before it is used.
"""

import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
import re
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from experiments.harness.app import errors, quiet
from experiments.harness.store import files, loading
from experiments.harness.store import leaves as leaves_lib


class _AboutHandler(ocp.AsyncCheckpointHandler):
  """Writes what `about` makes, which may take long, beside the leaves."""

  def __init__(self):
    self._thread = concurrent.futures.ThreadPoolExecutor(1)

  async def async_save(self, directory, args):
    return [self._thread.submit(self.save, directory, args)]

  def save(self, directory, args):
    if files.is_writer():
      content = files.seal(args.about())
      (pathlib.Path(directory) / 'metadata').write_text(content)

  def restore(self, directory, args):
    raise NotImplementedError  # `loading.read_about` needs no orbax.

  def close(self):
    self._thread.shutdown()


@ocp.args.register_with_handler(_AboutHandler, for_save=True)
@dataclasses.dataclass
class _AboutSave(ocp.args.CheckpointArgs):
  about: Callable[[], dict[str, Any]]


@ocp.args.register_with_handler(_AboutHandler, for_restore=True)
@dataclasses.dataclass
class _AboutRestore(ocp.args.CheckpointArgs):
  pass  # Orbax asks for one.


class Restored(NamedTuple):
  """What a checkpoint held.

  Attributes:
    tree: the saved pytree, as fresh arrays that may be donated.
    step: its step.
    extra: the plain values saved with it.
  """

  tree: Any
  step: int
  extra: dict[str, Any]


class Checkpoints:
  """The checkpoints of one run, in one folder.

  Several processes that share the folder make the same calls in the same order;
  the first one writes.

  Args:
    folder: where; made if missing.
    keep: how many of the newest to keep.
  """

  def __init__(self, folder: files.Path, *, keep: int = 2):
    self._folder = files.make_folder(folder)
    self._quiet = quiet.Quiet()
    with files.writing(self._folder):
      self._manager = ocp.CheckpointManager(
        self._folder,
        item_handlers={
          'leaves': ocp.StandardCheckpointHandler(),
          'about': _AboutHandler(),
        },
        options=ocp.CheckpointManagerOptions(
          max_to_keep=keep,
          enable_async_checkpointing=True,
          async_options=ocp.AsyncOptions(
            create_directories_asynchronously=False
          ),
          cleanup_tmp_directories=True,
        ),
      )
    self._quiet.start()

  @property
  def busy(self) -> bool:
    """Whether a checkpoint is still being written."""
    return self._manager.is_saving_in_progress()

  def save(self, step: int, tree: Any, extra: Mapping[str, Any]) -> None:
    """Copies a pytree of arrays, and saves the copy in the background.

    Waits first for the checkpoint before, if `busy`. The arrays may be donated
    as soon as this returns.

    Args:
      step: the number of the checkpoint, above those saved before.
      tree: any pytree of arrays and typed PRNG keys.
      extra: plain JSON values to keep beside it.

    Raises:
      WriteError: if this one or the one before cannot be written; names the
        folder.
    """
    names = [name for name, _ in leaves_lib.named(tree)]
    leaves = dict(zip(names, leaves_lib.copies(tree), strict=True))
    paths, extra = leaves_lib.paths(tree), dict(extra)
    about = lambda: {
      'leaves': {
        name: loading.Leaf(leaves_lib.describe(x), leaves_lib.digest(x), path)
        for (name, x), path in zip(leaves.items(), paths, strict=True)
      },
      'extra': extra,
    }
    # Orbax refuses arrays without elements; their shape says all.
    stored = {name: x for name, x in leaves.items() if x.size}
    items = ocp.args.Composite(
      leaves=ocp.args.StandardSave(stored), about=_AboutSave(about)
    )
    with self._writing():
      self._manager.save(step, args=items)

  def wait(self) -> None:
    """Waits until all is on disk.

    Raises:
      WriteError: if it cannot be written; names the folder.
    """
    with self._writing():
      self._manager.wait_until_finished()
      self._manager.check_for_errors()

  @contextlib.contextmanager
  def _writing(self):
    with files.writing(self._folder):
      try:
        yield
      except ValueError as error:
        time.sleep(0.3)  # For what is still under way.
        # Tensorstore reports a full disk as a ValueError.
        found = re.search(r"os_error_code='(\d+)'", str(error))
        if found is None:
          raise
        number = int(found[1])
        raise OSError(number, os.strerror(number)) from error

  def restore(self, like: Any) -> Restored | None:
    """Reads the newest good checkpoint.

    Args:
      like: a pytree of arrays or `jax.ShapeDtypeStruct`, as it was saved; the
      sharding of the latter is that of what is read.

    Returns:
      What was saved; None if there is no good checkpoint. Warns for each
      checkpoint that is damaged and moves it to the folder `damaged`.

    Raises:
      OtherRunError: if a good checkpoint holds another structure than `like`.
    """
    steps = loading.saved_steps(self._folder)
    for step, folder in steps.items():
      try:
        about = loading.read_about(folder)
        self._check_structure(about.leaves, like)
        leaves = loading.read_leaves(folder, about.leaves)
      except errors.OtherRunError:
        raise
      except Exception as error:  # Whatever a damaged file makes orbax raise.
        self._put_aside(step, folder, error)
        continue
      fresh = [
        leaves_lib.from_numpy(leaves[name], leaf)
        for name, leaf in leaves_lib.named(like)
      ]
      tree = jax.tree.unflatten(jax.tree.structure(like), fresh)
      return Restored(tree, step, about.extra)
    if steps:
      warnings.warn(
        f'no good checkpoint is left in {self._folder}: starting anew.',
        RuntimeWarning,
        stacklevel=2,
      )
    return None

  def close(self) -> None:
    """Waits until all is on disk, and frees what orbax holds.

    Raises:
      WriteError: if it cannot be written; names the folder.
    """
    try:
      with self._writing():
        self._manager.close()
    finally:
      self._quiet.stop()

  def _check_structure(
    self, saved: Mapping[str, loading.Leaf], like: Any
  ) -> None:
    kind = lambda leaf: leaves_lib.describe(leaves_lib.empty(leaf))
    here = {name: kind(leaf) for name, leaf in leaves_lib.named(like)}
    there = {name: leaf.kind for name, leaf in saved.items()}
    if there == here:
      return
    name = next(n for n in (*here, *there) if here.get(n) != there.get(n))
    raise errors.OtherRunError(
      f'the checkpoints in {self._folder} are of another program: {name} is '
      f'{there.get(name, "absent")} there and {here.get(name, "absent")} '
      'here. Give another --workdir, or delete this one.'
    )

  def _put_aside(
    self, step: int, folder: pathlib.Path, error: Exception
  ) -> None:
    time.sleep(0.3)  # For what is still under way.
    what = f'{loading.damage(step, error)}: going on from the one before'
    files.put_aside(folder, what, self._folder.parent)
    self._manager.reload()


def check_settings(path: files.Path, settings: Mapping[str, Any]) -> None:
  """Keeps the settings of a run, and refuses others in the same place.

  Args:
    path: the JSON file that holds them; written if missing. A damaged one is
      put aside with a warning.
    settings: plain JSON values by name.

  Raises:
    OtherRunError: if the file holds other settings; names each that differs.
    WriteError: if the file cannot be written.
  """
  text = files.seal(settings, indent=2, sort_keys=True) + '\n'
  path = pathlib.Path(path)
  try:
    old, new = files.unseal(path.read_bytes()), files.unseal(text)
  except (FileNotFoundError, ValueError) as error:
    if path.exists():
      what = f'{path} is damaged ({error}): taking the settings of this command'
      files.put_aside(path, what, path.parent)
    files.write_text(path, text)
    return
  if differing := _differing(old, new):
    raise errors.OtherRunError(
      f'{path.parent} holds a run with other settings '
      f'({"; ".join(differing)}). Give another --workdir, or delete this one.'
    )


def _differing(
  old: Mapping[str, Any], new: Mapping[str, Any], within: str = ''
) -> list[str]:
  """What two settings differ in, in words; of nested ones, their parts."""
  said = []
  for name in sorted({*old, *new}):
    pair = old.get(name, 'absent'), new.get(name, 'absent')
    if pair[0] == pair[1]:
      continue
    if all(isinstance(value, Mapping) for value in pair):
      said += _differing(*pair, f'{within}{name}.')
    else:
      said.append(f'{within}{name}: {pair[0]} -> {pair[1]}')
  return said
