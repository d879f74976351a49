"""Trains: compiled chunks, checkpoints, metrics, seeds that stop.

The host half of a run; `program` has what is compiled. SIGTERM ends it after
the chunk under way: see `termination`.
"""

import contextlib
import dataclasses
import itertools
import pathlib
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from experiments.harness import (
  checkpoints,
  errors,
  files,
  placement,
  termination,
)
from experiments.harness import metrics as metrics_lib
from experiments.harness import program as program_lib
from experiments.harness import progress as progress_lib


class Stopped(NamedTuple):
  """A member that became non-finite.

  Attributes:
    member: its index.
    seed: its seed.
    step: the step, from 0, whose result was not finite.
    sequences: fields of the params, and losses as `loss/name`, that were not.
  """

  member: int
  seed: int
  step: int
  sequences: tuple[str, ...]


class Trained(NamedTuple):
  """The result of a run.

  Attributes:
    params: last finite params; leaves have a leading axis of members.
    state: the solver's state, likewise.
    best: a `program.Best`, or () where no metric selects.
    step: steps taken.
    steps: steps of the records, int (records,).
    history: each metric's values, float64 (records, members); NaN where not
      finite, and for a member from its stop on.
    stopped: members that became non-finite.
    seconds: run time without compilation, over all resumed parts.
    compile_seconds: compilation, likewise.
  """

  params: Any
  state: Any
  best: Any
  step: int
  steps: np.ndarray
  history: dict[str, np.ndarray]
  stopped: tuple[Stopped, ...]
  seconds: float
  compile_seconds: float


def train(
  solver: Any,
  init: Callable[[program_lib.Context], Any],
  batch: Callable[[program_lib.Context], Any] | None = None,
  *,
  steps: int,
  chunk: int,
  seeds: int | Sequence[int],
  workdir: files.Path | None,
  name: str = 'run',
  data: Any = (),
  shard: Any = None,
  own: Any = (),
  hyper: Any = (),
  evaluate: Callable[..., dict[str, Any]] | None = None,
  select: str | None = None,
  stop_when: Callable[[dict[str, np.ndarray]], bool] | None = None,
  record_start: bool = False,
  at_once: int | None = None,
  settings: Any = None,
  keep: int = 2,
  save_seconds: float = 10.0,
) -> Trained:
  """Trains all members in one compiled program, and resumes if it was killed.

  Args:
    solver: a transformation that takes a batch, or a function from a member's
      `hyper` to one.
    init: initial params from a `Context` at step 0.
    batch: the batch of a step, from its `Context`; None gives None.
    steps: steps in all, a multiple of `chunk`.
    chunk: steps in one dispatch; metrics are recorded after each.
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
    own: arrays with a leading axis of members.
    hyper: hyperparameters, likewise: see `members`.
    evaluate: `(context, params, state)` to a dict of scalars, recorded beside
      the solver's losses (`loss/name`) and counts (`count/name`).
    select: the metric, higher is better, by which the best params are kept.
    stop_when: tells from the history whether to end the run here.
    record_start: whether to record step 0; compiles `evaluate` twice.
    at_once: members that run side by side; None for all. Fewer take less
      memory, and large models are no slower one group after another. Take 1
      where a solver branches by `lax.cond`: vmap would take every branch.
    settings: a dataclass or mapping of plain values; a run with others in the
      same folder is refused.
    keep: checkpoints to keep.
    save_seconds: least time between two checkpoints, which are written in the
      background; the last step is always saved. 0 saves after each chunk.

  Returns:
    A `Trained`.

  Raises:
    ValueError: if arguments disagree.
    OtherRunError: if the folder holds a run with other settings.
    AllStoppedError: if all members stopped; all before is saved.
    WriteError: if the folder cannot be written.
    BusyError: if another process is at work in the folder.
    SystemExit: with the status `termination.EXIT_STATUS`, after a SIGTERM.
  """
  seeds = program_lib.as_seeds(seeds)
  if chunk < 1 or steps < chunk or steps % chunk:
    raise ValueError(f'steps={steps} is no multiple of chunk={chunk}.')
  _check_members(len(seeds), own=own, hyper=hyper)
  program = program_lib.make_program(
    solver,
    init,
    batch,
    evaluate,
    chunk=chunk,
    select=select,
    at_once=at_once,
  )
  data, everywhere = placement.place(data, shard)
  every = placement.replicate(
    program_lib.Members(jnp.asarray(seeds, jnp.uint32), own, hyper), everywhere
  )
  inputs = (every, data)
  culprits = program.culprits(*inputs)

  with contextlib.ExitStack() as stack:
    terminated = stack.enter_context(termination.deferred())
    saved, restored, records = None, None, metrics_lib.Records()
    if workdir is not None:
      folder = files.make_folder(pathlib.Path(workdir) / name)
      if files.is_writer():
        stack.enter_context(files.locked(folder))
      if dataclasses.is_dataclass(settings):
        settings = dataclasses.asdict(settings)
      arguments = {
        'train.steps': steps,
        'train.chunk': chunk,
        'train.seeds': list(seeds),
        'train.select': select,
      }
      checkpoints.check_settings(
        folder / 'settings.json', dict(settings or {}) | arguments
      )
      saved = checkpoints.Checkpoints(folder / 'checkpoints', keep=keep)
      stack.callback(saved.close)
      restored = saved.restore(jax.eval_shape(program.init, *inputs))
      since = -1 if restored is None else restored.step
      if files.is_writer():
        records = metrics_lib.MetricsWriter(folder, step=since)
        stack.callback(records.close)
      else:
        path = folder / 'metrics.jsonl'
        records = metrics_lib.Records(
          metrics_lib.read_records(path, until=since)
        )

    if restored is not None:
      carry = placement.replicate(restored.tree, everywhere)
      clock = _Clock(everywhere, **restored.extra)
    else:
      clock = _Clock(everywhere)
      # What a compiled function returns shares no buffer with its inputs or
      # within itself, so that the carry can be donated.
      carry = clock.compile(program.init, *inputs)(*inputs)
      if record_start:
        start = clock.compile(program.start, carry, *inputs, donate_argnums=0)
        carry, measured = start(carry, *inputs)
        _record(records, carry, measured)

    step = int(carry.step)
    bar = progress_lib.Progress(name, steps, step)
    stack.callback(bar.close)
    stops = _stops(carry, seeds, culprits)
    leaving, _ = _agree(terminated(), False)
    compiled, saved_at, saved_step = None, time.monotonic(), step

    def over():
      if stop_when is None or not records.records:
        return False
      return stop_when(records.history()[1])

    while not (leaving or step >= steps or len(stops) == len(seeds) or over()):
      if compiled is None:
        compiled = clock.compile(
          program.chunk, carry, *inputs, donate_argnums=0
        )
      with clock.running():
        # One dispatch at a time: queued collectives of virtual devices abort.
        carry, measured = jax.block_until_ready(compiled(carry, *inputs))
      step = int(carry.step)
      _record(records, carry, measured)
      before, stops = stops, _stops(carry, seeds, culprits)
      _warn_stopped(name, [s for s in stops if s not in before])
      bar.update(step)
      due = time.monotonic() - saved_at >= save_seconds
      # Rather than wait for a slow disk, save later.
      due = due and not (saved and save_seconds and saved.busy)
      leaving, due = _agree(terminated(), due)
      if saved and due:
        saved.save(step, carry, clock.seconds())
        saved_at, saved_step = time.monotonic(), step

    if saved:
      if step != saved_step:
        saved.save(step, carry, clock.seconds())
      saved.wait()
    leaving, _ = _agree(terminated(), False)
    if leaving:
      kept = (
        'the same command goes on from here' if saved else 'nothing is kept'
      )
      message = f'{name}: terminated after step {step}; {kept}.'
      print(message, file=sys.stderr, flush=True)
      termination.leave()

  if len(stops) == len(seeds):
    last = max(stops, key=lambda stop: stop.step)
    where = '' if workdir is None else f' The last finite ones are in {folder}.'
    raise errors.AllStoppedError(
      f'{name}: all {len(seeds)} seeds became non-finite, the last at step '
      f'{last.step} ({", ".join(last.sequences)}).{where} {_MEND}'
    )
  record_steps, history = records.history()
  return Trained(
    params=placement.local(carry.params, everywhere),
    state=placement.local(carry.state, everywhere),
    best=placement.local(carry.best, everywhere),
    step=step,
    steps=record_steps,
    history=history,
    stopped=stops,
    **clock.seconds(),
  )


def _record(records, carry, measured):
  stopped = np.asarray(carry.stopped) >= 0
  measured = jax.device_get(measured)
  rows = {
    name: np.where(stopped, np.nan, np.asarray(value, np.float64))
    for name, value in measured.items()
  }
  records.write(int(carry.step), rows)


_MEND = (
  'The likely mend is a smaller step size for what became non-finite, or '
  'clipped gradients (optax.clip_by_global_norm).'
)


def _agree(terminated: bool, due: bool) -> tuple[bool, bool]:
  """What several processes, whose clocks and signals differ, do together."""
  if jax.process_count() == 1:
    return terminated, due
  votes = multihost_utils.process_allgather(np.array([terminated, due]))
  return bool(votes[:, 0].any()), bool(votes[0, 1])


class _Clock:
  """Compiles, and adds up seconds of running and of compiling.

  Args:
    everywhere: the sharding of all results, so that those of one chunk are as
      the next expects them; None for that of the compiler.
    seconds: of running so far.
    compile_seconds: of compiling so far.
  """

  def __init__(
    self,
    everywhere: jax.sharding.Sharding | None,
    seconds: float = 0.0,
    compile_seconds: float = 0.0,
  ):
    self._everywhere = everywhere
    self._running, self._compiling = seconds, compile_seconds

  def compile(self, fn, *args, **options):
    start = time.monotonic()
    options |= {'out_shardings': self._everywhere}
    compiled = jax.jit(fn, **options).lower(*args).compile()
    self._compiling += time.monotonic() - start
    return compiled

  @contextlib.contextmanager
  def running(self):
    start = time.monotonic()
    yield
    self._running += time.monotonic() - start

  def seconds(self) -> dict[str, float]:
    return {'seconds': self._running, 'compile_seconds': self._compiling}


def _check_members(count: int, **trees: Any) -> None:
  for name, tree in trees.items():
    for path, leaf in jax.tree.leaves_with_path(tree):
      shape = np.shape(leaf)
      if not shape or shape[0] != count:
        raise ValueError(
          f'{name}{jax.tree_util.keystr(path)} needs a leading axis of '
          f'{count}, one entry for each seed, got shape {shape}.'
        )


def _stops(carry: Any, seeds: Sequence[int], names: Sequence[str]):
  stopped, culprits = np.asarray(carry.stopped), np.asarray(carry.culprits)
  return tuple(
    Stopped(
      member=int(i),
      seed=seeds[i],
      step=int(stopped[i]),
      sequences=tuple(itertools.compress(names, culprits[i])),
    )
    for i in np.flatnonzero(stopped >= 0)
  )


def _warn_stopped(name: str, stops: Sequence[Stopped]) -> None:
  for stop in stops:
    warnings.warn(
      f'{name}: seed {stop.seed} (member {stop.member}) stopped at step '
      f'{stop.step}: {", ".join(stop.sequences)} became non-finite. It stays '
      f'at its last finite params; the others go on. {_MEND}',
      RuntimeWarning,
      stacklevel=3,
    )
