"""The environment of the packages that the benchmarks compare with.

It is created once in the user's cache folder from `requirements.txt`;
`BILEVEL_JAX_PEERS` is the Python of another one. Steps of the packages run in
processes of this environment (`peers/serve.py`), which return timings on
request.

Two peers are repositories instead of packages. They are cloned into the same
folder at a fixed commit, unless a clone exists.
"""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import threading
import venv
from collections.abc import Iterator, Mapping
from typing import Any

from experiments.harness.app import errors

PYTHON_VARIABLE = 'BILEVEL_JAX_PEERS'
# Time limit of a process for a row, s.
_LIMIT = 1_800.0
HERE = pathlib.Path(__file__).parent
REQUIREMENTS = HERE / 'requirements.txt'
REPOSITORIES = {
  'benchmark_bilevel': (
    'https://github.com/benchopt/benchmark_bilevel',
    '3ad65dccff5cce27a656630a4f98be52920850b4',
  ),
  'purejaxrl': (
    'https://github.com/luchris429/purejaxrl',
    '31756b197773a52db763fdbe6d635e4b46522a73',
  ),
}


class MissingPeerError(errors.UserError):
  """A package to compare with is missing."""


def cache() -> pathlib.Path:
  """Returns the folder of environments and clones."""
  base = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return pathlib.Path(base) / 'bilevel_jax' / 'peers'


class Peers:
  """Packages to compare with.

  Attributes:
    choice: 'auto' for the Python in BILEVEL_JAX_PEERS, or else the environment
      in the cache folder, which is created if missing; 'none'; or the Python of
      an environment.
  """

  def __init__(self, choice: str = 'auto') -> None:
    """Stores the choice; the environment is created on demand."""
    self.choice = choice

  @functools.cached_property
  def python(self) -> str:
    """The Python of the environment.

    Raises:
      MissingPeerError: if there is none, or it cannot be created.
    """
    if self.choice == 'none':
      raise MissingPeerError('left out by --peers=none')
    named = os.environ.get(PYTHON_VARIABLE) if self.choice == 'auto' else None
    interpreter = named or (self.choice if self.choice != 'auto' else None)
    if interpreter is None:
      return str(_make())
    if not os.access(interpreter, os.X_OK) or os.path.isdir(interpreter):
      raise MissingPeerError(f'{interpreter} is not an executable Python')
    return interpreter

  def require(self, *packages: str) -> None:
    """Raises MissingPeerError if the environment lacks one of the packages."""
    missing = [name for name in packages if not self._has(name)]
    if missing:
      raise MissingPeerError(
        f'the environment of {self.python} lacks {", ".join(missing)}'
      )

  @functools.cache  # noqa: B019 - one object per command.
  def _has(self, package: str) -> bool:
    code = (
      'import importlib.util, sys; '
      f'sys.exit(importlib.util.find_spec({package!r}) is None)'
    )
    done = subprocess.run([self.python, '-I', '-c', code], check=False)
    return done.returncode == 0

  @contextlib.contextmanager
  def process(
    self, module: str, case: str, **options: Any
  ) -> Iterator['Process']:
    """Starts a process that runs a case of a module in `peers`.

    Args:
      module: name of the module.
      case: name of its function from the options to a step.
      **options: plain values.

    Yields:
      A `Process`.
    """
    script = HERE / 'peers' / 'serve.py'
    command = [self.python, '-E', '-s', str(script), module, case]
    with _started(command, options) as process:
      yield process


@contextlib.contextmanager
def own_process(module: str, case: str, **options: Any) -> Iterator['Process']:
  """Starts a process of our environment, to measure its memory separately.

  Args:
    module: full name of the module.
    case: name of its function from the options to `run(steps)`.
    **options: plain values.

  Yields:
    A `Process`.
  """
  script = HERE / 'peers' / 'serve.py'
  command = [sys.executable, str(script), module, case]
  paths = [str(HERE.parents[1]), os.environ.get('PYTHONPATH', '')]
  path = os.pathsep.join(filter(None, paths))
  environment = {**os.environ, 'PYTHONPATH': path}
  with _started(command, options, environment) as process:
    yield process


class Process:
  """A step in another process."""

  def __init__(
    self, process: subprocess.Popen, what: str, options: Mapping[str, Any]
  ) -> None:
    """Sends the options, and waits until the step is compiled."""
    self._process, self._what = process, what
    self._ask(json.dumps(options))

  def run(self, steps: int) -> tuple[float, float]:
    """Runs steps, and returns their wall and CPU seconds."""
    answer = self._ask(f'run {steps}')
    return answer['wall'], answer['cpu']

  def memory(self) -> int:
    """Returns the peak memory of the steps above that after the imports."""
    return self._ask('memory')['bytes']

  def _ask(self, request: str) -> dict[str, Any]:
    try:
      self._process.stdin.write(f'{request}\n')
      self._process.stdin.flush()
    except BrokenPipeError:
      pass  # Its last answer is read below.
    return self._read()

  def _read(self) -> dict[str, Any]:
    for line in self._process.stdout:
      # Packages may print other lines before the answer.
      if line.startswith('@'):
        answer = json.loads(line[1:])
        if 'error' in answer:
          raise MissingPeerError(f'{self._what} failed: {answer["error"]}')
        return answer
    status = self._process.wait()
    raise MissingPeerError(f'{self._what} ended with status {status}')


@contextlib.contextmanager
def _started(command, options, environment=None):
  process = subprocess.Popen(
    command,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
    env=environment,
  )
  # If the process hangs, its row fails and the others continue.
  timer = threading.Timer(_LIMIT, process.kill)
  timer.daemon = True
  timer.start()
  try:
    yield Process(process, '/'.join(command[-2:]), options)
  finally:
    timer.cancel()
    process.kill()
    with contextlib.suppress(OSError):  # It may not have read everything.
      process.stdin.close()
    process.stdout.close()
    process.wait()


def repository(name: str) -> pathlib.Path:
  """Returns the folder of a clone, which is created if missing.

  Raises:
    MissingPeerError: if the repository cannot be cloned.
  """
  address, commit = REPOSITORIES[name]
  folder = cache() / 'repositories' / name
  if not folder.exists():
    partial = folder.with_name(f'{name}.{os.getpid()}')
    partial.parent.mkdir(parents=True, exist_ok=True)
    for command in (
      ['git', 'clone', '--quiet', address, str(partial)],
      ['git', '-C', str(partial), 'checkout', '--quiet', commit],
    ):
      done = subprocess.run(
        command, capture_output=True, text=True, check=False
      )
      if done.returncode:
        raise MissingPeerError(
          f'{name} cannot be cloned ({_last(done.stderr)}); put a clone of '
          f'{address} at {folder}'
        )
    partial.rename(folder)
  return folder


def _make() -> pathlib.Path:
  """Creates the environment of `requirements.txt` if it is missing."""
  digest = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:12]
  folder = cache() / digest
  python = folder / 'bin' / 'python'
  done = folder / 'complete'
  if done.exists():
    return python
  print(
    f'Creating the environment of the packages to compare with in {folder} '
    '(2 to 8 GB, some minutes; --peers=none leaves them out).',
    flush=True,
  )
  venv.create(folder, with_pip=True, clear=True)
  install = subprocess.run(
    [str(python), '-m', 'pip', 'install', '-q', '-r', str(REQUIREMENTS)],
    capture_output=True,
    text=True,
    check=False,
  )
  if install.returncode:
    raise MissingPeerError(
      f'the packages of {REQUIREMENTS.name} could not be installed: '
      f'{_last(install.stderr)}'
    )
  done.touch()
  return python


def _last(text: str) -> str:
  return (text.strip().splitlines() or ['no message'])[-1]
