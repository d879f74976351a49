"""The harness of the experiments: trains solvers, compares and reports them.

    def init(context):                # of one seed; mapped over all seeds
      return bj.BilevelParams(upper=jnp.zeros(3), lower=jnp.zeros(3))

    def batch(context):
      rows = jax.random.randint(context.key, (32,), 0, len(context.data))
      return context.data[rows]

    trained = harness.train(
      solver,
      harness.Task(init, batch, data=rows),
      harness.Training(1_000, chunk=100, seeds=5, workdir='runs/mine'))

Metrics and checkpoints are in `runs/mine`, and the same call resumes the run
after a kill or a SIGTERM (exit status 75). Data is split over all devices, with
`--distributed` over those of several processes. `harness.members` crosses seeds
with a grid of hyperparameters. `harness.run` adds the flags of a program and
writes the `Report` of its `Study`. `read_table` and `read_csv` read a user's
own data. `experiments.harness.study.comparison` tunes several methods equally,
on unreported seeds, and compares them.

A `harness.Stream` reads data that exceeds the memory of a device, a
`harness.Layout` splits params and frozen weights over a mesh, and
`evaluate_host` measures in plain Python:

    texts = harness.Stream(
      rows, 32, lengths=lengths, buckets=(128, 512), pad={'tokens': 0})
    trained = harness.train(
      solver,
      harness.Task(init, batch, frozen=pretrained, stream=texts),
      harness.Training(..., layout=harness.Layout(mesh, specs)),
      harness.Measure(
        evaluate_host=lambda params, step, state: {'bleu': bleu(params)},
        host_every=1_000, select='bleu'))
"""

from experiments.harness.app.capacity import require_memory
from experiments.harness.app.errors import (
  AllStoppedError,
  BusyError,
  DamagedDataError,
  MissingDataError,
  OtherRunError,
  SettingsError,
  UserError,
  WriteError,
)
from experiments.harness.app.extras import load_extra
from experiments.harness.app.flags import Options
from experiments.harness.app.settings import (
  Allowed,
  Among,
  replaced,
  run_settings,
)
from experiments.harness.data.arrays import read_mat, read_npz
from experiments.harness.data.reading import check_finite, parsing
from experiments.harness.data.sources import Source, find, identify_source
from experiments.harness.data.tables import Table, read_csv, read_table
from experiments.harness.store.checkpoints import Checkpoints, Restored
from experiments.harness.store.leaves import as_numpy
from experiments.harness.store.loading import load
from experiments.harness.store.records import MetricsWriter, read_records
from experiments.harness.study.claim import (
  Claim,
  Paper,
  Run,
  judge,
  paired_interval,
  read_results,
)
from experiments.harness.study.plots import (
  Panel,
  draw_curves,
  draw_panels,
)
from experiments.harness.study.report import (
  Interval,
  format_table,
  jackknife_interval,
  mean_interval,
  reduced,
  write_results,
  write_table,
)
from experiments.harness.study.results import Column, Results
from experiments.harness.study.run import execute, run
from experiments.harness.study.study import Report, Study
from experiments.harness.train.context import Context, members
from experiments.harness.train.loop import train, train_methods
from experiments.harness.train.metrics import with_metrics
from experiments.harness.train.models import Network, pure
from experiments.harness.train.placement import Layout
from experiments.harness.train.products import thin_dot_general, thin_product
from experiments.harness.train.stream import Stream
from experiments.harness.train.task import Measure, Task, Training
from experiments.harness.train.trained import Trained
