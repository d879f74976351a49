"""Calls of a function as jobs of an engine: local processes, SLURM or Ray.

    for item, job in jobs.run(function, items, jobs.Plan('slurm', 16)):
      print(item, job.result())

An engine decides when and where a call runs; this module only starts the calls
and waits for them. The function writes its results into a folder that all
machines share, and skips what is there: so the same program resumes after any
of its processes or machines is lost.
"""

import concurrent.futures
import contextlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from experiments.harness.app import errors
from experiments.harness.store import files

_POLL_SECONDS = 1.0


class Job(Protocol):
  """A call that has ended."""

  def result(self) -> Any:
    """Returns the result of the call, or raises its error."""


class Plan(NamedTuple):
  """How calls run.

  Attributes:
    engine: local, slurm or ray.
    jobs: largest number of calls at the same time.
    options: of the engine: for slurm, parameters of submitit such as
      timeout_min, slurm_partition and gpus_per_node; for ray, options of a task
      such as num_cpus and num_gpus.
    folder: folder of SLURM's scripts and logs, which all machines share.
  """

  engine: str = 'local'
  jobs: int = 1
  options: Mapping[str, Any] = {}
  folder: files.Path = 'jobs'


def _local(
  function: Callable[[Any], Any],
  items: Sequence[Any],
  plan: Plan,
  stop: Callable[[], None],
) -> Iterator[tuple[Any, Job]]:
  """Calls in threads, for functions that start processes and wait for them."""
  if plan.options:
    raise errors.SettingsError(
      f'the engine local has no options, got {", ".join(plan.options)}: leave '
      'out --engine_options.'
    )
  pool = concurrent.futures.ThreadPoolExecutor(plan.jobs)
  calls = {pool.submit(function, item): item for item in items}
  try:
    for call in concurrent.futures.as_completed(calls):
      yield calls[call], call
  finally:
    pool.shutdown(wait=False, cancel_futures=True)
    while any(call.running() for call in calls):
      stop()  # Again, for a process that started in between.
      concurrent.futures.wait(calls, timeout=_POLL_SECONDS)


def _slurm(
  function: Callable[[Any], Any],
  items: Sequence[Any],
  plan: Plan,
  stop: Callable[[], None],
) -> Iterator[tuple[Any, Job]]:
  """Calls as a job array of SLURM, on the machines of its partition."""
  del stop
  import submitit

  options = dict(plan.options)
  # `cluster=debug` or `local` runs here, to try a command without SLURM.
  cluster = options.pop('cluster', 'slurm')
  executor = submitit.AutoExecutor(plan.folder, cluster=cluster)
  try:
    executor.update_parameters(
      slurm_array_parallelism=plan.jobs,
      **{'name': 'bilevel_jax', 'timeout_min': 24 * 60} | options,
    )
  except NameError as error:
    raise errors.SettingsError(
      f'--engine_options of slurm: {" ".join(str(error).split())}'
    ) from error
  calls = executor.map_array(function, items) if items else []
  places = {id(call): item for call, item in zip(calls, items, strict=True)}
  try:
    for call in submitit.helpers.as_completed(
      calls, poll_frequency=_POLL_SECONDS
    ):
      yield places[id(call)], call
  finally:
    for call in calls:
      if not call.done():
        call.cancel(check=False)


def _ray(
  function: Callable[[Any], Any],
  items: Sequence[Any],
  plan: Plan,
  stop: Callable[[], None],
) -> Iterator[tuple[Any, Job]]:
  """Calls as tasks of Ray, on RAY_ADDRESS or else on this machine."""
  del stop
  import ray

  with contextlib.ExitStack() as stack:
    if not ray.is_initialized():
      ray.init(include_dashboard=False, logging_level='WARNING')
      stack.callback(ray.shutdown)  # Ends the tasks that run.

    def call(item):
      return function(item)

    try:
      task = ray.remote(**{'max_retries': 0, **plan.options})(call)
    except (ValueError, TypeError) as error:
      raise errors.SettingsError(f'--engine_options of ray: {error}') from error
    waiting = list(items)
    running: dict[Any, Any] = {}
    while waiting or running:
      while waiting and len(running) < plan.jobs:
        item = waiting.pop(0)
        running[task.remote(item)] = item
      (ended,), _ = ray.wait(list(running), num_returns=1)
      yield running.pop(ended), ended.future()


ENGINES = {'local': _local, 'slurm': _slurm, 'ray': _ray}
_PACKAGES = {'slurm': 'submitit', 'ray': 'ray'}


def run(
  function: Callable[[Any], Any],
  items: Sequence[Any],
  plan: Plan,
  *,
  stop: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Any, Job]]:
  """Calls a function with each item, and gives the calls as they end.

  If the iteration ends early, also by SIGTERM or an error, the other calls are
  cancelled.

  Args:
    function: a function of a module, or a partial of one.
    items: the items; they and the results are sent to other machines.
    plan: how the calls run.
    stop: ends the processes of local calls that run.

  Yields:
    An item and its ended job.

  Raises:
    SettingsError: if the engine is not installed, or refuses an option.
  """
  package = _PACKAGES.get(plan.engine)
  if package and importlib.util.find_spec(package) is None:
    raise errors.SettingsError(
      f'--engine={plan.engine} needs the package {package}: install the extra '
      f'`{plan.engine}`, or take --engine=local.'
    )
  calls = ENGINES[plan.engine](function, items, plan, stop)
  with contextlib.closing(calls):
    yield from calls


def parse_options(words: Iterable[str]) -> dict[str, Any]:
  """Parses options of an engine, such as `gpus_per_node=1`.

  Args:
    words: options; integers and decimal numbers are converted.

  Returns:
    Values by name.

  Raises:
    SettingsError: if a word is no `name=value`.
  """
  options: dict[str, Any] = {}
  for word in words:
    name, equals, value = word.partition('=')
    if not (name and equals):
      raise errors.SettingsError(
        f'--engine_options takes name=value, got {word!r}.'
      )
    options[name] = value
    for kind in (float, int):
      with contextlib.suppress(ValueError):
        options[name] = kind(value)
  return options


def describe(error: BaseException) -> str:
  """Formats the error of a job in one line, without a remote traceback."""
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  name = type(error).__name__
  return f'{name}: {lines[-1]}' if lines else name
