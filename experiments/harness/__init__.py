"""The harness of the experiments: run a solver, keep it, show it.

    def init(context):                # one seed; mapped over all of them
      return bj.BilevelParams(upper=jnp.zeros(3), lower=jnp.zeros(3))

    def batch(context):
      rows = jax.random.randint(context.key, (32,), 0, len(context.data))
      return context.data[rows]

    trained = harness.train(
      solver, init, batch, steps=1_000, chunk=100, seeds=5, data=rows,
      workdir='runs/mine')

The run is compiled, its metrics and checkpoints are in `runs/mine`, and the
same call resumes it if it was killed, or ended by SIGTERM (exit status 75).
Data is split over all devices, `--distributed` over those of several processes.
`harness.members` adds a grid of
hyperparameters, `harness.run` the flags of a binary, `write_results`,
`write_table` and `plot_curves` its results.
"""

from experiments.harness.checkpoints import Checkpoints, Restored
from experiments.harness.claim import Claim, Judgement, judge, read_results
from experiments.harness.datasets import (
  DigitPart,
  Source,
  Table,
  check_finite,
  find,
  find_table,
  load_digits,
  parsing,
  pollute_labels,
  read_csv,
  read_image,
  read_mat,
  read_npy,
  read_table,
  source_of,
)
from experiments.harness.errors import (
  AllStoppedError,
  BusyError,
  DamagedDataError,
  MissingDataError,
  OtherRunError,
  SettingsError,
  UserError,
  WriteError,
)
from experiments.harness.flags import Options, run
from experiments.harness.loop import Stopped, Trained, train
from experiments.harness.metrics import MetricsWriter, read_records
from experiments.harness.plots import Panel, plot_curves, plot_panels
from experiments.harness.program import Best, Context, members
from experiments.harness.report import (
  Interval,
  format_table,
  mean_interval,
  write_results,
  write_table,
)

__all__ = [
  'AllStoppedError',
  'Best',
  'BusyError',
  'Checkpoints',
  'Claim',
  'Context',
  'DamagedDataError',
  'DigitPart',
  'Interval',
  'Judgement',
  'MetricsWriter',
  'MissingDataError',
  'Options',
  'OtherRunError',
  'Panel',
  'Restored',
  'SettingsError',
  'Source',
  'Stopped',
  'Table',
  'Trained',
  'UserError',
  'WriteError',
  'check_finite',
  'find',
  'find_table',
  'format_table',
  'judge',
  'load_digits',
  'mean_interval',
  'members',
  'parsing',
  'plot_curves',
  'plot_panels',
  'pollute_labels',
  'read_csv',
  'read_image',
  'read_mat',
  'read_npy',
  'read_records',
  'read_results',
  'read_table',
  'run',
  'source_of',
  'train',
  'write_results',
  'write_table',
]
