"""Runs the claims of the papers and writes a report on them.

    python -m experiments.reproduce --preset=smoke --papers=pbgd

A paper's `RUNS` and `CLAIMS` are in experiments/<paper>/claims.py, found by
itself. Each run is made once, in a process and a workdir of its own:
a binary that crashes costs its own rows, which say so, and no others. The same
command goes on where a killed one was: finished runs are not run again, failed
ones are. `report.md` in the workdir has a row for each claim and is written
anew after each run. `--store` keeps the results for the tables of the READMEs,
see `tables`.

Presets: `smoke` takes about a minute a paper and needs no data folder; it shows
that everything runs, on sizes too small to judge a paper by. `quick` takes
minutes a binary, `paper` the published sizes. `--runs=pbgd/mlp,pbgd/fashion`
makes these alone, each by the preset that it declares. The exit status is 1 if
a command failed or a claim names a metric that its run does not have, else 0,
whether or not the claims are shown.
"""

import os
import sys
from collections.abc import Sequence

from absl import app, flags

from experiments.harness.app import errors, termination
from experiments.harness.study.claim import PRESETS
from experiments.harness.study.reproduction import reproduce


def main(argv: Sequence[str]) -> None:
  """Reads the flags and reproduces."""
  values = flags.FLAGS
  if argv[1:]:
    raise app.UsageError(f'unknown arguments: {" ".join(argv[1:])}')
  termination.exit_on_sigterm(unwind=True)
  limit = values.timeout_minutes
  try:
    fine = reproduce(
      preset=values.preset,
      workdir=values.workdir or os.path.join('runs/reproduce', values.preset),
      papers=values.papers,
      only=values.runs,
      data_dir=values.data_dir,
      timeout=None if limit is None else 60 * limit,
      store=values.store,
    )
  except errors.UserError as error:
    sys.exit(f'reproduce: {error}')
  sys.exit(0 if fine else 1)


if __name__ == '__main__':
  flags.DEFINE_enum('preset', 'quick', PRESETS, 'Sizes of the runs.')
  flags.DEFINE_list(
    'papers', [], 'Which papers, commas between; by default all.'
  )
  flags.DEFINE_list(
    'runs',
    [],
    'Which runs alone, such as pbgd/mlp, each by its own preset; commas '
    'between.',
  )
  flags.DEFINE_string(
    'workdir',
    None,
    'Folder of the report and the runs; the same command resumes. By default '
    'runs/reproduce/<preset>.',
  )
  flags.DEFINE_string('data_dir', None, 'Folder of data sets.')
  flags.DEFINE_bool(
    'store', False, 'Keeps the results for the tables of the READMEs.'
  )
  flags.DEFINE_float(
    'timeout_minutes', None, 'Ends a command that takes longer.', lower_bound=0
  )
  app.run(main)
