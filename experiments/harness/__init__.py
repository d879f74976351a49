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
from experiments.harness.data import Digits, load_idx_dataset, packaged_digits
from experiments.harness.digit_parts import (
  DigitPart,
  load_digit_parts,
  pollute_labels,
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
  reduced,
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
  'Digits',
  'Interval',
  'Judgement',
  'MetricsWriter',
  'MissingDataError',
  'Options',
  'OtherRunError',
  'Panel',
  'Restored',
  'SettingsError',
  'Stopped',
  'Trained',
  'UserError',
  'WriteError',
  'format_table',
  'judge',
  'load_digit_parts',
  'load_idx_dataset',
  'mean_interval',
  'members',
  'packaged_digits',
  'plot_curves',
  'plot_panels',
  'pollute_labels',
  'read_records',
  'read_results',
  'reduced',
  'run',
  'train',
  'write_results',
  'write_table',
]
