"""Trains: compiled chunks, checkpoints, metrics, seeds that stop.

The host half of a run; `program` has what is compiled. SIGTERM ends it after
the chunk under way: see `termination`.
"""

import contextlib
import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from experiments.harness.app import errors, termination
from experiments.harness.app import progress as progress_lib
from experiments.harness.store import checkpoints, files, identity
from experiments.harness.store import records as metrics_lib
from experiments.harness.train import compiled, host, placement
from experiments.harness.train import context as context_lib
from experiments.harness.train import one_of as streams_lib
from experiments.harness.train import program as program_lib
from experiments.harness.train import recorder as recording
from experiments.harness.train import stream as stream_lib
from experiments.harness.train import trained as outcome


def train(
  solver: Any,
  init: Callable[[context_lib.Context], Any],
  batch: Callable[[context_lib.Context], Any] | None = None,
  *,
  steps: int,
  chunk: int,
  seeds: int | Sequence[int],
  workdir: files.Path | None,
  name: str = 'run',
  data: Any = (),
  shard: Any = None,
  frozen: Any = (),
  layout: placement.Layout | None = None,
  stream: stream_lib.Stream | streams_lib.OneOf | None = None,
  own: Any = (),
  hyper: Any = (),
  evaluate: Callable[..., dict[str, Any]] | None = None,
  evaluate_host: Callable[..., dict[str, Any]] | None = None,
  host_every: int = 1,
  host_state: MutableMapping[str, Any] | None = None,
  loss_last: bool = False,
  select: str | None = None,
  stop_when: Callable[[dict[str, np.ndarray]], bool] | None = None,
  record_start: bool = False,
  at_once: int | None = None,
  settings: Any = None,
  keep: int = 2,
  save_seconds: float = 10.0,
) -> outcome.Trained:
  """Trains all members in one compiled program, and resumes if it was killed.

  Calls with the same functions and shapes share their program, as those of
  `jax.jit` do. So make the functions of a method once, from what is static, for
  instance by `functools.cache`, and give numbers as `hyper` and arrays as
  `own` or `data`.

  Args:
    solver: a transformation that takes a batch, or a function from a `Context`
      to one, whose `hyper`, `own`, `data`, `seed_key` and `key` it may use: so
      environments in a solver's state differ by seed. Its step is always 0.
    init: initial params from a `Context` at step 0.
    batch: the batch of a step, from its `Context`; None gives what the stream
      gives, or None. Running statistics, in `bj.outputs(state)`, a wrapper of
      the solver's `update` adds, which has the state.
    steps: steps in all. May be raised later: the run then goes on. What
      `evaluate_host` measured at the former end stays, and may be selected.
    chunk: steps between two records; the last chunk may be shorter. Without a
      stream, they are one dispatch.
    seeds: seeds 0 ... n - 1 for a number n, or one seed for each member.
    workdir: folder of the run; the same call with the same folder resumes.
      None keeps nothing.
    name: subfolder of `workdir`, and the name in messages.
    data: arrays shared by all members.
    shard: which leaves of `data` have a leading axis of examples to split over
      all devices: a pytree prefix of True, False and None. None splits those
      whose axis the devices divide and that are large; what a split changes is
      rounding. False where single examples are drawn from a leaf: that would
      gather them from all devices.
    frozen: weights that are not trained, shared by all members: never split as
      examples, only as the layout says.
    layout: how params and frozen weights lie on a mesh of devices; None leaves
      them whole on each device. A run may go on on another mesh.
    stream: batches that the host makes, for data that does not fit: the same
      for all members, `streamed` in the `Context`. One dispatch is one step.
    own: arrays with a leading axis of members.
    hyper: hyperparameters, likewise: see `members`.
    evaluate: `(context, params, state)` to a dict of scalars, recorded beside
      the solver's losses and counts. `loss/name` is the mean over the steps
      since the record before that evaluated this loss, NaN if none did;
      `count/name` the number so far.
    evaluate_host: `(params, step, state)` to a dict of numbers, any Python:
      params and state have a leading axis of members, and a metric is one
      number or one for each member. Recorded and selected like the others.
    host_every: it is called at the first record at or after each multiple of
      this many steps, and at the last step.
    host_state: by name, what Python holds beside the params, kept in the
      checkpoints: objects with `get_state` and `set_state`, or values, which
      are replaced in the mapping where a run is resumed. Values, also those of
      `get_state`, are numbers, texts, bytes, arrays, generators of numpy and of
      `random`, and lists, tuples and dicts of these.
    loss_last: whether to record the losses of the last step too, as
      `loss_last/name`.
    select: the metric, higher is better, by which the best params are kept.
    stop_when: tells from the history whether to end the run here.
    record_start: whether to record step 0.
    at_once: members that run side by side; None for all. All is faster where
      members share data and have small weights, whose products become one, or
      where a step is tiny. Take 1 for a network whose activations on a batch
      exceed the processor's cache, which is then faster and takes less memory
      (`experiments.benchmarks` measures both), and where a solver branches by
      `lax.cond`: vmap would take every branch.
    settings: a dataclass or mapping of plain values; a run with others in the
      same folder is refused, and so is one with other `data`, `frozen`, `own`
      or `hyper`.
    keep: checkpoints to keep.
    save_seconds: least time between two checkpoints, which are written in the
      background; the first chunk and the last step are always saved. 0 saves
      after each chunk.

  Returns:
    A `Trained`.

  Raises:
    ValueError: if arguments disagree.
    OtherRunError: if the folder holds a run with other settings, or a longer
      one.
    AllStoppedError: if all members stopped. What several held last is saved; of
      one alone, the checkpoint before it. Its `trained` is the run so far.
    WriteError: if the folder cannot be written.
    BusyError: if another process is at work in the folder.
    SystemExit: with the status `termination.EXIT_STATUS`, after a SIGTERM.
  """
  seeds = context_lib.as_seeds(seeds)
  count = len(seeds)
  if chunk < 1 or steps < 1 or host_every < 1:
    raise ValueError(
      f'steps={steps}, chunk={chunk} and host_every={host_every} are whole '
      'numbers of steps, at least 1.'
    )
  _check_members(count, own=own, hyper=hyper)
  identified: dict[str, Any] = {
    'train.chunk': chunk,
    'train.seeds': list(seeds),
    'train.select': select,
  }
  if workdir is not None:
    if host_state is not None:
      host.pack(host_state)  # Tells before the run what cannot be saved.
    if stream is not None:
      identified['train.stream'] = stream.description()
      if stream.files:
        identified |= identity.digest_files(
          'train.files', stream.files, files.make_folder(workdir)
        )
    trees = {'data': data, 'frozen': frozen, 'own': own, 'hyper': hyper}
    for kind, tree in trees.items():
      identified |= identity.digests(f'train.{kind}', tree)
  program = program_lib.program_of(
    solver,
    init,
    batch,
    evaluate,
    count=count,
    select=select is not None,
    loss_last=loss_last,
    at_once=at_once,
  )
  data, places = placement.place(
    data,
    shard,
    layout=layout,
    batch_sizes=() if stream is None else stream.batch_sizes,
  )
  runner = compiled.Compiled(
    program,
    places.replicate(
      context_lib.Members(jnp.asarray(seeds, jnp.uint32), own, hyper)
    ),
    context_lib.Shared(data, places.frozen(frozen)),
    places,
    stream,
  )

  with contextlib.ExitStack() as stack:
    terminated = stack.enter_context(termination.deferred())
    saved, restored, records = None, None, metrics_lib.Records()
    if workdir is not None:
      folder = files.make_folder(pathlib.Path(workdir) / name)
      if files.is_writer():
        stack.enter_context(files.locked(folder))
      if dataclasses.is_dataclass(settings):
        settings = dataclasses.asdict(settings)
      checkpoints.check_settings(
        folder / 'settings.json', dict(settings or {}) | identified
      )
      saved = checkpoints.Checkpoints(folder / 'checkpoints', keep=keep)
      stack.callback(saved.close)
      restored = saved.restore(runner.shapes)
      records = _open_records(stack, folder, restored, steps)
    recorder = recording.Recorder(
      records,
      runner,
      places,
      seeds,
      steps=steps,
      evaluate_host=evaluate_host,
      host_every=host_every,
      select=select,
    )

    if restored is not None:
      if host_state is not None and 'host_state' in restored.extra:
        host.unpack(host_state, restored.extra['host_state'], folder)
      carry = runner.restore(restored)
    else:
      carry = runner.init()
      if record_start:
        carry = recorder.add(*runner.advance(carry, 0), -1)

    step = int(carry.step)
    if step >= steps:
      print(
        f'{name}: finished before, nothing is run; its result is read from '
        f'{folder}. Delete that folder to run it anew.',
        file=sys.stderr,
        flush=True,
      )
    bar = progress_lib.Progress(name, steps, step)
    stack.callback(bar.close)
    stops = recorder.stops(carry)
    leaving, _ = _agree(terminated(), False)
    saved_at, saved_step = -float('inf'), step

    def save():
      extra: dict[str, Any] = dict(runner.seconds())
      if host_state is not None:
        extra['host_state'] = host.pack(host_state)
      saved.save(step, carry, extra)
      return time.monotonic(), step

    def lost():
      """Whether the carry is no longer finite."""
      return bool(stops) and not program.freezes

    def over():
      if stop_when is None or not records.records:
        return False
      return stop_when(records.history()[1])

    while not (leaving or step >= steps or len(stops) == count or over()):
      before = step
      # Records stay on multiples of the chunk, also after an odd end.
      length = min(chunk - step % chunk, steps - step)
      carry, measured = runner.advance(carry, length)
      step = int(carry.step)
      carry = recorder.add(carry, measured, before)
      known, stops = stops, recorder.stops(carry)
      new = [stop for stop in stops if stop not in known]
      outcome.warn_stopped(name, new, alone=count == 1)
      bar.update(step)
      due = time.monotonic() - saved_at >= save_seconds
      # Rather than wait for a slow disk, save later.
      due = due and not (saved and save_seconds and saved.busy)
      leaving, due = _agree(terminated(), due)
      if saved and due and not lost():
        saved_at, saved_step = save()

    if saved:
      if step != saved_step and not lost():
        save()
      saved.wait()
    leaving, _ = _agree(terminated(), False)
    if leaving:
      kept = (
        'the same command goes on from here' if saved else 'nothing is kept'
      )
      message = f'{name}: terminated after step {step}; {kept}.'
      print(message, file=sys.stderr, flush=True)
      termination.leave()

  record_steps, history = records.history()
  trained = outcome.Trained(
    params=places.local(carry.params),
    state=places.local(carry.state),
    best=places.local(carry.best),
    step=step,
    steps=record_steps,
    history=history,
    stopped=stops,
    **runner.seconds(),
  )
  if len(stops) == count:
    where = ''
    if saved and not lost():
      where = f' The last finite ones are in {folder}.'
    elif saved and saved_step:
      where = f' The checkpoint of step {saved_step} is in {folder}.'
    raise outcome.all_stopped(name, trained, where)
  return trained


def _open_records(
  stack: contextlib.ExitStack,
  folder: pathlib.Path,
  restored: checkpoints.Restored | None,
  steps: int,
) -> metrics_lib.Records:
  """The records up to a checkpoint; the first process also writes them."""
  since = -1 if restored is None else restored.step
  if since > steps:
    raise errors.OtherRunError(
      f'{folder} holds a run of {since} steps, more than steps={steps}. '
      'Give at least as many, or another --workdir.'
    )
  if not files.is_writer():
    path = folder / 'metrics.jsonl'
    return metrics_lib.Records(metrics_lib.read_records(path, until=since))
  records = metrics_lib.MetricsWriter(folder, step=since)
  stack.callback(records.close)
  return records


def _agree(terminated: bool, due: bool) -> tuple[bool, bool]:
  """What several processes, whose clocks and signals differ, do together."""
  if jax.process_count() == 1:
    return terminated, due
  votes = multihost_utils.process_allgather(np.array([terminated, due]))
  return bool(votes[:, 0].any()), bool(votes[0, 1])


def _check_members(count: int, **trees: Any) -> None:
  for name, tree in trees.items():
    for path, leaf in jax.tree.leaves_with_path(tree):
      shape = np.shape(leaf)
      if not shape or shape[0] != count:
        raise ValueError(
          f'{name}{jax.tree_util.keystr(path)} needs a leading axis of '
          f'{count}, one entry for each seed, got shape {shape}.'
        )
