"""A study that is run again and again by a process, at a test's command.

Each line of the standard input is an order, and is answered by a line: see
`obey`. `tests.faults.lab` starts this process.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import sys
import time
import traceback
import warnings

from tests.faults import syscalls

if __name__ == '__main__':
  # Before jax starts threads.
  syscalls.install(int(sys.argv[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.harness.study import run

Answer = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of the study.

  Attributes:
    steps: number of steps.
    rate: step size.
    row: the data.
  """

  steps: int
  rate: float
  row: float


def make_solver(context):
  loss = lambda params, batch: jnp.sum((params['a'] - batch) ** 2)
  return optax.chain(bj.gradient(loss), optax.sgd(context.hyper['rate']))


def init(context):
  return {'a': jax.random.uniform(context.key, (3,))}


def draw(context):
  return context.data + jax.random.uniform(context.key, (3,))


def evaluate(context, params, state):
  return {'score': -jnp.sum(params['a'] ** 2)}


def main(options: harness.Options) -> harness.Report:
  """Trains, and reports the scores."""
  settings = options.settings
  task = harness.Task(
    init,
    draw,
    data=np.full(3, settings.row, np.float32),
    hyper={'rate': np.full(len(options.seeds), settings.rate, np.float32)},
  )
  training = harness.Training.from_options(
    # The row stands for a data file: it is no setting of the run.
    options,
    chunk=1,
    settings={'rate': settings.rate},
  )
  runs = {
    'run': harness.train(
      make_solver, task, training, harness.Measure(evaluate, select='score')
    )
  }
  return harness.Report.from_runs(runs, 'score')


STUDY = harness.Study(
  main, {'quick': Settings(3, 0.1, 0.5)}, paper='faults', binary='worker'
)


def attempt(workdir: str, steps: int, rate: float, row: float) -> Answer:
  """Runs the study like its command; returns how it ended."""
  options = harness.Options(
    'faults',
    'worker',
    'quick',
    Settings(steps, rate, row),
    workdir,
    None,
    (0, 1),
    0.0,
  )
  try:
    run.execute(main, options)
  except harness.UserError as error:
    return {'end': 'refused', 'text': str(error)}
  except Exception:
    return {'end': 'traceback', 'text': traceback.format_exc()}
  return {'end': 'finished', 'text': ''}


def read(workdir: str) -> Answer:
  """Reads what a run has written so far, as other programs do."""
  folder = pathlib.Path(workdir)
  try:
    with contextlib.suppress(harness.MissingDataError):
      harness.load(folder)
    harness.read_records(folder / 'run' / 'metrics.jsonl')
    if (folder / 'results.json').exists():
      harness.read_results(folder / 'results.json')
  except Exception:
    return {'end': 'traceback', 'text': traceback.format_exc()}
  return {'end': 'read', 'text': ''}


def unsteady() -> float:
  """Returns the time of a clock that jumps by up to a day, both ways."""
  return CLOCK() + JUMPS.uniform(-86_400, 86_400)


CLOCK, JUMPS = time.time, random.Random(0)


def obey(do: str, workdir: str, **settings: float) -> Answer:
  """Does what an order says.

  Args:
    do: 'attempt', 'read', or 'jump', an attempt while the clock jumps.
    workdir: folder of the run.
    **settings: settings of an attempt.

  Returns:
    `end`, `text` and `warnings`.
  """
  settings = {'steps': 3, 'rate': 0.1, 'row': 0.5} | settings
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    if do == 'read':
      answer = read(workdir)
    else:
      time.time = unsteady if do == 'jump' else CLOCK
      answer = attempt(workdir, **settings)
      time.time = CLOCK
  texts = [str(w.message) for w in caught if w.category is RuntimeWarning]
  return answer | {'warnings': '\n'.join(texts)}


def serve(fork: bool) -> None:
  """Obeys until the input ends.

  Args:
    fork: whether each order has its own process, which may be killed.
  """
  answers = os.fdopen(os.dup(1), 'w')
  quiet = os.open(os.devnull, os.O_WRONLY)
  for descriptor in (1, 2):
    os.dup2(quiet, descriptor)
  say = lambda answer: print(json.dumps(answer), file=answers, flush=True)
  for line in sys.stdin:
    order = json.loads(line)
    if not fork:
      say(obey(**order))
      continue
    child = os.fork()
    if not child:
      say(obey(**order))
      os._exit(0)
    if os.waitpid(child, 0)[1]:
      say({'end': 'killed', 'text': '', 'warnings': ''})


if __name__ == '__main__':
  serve(sys.argv[2:] == ['fork'])
