"""Makes the runs of the papers, and writes a report on their claims.

    python -m experiments.reproduce --preset=smoke --papers=pbgd

Each paper declares `RUNS` and `CLAIMS` in experiments/<paper>/claims.py. Each
run has its own process and workdir, so a crash only affects its own claims. The
same command resumes: finished runs are skipped, failed ones are repeated.
`report.md` in the workdir has a row per claim, and is updated after each run.
`--store` stores the results for the documents, see `tables`.

Presets: `smoke` takes about a minute per paper and needs no data folder. It
only shows that everything runs: its sizes are too small to judge a paper.
`quick` takes minutes per binary, `paper` has the published sizes.
`--runs=pbgd/mlp,pbgd/fashion` makes only these runs, each with its declared
preset. `--jobs=4` makes four runs at the same time, and `--engine=slurm` or
`--engine=ray` makes them on machines that share the workdir, see docs/scale.md.
The exit status is 1 if a command fails or a run lacks a metric of a claim,
otherwise 0, also if claims are not shown.
"""

import os
import sys
from collections.abc import Sequence

from absl import app, flags

from experiments.harness.app import errors, termination
from experiments.harness.study import jobs
from experiments.harness.study.claim import PRESETS
from experiments.harness.study.reproduction import reproduce


def main(argv: Sequence[str]) -> None:
  """Parses the flags and makes the runs."""
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
      plan=jobs.Plan(
        values.engine, values.jobs, jobs.parse_options(values.engine_options)
      ),
    )
  except errors.UserError as error:
    sys.exit(f'reproduce: {error}')
  sys.exit(0 if fine else 1)


if __name__ == '__main__':
  flags.DEFINE_enum(
    'preset',
    'quick',
    PRESETS,
    'Sizes of the runs: smoke, quick or paper, see above.',
  )
  flags.DEFINE_list('papers', [], 'Papers, separated by commas; default: all.')
  flags.DEFINE_list(
    'runs',
    [],
    'Only these runs, such as pbgd/mlp, each with its own preset; separated by '
    'commas.',
  )
  flags.DEFINE_string(
    'workdir',
    None,
    'Folder of the report and the runs; the same command resumes. Default: '
    'runs/reproduce/<preset>.',
  )
  flags.DEFINE_string(
    'data_dir',
    None,
    'Folder of data sets; smoke needs none, and runs without their data fail.',
  )
  flags.DEFINE_bool('store', False, 'Stores the results for the documents.')
  flags.DEFINE_float(
    'timeout_minutes',
    None,
    'Minutes until a run is ended as failed.',
    lower_bound=0,
  )
  flags.DEFINE_enum(
    'engine', 'local', tuple(jobs.ENGINES), 'Where the runs are made.'
  )
  flags.DEFINE_integer('jobs', 1, 'Runs at the same time.', lower_bound=1)
  flags.DEFINE_list(
    'engine_options',
    [],
    'Options of the engine: for slurm of submitit, such as '
    'slurm_partition=long,timeout_min=600,gpus_per_node=1; for ray of a task, '
    'such as num_cpus=4.',
  )
  app.run(main)
