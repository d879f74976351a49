"""Checkpoints of a run, with digests that are checked on reading.

Orbax writes them atomically in the background: the run continues as soon as the
arrays are copied. Leaves are stored under their paths, with digests of their
bytes. A checkpoint damaged by a full disk or a crash is moved away with a
warning, and the previous one is used.
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
  """Writes the description of a checkpoint in a thread."""

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
  """The content of a checkpoint.

  Attributes:
    tree: the pytree, of new arrays that may be donated.
    step: its step.
    extra: plain values saved with it.
  """

  tree: Any
  step: int
  extra: dict[str, Any]


class Checkpoints:
  """The checkpoints of a run in a folder.

  Processes that share the folder make the same calls in the same order; the
  first one writes.

  Args:
    folder: created if missing.
    keep: number of checkpoints to keep, the newest.
  """

  def __init__(self, folder: files.Path, *, keep: int = 2):
    self._folder = files.make_folder(folder)
    self._silence = contextlib.ExitStack()
    self._pending: list[Any] = []
    with files.writing(self._folder):
      self._manager = ocp.CheckpointManager(
        self._folder,
        item_handlers={
          'leaves': self._record_writes(ocp.StandardCheckpointHandler()),
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
    self._silence.enter_context(quiet.silenced())

  @property
  def busy(self) -> bool:
    """Whether a checkpoint is still being written."""
    return self._manager.is_saving_in_progress()

  def save(self, step: int, tree: Any, extra: Mapping[str, Any]) -> None:
    """Copies a pytree of arrays, and writes the copy in the background.

    Waits for the previous checkpoint first, if `busy`. The arrays may be
    donated as soon as this returns.

    Args:
      step: step of the checkpoint, above all earlier ones.
      tree: a pytree of arrays and typed PRNG keys.
      extra: plain JSON values to save with it.

    Raises:
      WriteError: if this or the previous checkpoint cannot be written.
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
    # Orbax refuses empty arrays; their description suffices.
    stored = {name: x for name, x in leaves.items() if x.size}
    items = ocp.args.Composite(
      leaves=ocp.args.StandardSave(stored), about=_AboutSave(about)
    )
    with self._writing():
      self._manager.save(step, args=items)

  def wait(self) -> None:
    """Waits until everything is on disk.

    Raises:
      WriteError: if a checkpoint cannot be written.
    """
    with self._writing():
      self._manager.wait_until_finished()
      self._manager.check_for_errors()

  def _record_writes(self, handler: ocp.StandardCheckpointHandler) -> Any:
    """Makes a handler record its writes, which orbax forgets after an error."""
    save = handler.async_save

    async def async_save(*args, **kwargs):
      self._pending = list(await save(*args, **kwargs) or ())
      return self._pending

    handler.async_save = async_save
    return handler

  def _settle(self) -> None:
    """Waits for writes that go on after an error.

    They would write into the folder while the next attempt clears it.
    """
    for write in self._pending:
      with contextlib.suppress(Exception):
        write.result()
    time.sleep(0.3)

  @contextlib.contextmanager
  def _writing(self):
    with files.writing(self._folder):
      try:
        yield
      except OSError:
        self._settle()
        raise
      except ValueError as error:
        self._settle()
        # Tensorstore reports a full disk as a ValueError.
        match = re.search(r"os_error_code='(\d+)'", str(error))
        if match is None:
          raise
        number = int(match[1])
        raise OSError(number, os.strerror(number)) from error

  def restore(self, like: Any) -> Restored | None:
    """Reads the newest undamaged checkpoint.

    Args:
      like: a pytree of arrays or `jax.ShapeDtypeStruct` with the structure of
        the saved one; restored arrays get the shardings of the latter.

    Returns:
      The checkpoint, or None. Warns of each damaged checkpoint and moves it to
      the folder `damaged`.

    Raises:
      OtherRunError: if an undamaged checkpoint has another structure.
    """
    for path in loading.misnamed(self._folder):
      what = f'{path} is no checkpoint: its name is no step in plain digits'
      files.put_aside(path, what, self._folder.parent)
      self._manager.reload()
    steps = loading.saved_steps(self._folder)
    for step, folder in steps.items():
      try:
        about = loading.read_about(folder)
        self._check_structure(about.leaves, like)
        leaves = loading.read_leaves(folder, about.leaves)
      except errors.OtherRunError:
        raise
      except Exception as error:  # A damaged file makes orbax raise anything.
        self._put_aside(step, folder, error)
        continue
      fresh = [
        leaves_lib.from_numpy(leaves[name], leaf)
        for name, leaf in leaves_lib.named(like)
      ]
      tree = jax.tree.unflatten(jax.tree.structure(like), fresh)
      return Restored(tree, step, about.extra)
    if steps:
      what = f'no good checkpoint is left in {self._folder}: starting at step 0'
      records = self._folder.parent / 'metrics.jsonl'
      if records.exists():
        files.put_aside(records, f'{what}, without records', records.parent)
      else:
        warnings.warn(f'{what}.', RuntimeWarning, stacklevel=2)
    return None

  def close(self) -> None:
    """Waits until everything is on disk, and releases orbax.

    Raises:
      WriteError: if a checkpoint cannot be written.
    """
    with self._silence, self._writing():
      self._manager.close()

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
    time.sleep(0.3)  # Lets pending reads fail.
    what = f'{loading.damage(step, error)}: resuming from the previous one'
    files.put_aside(folder, what, self._folder.parent)
    self._manager.reload()


def check_settings(path: files.Path, settings: Mapping[str, Any]) -> None:
  """Writes the settings of a run, or compares them with the written ones.

  Args:
    path: the JSON file; written if missing. A damaged one is moved away with a
      warning.
    settings: plain JSON values by name.

  Raises:
    OtherRunError: if the settings differ; names each difference.
    WriteError: if the file cannot be written.
  """
  text = files.seal(settings, indent=2, sort_keys=True) + '\n'
  path = pathlib.Path(path)
  old = files.read_sealed(path, 'taking the settings of this command')
  if old is None:
    files.write_text(path, text)
    return
  new = files.unseal(text)
  if differing := _differing(old, new):
    raise errors.OtherRunError(
      f'{path.parent} holds a run with other settings or data: '
      f'{"; ".join(differing)}. Give another --workdir, or delete this one.'
    )


# Names of what `train` digests, in words.
_DATA = {
  'train.data': 'data',
  'train.files': 'data file',
  'train.frozen': 'frozen weights',
  'train.own': 'data of each seed',
  'train.hyper': 'hyperparameters',
  'train.stream': 'streamed examples',
}


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """Describes the differences of two settings: first values, then data."""
  values, data = [], []
  old, new = _flat(old), _flat(new)
  for name in sorted({*old, *new}):
    before, now = old.get(name, 'absent'), new.get(name, 'absent')
    if before == now:
      continue
    if _is_digest(before) or _is_digest(now):
      change = {'absent': 'new'}.get(before, 'changed')
      change = {'absent': 'missing'}.get(now, change)
      data.append(f'{change}: {_in_words(name)}')
    else:
      values.append(f'{name.removeprefix("train.")}: {before} -> {now}')
  return values + data


def _flat(settings: Mapping[str, Any], within: str = '') -> dict[str, Any]:
  """Returns the settings by path, without empty groups."""
  flat: dict[str, Any] = {}
  for name, value in settings.items():
    if isinstance(value, Mapping):
      flat |= _flat(value, f'{within}{name}.')
    else:
      flat[within + name] = value
  return flat


def _is_digest(value: Any) -> bool:
  return isinstance(value, str) and bool(re.fullmatch('[0-9a-f]{16}', value))


def _in_words(name: str) -> str:
  """Returns "data rows/0/x" for `train.data['rows'][0]['x']`."""
  kind, part = re.fullmatch(r'(\w+(?:\.\w+)?)(.*)', name).groups()
  if kind not in _DATA:
    return name
  part = part.removesuffix('.digest')
  keys = re.findall(r"""\[(['"])(.*?)\1\]|\[(\d+)\]|(\w+)""", part)
  path = '/'.join(''.join(key[1:]) for key in keys)
  return f'{_DATA[kind]} {path}'.strip()
