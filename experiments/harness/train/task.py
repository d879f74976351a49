"""The arguments of `train`: `Task`, `Training` and `Measure`."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.harness.app import flags
from experiments.harness.app import settings as settings_lib
from experiments.harness.store import files
from experiments.harness.train.context import Context
from experiments.harness.train.placement import Layout
from experiments.harness.train.stream import Stream


class Task(NamedTuple):
  """The initial params and the data.

  Attributes:
    init: from a `Context` at step 0 to the initial params.
    batch: from a `Context` to the batch of the step; None takes the stream's
      batch, or None without a stream.
    data: arrays shared by all members.
    shard: whether to split the leading axis of each leaf of `data` over the
      devices: a pytree prefix of True, False and None. None splits large leaves
      whose axis the devices divide, which changes results by rounding only.
      Choose False if single examples are drawn from a leaf: each would
      have to be gathered.
    own: arrays with a leading axis of members.
    hyper: hyperparameters with a leading axis of members; see `members`.
    frozen: weights that are not trained, shared by all members; placed as the
      `Layout` says.
    stream: a `Stream` of batches from the host, or an object with its methods,
      for data that exceeds the memory of a device; all members get the same
      batch, `context.streamed`. Each step is one dispatch. Without the method
      `batch_shapes`, a changed step is not detected.
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
  """The length of a run, its seeds, and its folder.

  Attributes:
    steps: total number of steps. With a larger number, a finished run
      continues; the last `evaluate_host` of the shorter run stays recorded, and
      may be selected.
    chunk: steps between two records; the last chunk may be shorter. Without a
      stream, a chunk is one dispatch.
    seeds: number n for seeds 0 to n - 1, or one seed for each member.
    workdir: folder of the run; the same call with the same folder resumes.
      None writes nothing.
    name: subfolder of `workdir`, and the name in messages.
    settings: a dataclass or mapping of plain values. A run in the same folder
      with other settings, `data`, `frozen`, `own` or `hyper` is refused, also
      one whose init, step or `evaluate` compute something else.
    at_once: members that are mapped by `vmap`; None for all. All at once is
      faster for tiny steps, or small weights on shared data, whose products
      become one. Choose 1 for a network whose activations exceed the cache of
      the CPU: it is faster and takes less memory (`experiments.benchmarks`
      measures both). Choose 1 for a solver with `lax.cond`: vmap computes both
      branches.
    layout: placement of params and frozen weights on a mesh of devices; None
      replicates them. A run may resume on another mesh.
    save_seconds: minimum seconds between two checkpoints, which are written in
      the background; the first chunk and the last step are always saved. 0
      saves after each chunk.
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
    """Takes the fields from the options of a binary.

    Args:
      options: the options, with seeds, workdir and `save_seconds`. The default
        of `steps` is `options.settings.steps`, that of `chunk` is 50, and that
        of `settings` are all settings but `steps`.
      **fields: all other fields, or other values for these.
    """
    shared = ('seeds', 'workdir', 'save_seconds')
    fields = {name: getattr(options, name) for name in shared} | fields
    if 'steps' not in fields:
      fields['steps'] = options.settings.steps
      identity = settings_lib.run_settings(options.settings, 'steps')
      fields.setdefault('settings', identity)
    return cls(**{'chunk': 50} | fields)


class Measure(NamedTuple):
  """The metrics of a run, and their use.

  Attributes:
    evaluate: from `(context, params, state)` to a dict of scalars, recorded
      with the solver's losses and counts. `loss/name` is the mean over the
      steps since the last record that evaluated this loss, NaN without any;
      `count/name` is the total so far.
    record_start: whether to record step 0.
    select: the metric that selects the best params; higher is better.
    stop_when: from the history to whether the run ends.
    evaluate_host: from `(params, step, state)` to a dict of numbers, in plain
      Python: params and state have a leading axis of members, and a metric is
      one number or one per member. With several processes, the first one's
      numbers count.
    host_every: `evaluate_host` is called at the first record at or after each
      multiple of this number of steps, and at the last step.
    on_record: called with the step and the metrics of each new record, values
      (members,) by name, for instance to send them to another program. A run
      that resumes repeats the records after its checkpoint.
  """

  evaluate: Callable[..., dict[str, Any]] | None = None
  record_start: bool = False
  select: str | None = None
  stop_when: Callable[[dict[str, np.ndarray]], bool] | None = None
  evaluate_host: Callable[..., dict[str, Any]] | None = None
  host_every: int = 1
  on_record: Callable[[int, dict[str, np.ndarray]], Any] | None = None
