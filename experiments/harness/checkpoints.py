"""Checkpoints of a whole run, checked when they are read.

Orbax writes them atomically, in the background: the run goes on as soon as what
it saves is copied. The leaves of the carry are stored under their
paths, beside a digest of their bytes: a checkpoint that a full disk or a crash
has damaged is put aside with a warning, and the one before it is used.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from experiments.harness import errors, files


class _Quiet:
  """Leaves an error of orbax to its one message, from `start` to `stop`.

  Otherwise its log repeats it, its threads print their tracebacks, and reads or
  writes that are under way when one fails complain about a closed event loop.
  """

  def start(self) -> None:
    """Begins to be quiet."""
    logging.getLogger('absl').addFilter(_not_of_orbax)
    self._before = threading.excepthook, sys.unraisablehook
    in_thread, unraisable = self._before

    def in_other_thread(arguments):
      if not type(arguments.thread).__module__.startswith('orbax.'):
        in_thread(arguments)

    def other_unraisable(arguments):
      if str(arguments.exc_value) != 'Event loop is closed':
        unraisable(arguments)

    threading.excepthook = in_other_thread
    sys.unraisablehook = other_unraisable

  def stop(self) -> None:
    """Puts back what was."""
    logging.getLogger('absl').removeFilter(_not_of_orbax)
    threading.excepthook, sys.unraisablehook = self._before


def _not_of_orbax(record: logging.LogRecord) -> bool:
  return 'orbax' not in pathlib.Path(record.pathname).parts


class _AboutHandler(ocp.AsyncCheckpointHandler):
  """Writes what `about` makes, which may take long, beside the leaves."""

  def __init__(self):
    self._thread = concurrent.futures.ThreadPoolExecutor(1)

  async def async_save(self, directory, args):
    return [self._thread.submit(self.save, directory, args)]

  def save(self, directory, args):
    if files.is_writer():
      content = json.dumps(args.about())
      (pathlib.Path(directory) / 'metadata').write_text(content)

  def restore(self, directory, args):
    del args
    return json.loads((pathlib.Path(directory) / 'metadata').read_text())

  def close(self):
    self._thread.shutdown()


@ocp.args.register_with_handler(_AboutHandler, for_save=True)
@dataclasses.dataclass
class _AboutSave(ocp.args.CheckpointArgs):
  about: Callable[[], dict[str, Any]]


@ocp.args.register_with_handler(_AboutHandler, for_restore=True)
@dataclasses.dataclass
class _AboutRestore(ocp.args.CheckpointArgs):
  pass


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
    self._quiet = _Quiet()
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
    leaves = dict(zip(map(_first, _named(tree)), _copies(tree), strict=True))
    extra = dict(extra)
    about = lambda: {
      'digest': _digest(leaves),
      'leaves': {n: _describe(x) for n, x in leaves.items()},
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
    steps = sorted(self._manager.all_steps(), reverse=True)
    for step in steps:
      try:
        about = self._read(step, about=_AboutRestore())['about']
        expected, extra = about['digest'], about['extra']
        described = dict(about['leaves'])
      except Exception as error:  # Whatever a damaged file makes orbax raise.
        self._put_aside(step, error)
        continue
      self._check_structure(described, like)
      try:
        named = [(name, _empty(leaf)) for name, leaf in _named(like)]
        stored = {name: x for name, x in named if x.size}
        read = self._read(step, leaves=ocp.args.StandardRestore(stored))
        leaves = {name: read['leaves'].get(name, x) for name, x in named}
        if _digest(leaves) != expected:
          raise ValueError('its content does not match its digest')
      except Exception as error:
        self._put_aside(step, error)
        continue
      fresh = [_from_numpy(leaves[name], leaf) for name, leaf in _named(like)]
      tree = jax.tree.unflatten(jax.tree.structure(like), fresh)
      return Restored(tree, step, extra)
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

  def _read(self, step: int, **items: Any) -> Any:
    try:
      return self._manager.restore(step, args=ocp.args.Composite(**items))
    except Exception:
      time.sleep(0.3)  # For what is still under way.
      raise

  def _check_structure(self, saved: dict[str, Any], like: Any) -> None:
    running = {name: _describe(_empty(leaf)) for name, leaf in _named(like)}
    if saved == running:
      return
    name = next(n for n in (*running, *saved) if running.get(n) != saved.get(n))
    raise errors.OtherRunError(
      f'the checkpoints in {self._folder} are of another program: {name} is '
      f'{saved.get(name, "absent")} there and {running.get(name, "absent")} '
      'here. Give another --workdir, or delete this one.'
    )

  def _put_aside(self, step: int, error: Exception) -> None:
    folder = files.make_folder(self._folder.parent / 'damaged')
    if files.is_writer():
      source = next(
        path
        for path in self._folder.iterdir()
        if path.name.isdigit() and int(path.name) == step
      )
      target = folder / source.name
      while target.exists():
        target = target.with_name(target.name + '_')
      source.rename(target)
    self._manager.reload()
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    warnings.warn(
      f'the checkpoint of step {step} is damaged ({reason}): moved to '
      f'{folder}, going on from the one before.',
      RuntimeWarning,
      stacklevel=3,
    )


def check_settings(path: files.Path, settings: Mapping[str, Any]) -> None:
  """Keeps the settings of a run, and refuses others in the same place.

  Args:
    path: the JSON file that holds them; written if missing.
    settings: plain JSON values by name.

  Raises:
    OtherRunError: if the file holds other settings; names each that differs.
    WriteError: if the file cannot be written.
  """
  text = json.dumps(dict(settings), indent=2, sort_keys=True)
  path = pathlib.Path(path)
  if not path.exists():
    files.write_text(path, text + '\n')
    return
  old, new = json.loads(path.read_text(encoding='utf-8')), json.loads(text)
  differing = [
    f'{name}: {old.get(name, "absent")} -> {new.get(name, "absent")}'
    for name in sorted({*old, *new})
    if old.get(name, files) != new.get(name, files)
  ]
  if differing:
    raise errors.OtherRunError(
      f'{path.parent} holds a run with other settings '
      f'({"; ".join(differing)}). Give another --workdir, or delete this one.'
    )


def _named(tree: Any) -> list[tuple[str, Any]]:
  """Leaves with their paths; a number keeps equal paths apart, and in order."""
  flat, _ = jax.tree.flatten_with_path(tree)
  return [
    (f'{i:04d}.{jax.tree_util.keystr(path, simple=True, separator=".")}', leaf)
    for i, (path, leaf) in enumerate(flat)
  ]


def _is_key(leaf: Any) -> bool:
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _first(pair: tuple[str, Any]) -> str:
  return pair[0]


def _copies(tree: Any) -> list[np.ndarray]:
  """The leaves as arrays of the host that share no buffer with them."""
  plain = [
    jax.random.key_data(leaf) if _is_key(leaf) else leaf
    for leaf in jax.tree.leaves(tree)
  ]
  # What other processes hold a part of is gathered, whole, in each of them.
  here = [
    leaf
    if not isinstance(leaf, jax.Array)
    or leaf.is_fully_addressable
    or leaf.is_fully_replicated
    else multihost_utils.process_allgather(leaf, tiled=True)
    for leaf in plain
  ]
  # Of an array of the CPU, numpy gets a view, which a donation would break.
  return [np.array(leaf, copy=True) for leaf in jax.device_get(here)]


def _empty(leaf: Any) -> np.ndarray:
  if _is_key(leaf):
    leaf = jax.eval_shape(jax.random.key_data, leaf)
  return np.zeros(leaf.shape, leaf.dtype)


def _from_numpy(array: np.ndarray, like: Any) -> jax.Array:
  # A copy, which may be donated: jax may otherwise share numpy's buffer.
  copy = lambda index: jnp.array(array[index], copy=True)
  where = getattr(like, 'sharding', None)
  if isinstance(like, jax.ShapeDtypeStruct) and where is not None:
    # In parts: no device may be able to hold the whole.
    array = jax.make_array_from_callback(array.shape, where, copy)
  else:
    array = copy(...)
  if not _is_key(like):
    return array
  # `like` may be a mere shape: only a traced one tells the implementation.
  found = []
  jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), like)
  return jax.random.wrap_key_data(array, impl=found[0])


def _describe(array: np.ndarray) -> str:
  return f'{array.dtype}{list(array.shape)}'


def _digest(leaves: Mapping[str, np.ndarray]) -> str:
  digest = hashlib.blake2b(digest_size=16)
  for name, array in leaves.items():
    digest.update(f'{name}:{_describe(array)}'.encode())
    digest.update(np.ascontiguousarray(array).tobytes())
  return digest.hexdigest()
