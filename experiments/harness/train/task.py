"""The arguments of `train`: a task, its training, and what is measured."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.harness.app import flags
from experiments.harness.store import files
from experiments.harness.train.context import Context
from experiments.harness.train.placement import Layout
from experiments.harness.train.stream import Stream


class Task(NamedTuple):
  """What members learn from.

  Attributes:
    init: initial params from a `Context` at step 0.
    batch: the batch of a step, from its `Context`; None gives what the stream
      gives, or None. Running statistics, in `bj.outputs(state)`, a wrapper of
      the solver's `update` adds, which has the state.
    data: arrays shared by all members.
    shard: which leaves of `data` have a leading axis of examples to split over
      all devices: a pytree prefix of True, False and None. None splits those
      whose axis the devices divide and that are large; what a split changes is
      rounding. False where single examples are drawn from a leaf: that would
      gather them from all devices.
    own: arrays with a leading axis of members.
    hyper: hyperparameters with such an axis; see `members`.
    frozen: weights that are not trained, shared by all members: never split as
      examples, only as the layout says.
    stream: batches that the host makes, for data that does not fit: the same
      for all members, `streamed` in the `Context`. One dispatch is one step. A
      `Stream`, or an object with its methods.
  """

  init: Callable[[Context], Any]
  batch: Callable[[Context], Any] | None = None
  data: Any = ()
  shard: Any = None
  own: Any = ()
  hyper: Any = ()
  frozen: Any = ()
  stream: Stream | Any = None


class Training(NamedTuple):
  """How long members are trained, and where they are kept.

  Attributes:
    steps: steps in all. May be raised later: the run then goes on. What
      `evaluate_host` measured at the former end stays, and may be selected.
    chunk: steps between two records; the last chunk may be shorter. Without a
      stream, they are one dispatch.
    seeds: seeds 0 ... n - 1 for a number n, or one seed for each member.
    workdir: folder of the run; the same call with the same folder resumes.
      None keeps nothing.
    name: subfolder of `workdir`, and the name in messages.
    settings: a dataclass or mapping of plain values; a run with others in the
      same folder is refused, and so is one with other `data`, `frozen`, `own`
      or `hyper`.
    at_once: members that run side by side; None for all. All is faster where
      members share data and have small weights, whose products become one, or
      where a step is tiny. Take 1 for a network whose activations on a batch
      exceed the processor's cache, which is then faster and takes less memory
      (`experiments.benchmarks` measures both), and where a solver branches by
      `lax.cond`: vmap would take every branch.
    layout: how params and frozen weights lie on a mesh of devices; None leaves
      them whole on each device. A run may go on on another mesh.
    save_seconds: least time between two checkpoints, which are written in the
      background; the first chunk and the last step are always saved. 0 saves
      after each chunk.
  """

  steps: int
  chunk: int
  seeds: int | Sequence[int]
  workdir: files.Path | None
  name: str = 'run'
  settings: Any = None
  at_once: int | None = None
  layout: Layout | None = None
  save_seconds: float = 10.0

  @classmethod
  def from_options(cls, options: flags.Options, **fields: Any) -> 'Training':
    """With the seeds, the workdir and the `save_seconds` of a binary's flags.

    Args:
      options: what the flags say.
      **fields: all others, or other values of these.
    """
    shared = ('seeds', 'workdir', 'save_seconds')
    return cls(**{name: getattr(options, name) for name in shared} | fields)


class Measure(NamedTuple):
  """What is measured, and what that decides.

  Attributes:
    evaluate: `(context, params, state)` to a dict of scalars, recorded with
      the solver's losses and counts. `loss/name` is the mean over the steps
      since the record before that evaluated this loss, NaN if none did;
      `count/name` the number so far.
    record_start: whether to record step 0.
    select: the metric, higher is better, by which the best params are kept.
    stop_when: tells from the history whether to end the run here.
    evaluate_host: `(params, step, state)` to a dict of numbers, any Python:
      params and state have a leading axis of members, and a metric is one
      number or one for each member. Recorded and selected like the others. Of
      several processes, the first one's numbers count.
    host_every: it is called at the first record at or after each multiple of
      this many steps, and at the last step.
  """

  evaluate: Callable[..., dict[str, Any]] | None = None
  record_start: bool = False
  select: str | None = None
  stop_when: Callable[[dict[str, np.ndarray]], bool] | None = None
  evaluate_host: Callable[..., dict[str, Any]] | None = None
  host_every: int = 1
