"""The training loop on the host: chunks, checkpoints, metrics.

`program` has the compiled part. SIGTERM ends the run after the current chunk:
see `termination`.
"""

import contextlib
import dataclasses
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from experiments.harness.app import (
  errors,
  flags,
  processes,
  progress,
  termination,
)
from experiments.harness.store import (
  checkpoints,
  files,
  identity,
  programs,
  records,
)
from experiments.harness.train import (
  compiled,
  context,
  metrics,
  placement,
  program,
  trained,
)
from experiments.harness.train.task import Measure, Task, Training


def train(
  solver: Any,
  task: Task,
  training: Training,
  measure: Measure | None = None,
) -> trained.Trained:
  """Trains all members in one compiled program; resumes after a kill.

  Like calls of `jax.jit`, calls with the same functions and shapes share their
  program. So make the functions of a method once, for instance by
  `functools.cache`, and pass numbers as `hyper` and arrays as `own` or `data`.

  Args:
    solver: a transformation that takes a batch, or a function from a `Context`
      to one, which may use `hyper`, `own`, `data`, `seed_key` and `key`: so
      environments in a solver's state differ by seed. Its step is always 0.
    task: initial params and data.
    training: length, seeds and folder.
    measure: metrics and their use; None records losses only.

  Returns:
    A `Trained`.

  Raises:
    ValueError: if arguments are inconsistent.
    OtherRunError: if the folder holds a run with other settings or data, of
      another program, or a longer one.
    SettingsError: if the processes of the run differ in their arguments.
    AllStoppedError: if all members stopped. Several members are saved at their
      last finite params, a single one at the last checkpoint. The error has the
      `Trained` of the run.
    WriteError: if the folder cannot be written.
    BusyError: if another process is using the folder.
    SystemExit: with the status `termination.EXIT_STATUS`, after a SIGTERM.
  """
  seeds = context.as_seeds(training.seeds)
  training = training._replace(seeds=seeds)
  measure = Measure() if measure is None else measure
  _check(task, training, measure)
  identified = {}
  if training.workdir is not None or jax.process_count() > 1:
    identified = _identify(task, training, measure)
    # Before data are placed, which waits for the other processes.
    length = {'train.steps': training.steps}
    processes.compare(f'runs {training.name}', identified | length)
  runner, places = _compile(solver, task, training, measure)
  if jax.process_count() > 1:
    digests, _ = runner.identify(training.layout)
    processes.compare(f'programs of {training.name}', digests)
  with contextlib.ExitStack() as stack:
    terminated = stack.enter_context(termination.deferred())
    storage = _Storage(records.Records())
    if training.workdir is not None:
      storage = _open(stack, training, identified, runner)
    recorder = metrics.Recorder(
      storage.history, runner, places, seeds, training.steps, measure
    )
    loop = _Loop(training, measure, runner, recorder, storage)
    if loop.step >= training.steps:
      _print(
        f'{training.name}: finished before, nothing is run; its result is read '
        f'from {storage.folder}. Delete that folder to run it again.'
      )
    bar = progress.Progress(training.name, training.steps, loop.step)
    stack.callback(bar.close)
    leaving, _ = _agree(terminated(), False)
    while not (leaving or loop.over()):
      loop.advance()
      last = storage.history.records[-1:]
      bar.update(loop.step, progress.describe(*last) if last else '')
      leaving, due = _agree(terminated(), loop.save_is_due())
      if due:
        loop.save()
    loop.finish()
    leaving, _ = _agree(terminated(), False)
    if leaving:
      then = 'the same command resumes from here'
      then = then if storage.writer else 'nothing is saved'
      _print(f'{training.name}: terminated after step {loop.step}; {then}.')
      termination.leave()
  return loop.result(places)


def train_methods(
  methods: Mapping[str, Any],
  task: Task,
  options: flags.Options,
  measure: Measure | None = None,
) -> dict[str, trained.Trained]:
  """Trains several methods on one task, each in a subfolder of its name.

  Args:
    methods: solvers by name; see `train`.
    task: initial params and data.
    options: the options of a binary; see `Training.from_options`.
    measure: metrics and their use.

  Returns:
    The runs by name, for `Report.from_runs`.
  """
  return {
    name: train(
      solver, task, Training.from_options(options, name=name), measure
    )
    for name, solver in methods.items()
  }


class _Storage(NamedTuple):
  """The files of a run; without a folder, only its history.

  Attributes:
    history: the records so far.
    folder: folder of the run.
    writer: its checkpoints.
    restored: the checkpoint from which the run resumes.
  """

  history: records.Records
  folder: pathlib.Path | None = None
  writer: checkpoints.Checkpoints | None = None
  restored: checkpoints.Restored | None = None


class _Loop:
  """The carry, the step and the stopped members of a run."""

  def __init__(
    self,
    training: Training,
    measure: Measure,
    runner: compiled.Compiled,
    recorder: metrics.Recorder,
    storage: _Storage,
  ):
    self._training, self._measure = training, measure
    self._runner, self._recorder, self._storage = runner, recorder, storage
    if storage.restored is not None:
      self._carry = runner.restore(storage.restored)
    else:
      self._carry = runner.init()
      if measure.record_start:
        carry, values = runner.advance(self._carry, 0)
        self._carry = recorder.add(carry, values, -1)
    self.step = int(self._carry.step)
    self._stops = recorder.stops(self._carry)
    self._saved_at, self._saved_step = -float('inf'), self.step

  def over(self) -> bool:
    """Whether the run ends here."""
    if self.step >= self._training.steps or self._all_stopped():
      return True
    stop_when, history = self._measure.stop_when, self._recorder.history
    if stop_when is None or not history.records:
      return False
    return bool(stop_when(history.history()[1]))

  def advance(self) -> None:
    """Runs and records a chunk, and warns of members that stopped in it."""
    before, training = self.step, self._training
    # Keeps records at multiples of the chunk.
    length = min(
      training.chunk - before % training.chunk, training.steps - before
    )
    carry, values = self._runner.advance(self._carry, length)
    self.step = int(carry.step)
    self._carry = self._recorder.add(carry, values, before)
    known, self._stops = self._stops, self._recorder.stops(self._carry)
    new = [stop for stop in self._stops if stop not in known]
    alone = len(training.seeds) == 1
    trained.warn_stopped(training.name, new, alone=alone)

  def save_is_due(self) -> bool:
    """Whether it is time for a checkpoint."""
    seconds, writer = self._training.save_seconds, self._storage.writer
    due = time.monotonic() - self._saved_at >= seconds
    # Saves later instead of waiting for a slow disk.
    return due and not (writer and seconds and writer.busy)

  def save(self) -> None:
    """Saves a checkpoint if there is a folder and params are finite."""
    if self._storage.writer and not self._lost():
      extra = self._runner.seconds()
      extra |= {'records': len(self._recorder.history.records)}
      self._storage.writer.save(self.step, self._carry, extra)
      self._saved_at, self._saved_step = time.monotonic(), self.step

  def finish(self) -> None:
    """Saves the last step, and waits until everything is on disk."""
    if self._storage.writer:
      if self.step != self._saved_step:
        self.save()
      self._storage.writer.wait()

  def result(self, places: placement.Placement) -> trained.Trained:
    """Returns the result; raises AllStoppedError if all members stopped."""
    steps, history = self._recorder.history.history()
    carry = self._carry
    result = trained.Trained(
      params=places.local(carry.params),
      state=places.local(carry.state),
      best=places.local(carry.best),
      step=self.step,
      steps=steps,
      history=history,
      stopped=self._stops,
      **self._runner.seconds(),
    )
    if self._all_stopped():
      where, folder = '', self._storage.folder
      if folder and not self._lost():
        where = f' The last finite ones are in {folder}.'
      elif folder and self._saved_step:
        where = f' The checkpoint of step {self._saved_step} is in {folder}.'
      raise trained.all_stopped(self._training.name, result, where)
    return result

  def _all_stopped(self):
    return len(self._stops) == len(self._training.seeds)

  def _lost(self):
    """Whether the carry is non-finite."""
    return bool(self._stops) and not self._runner.freezes


def _check(task: Task, training: Training, measure: Measure) -> None:
  steps, chunk, every = training.steps, training.chunk, measure.host_every
  if chunk < 1 or steps < 1 or every < 1:
    raise ValueError(
      f'steps={steps}, chunk={chunk} and host_every={every} must be at least 1.'
    )
  count = len(training.seeds)
  for name, tree in (('own', task.own), ('hyper', task.hyper)):
    for path, leaf in jax.tree.leaves_with_path(tree):
      shape = np.shape(leaf)
      if not shape or shape[0] != count:
        raise ValueError(
          f'{name}{jax.tree_util.keystr(path)} needs a leading axis of '
          f'{count}, one entry for each seed, got shape {shape}.'
        )


def _compile(
  solver: Any, task: Task, training: Training, measure: Measure
) -> tuple[compiled.Compiled, placement.Placement]:
  """Returns the program of a run with its inputs, and their placement."""
  functions = program.make_program(
    solver,
    task.init,
    task.batch,
    measure.evaluate,
    count=len(training.seeds),
    select=measure.select is not None,
    at_once=training.at_once,
  )
  data, places = placement.place(
    task.data,
    task.shard,
    layout=training.layout,
    batch_sizes=() if task.stream is None else task.stream.batch_sizes,
  )
  seeds = jnp.asarray(training.seeds, jnp.uint32)
  members = context.Members(seeds, task.own, task.hyper)
  shared = context.Shared(data, places.frozen(task.frozen))
  runner = compiled.Compiled(
    functions, places.replicate(members), shared, places, task.stream
  )
  return runner, places


def _open(
  stack: contextlib.ExitStack,
  training: Training,
  identified: dict[str, Any],
  runner: compiled.Compiled,
) -> _Storage:
  """Opens the folder of a run, and checks that it belongs to this run."""
  folder = files.make_folder(pathlib.Path(training.workdir) / training.name)
  if files.is_writer():
    stack.enter_context(files.locked(folder))
  checkpoints.check_settings(folder / 'settings.json', identified)
  programs.check_program(
    folder / 'program.json', *runner.identify(training.layout)
  )
  writer = checkpoints.Checkpoints(folder / 'checkpoints')
  stack.callback(writer.close)
  restored = writer.restore(runner.shapes)
  since, count = -1, None
  if restored is not None:
    since, count = restored.step, restored.extra.get('records')
  if since > training.steps:
    raise errors.OtherRunError(
      f'{folder} holds a run of {since} steps, more than '
      f'steps={training.steps}. Give at least as many, or another --workdir.'
    )
  if files.is_writer():
    history = records.MetricsWriter(folder, step=since, count=count)
    stack.callback(history.close)
  else:
    path = folder / 'metrics.jsonl'
    history = records.Records(records.read_records(path, until=since))
  return _Storage(history, folder, writer, restored)


def _identify(
  task: Task, training: Training, measure: Measure
) -> dict[str, Any]:
  """Returns what identifies a run: its settings, and digests of its data."""
  settings = training.settings or {}
  if dataclasses.is_dataclass(settings):
    settings = dataclasses.asdict(settings)
  identified: dict[str, Any] = dict(settings) | {
    'train.chunk': training.chunk,
    'train.seeds': list(training.seeds),
    'train.select': measure.select,
  }
  if task.stream is not None:
    identified['train.stream'] = task.stream.description()
    if task.stream.files:
      # Without a folder, nothing caches the digests.
      folder = training.workdir and files.make_folder(training.workdir)
      identified |= identity.digest_files(
        'train.files', task.stream.files, folder
      )
  for kind in ('data', 'frozen', 'own', 'hyper'):
    identified |= identity.digests(f'train.{kind}', getattr(task, kind))
  return identified


def _agree(terminated: bool, due: bool) -> tuple[bool, bool]:
  """Makes processes with different clocks and signals agree."""
  if jax.process_count() == 1:
    return terminated, due
  votes = multihost_utils.process_allgather(np.array([terminated, due]))
  return bool(votes[:, 0].any()), bool(votes[0, 1])


def _print(message: str) -> None:
  print(message, file=sys.stderr, flush=True)
