"""Declarations of papers in their `claims.py`, and commands of their runs."""

import configparser
import importlib
import importlib.metadata
import os
import pathlib
import re
import types
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from experiments.harness.app import errors
from experiments.harness.study.claim import Claim, Run

ROOT = pathlib.Path(__file__).parents[3]


class Declared(NamedTuple):
  """The declarations of a paper.

  Attributes:
    runs: runs by name.
    claims: claims about these runs.
  """

  runs: Mapping[str, Run]
  claims: tuple[Claim, ...]


class Command(NamedTuple):
  """The command of a run.

  Attributes:
    paper: folder of the paper.
    name: name of the run.
    module: module of the binary.
    flags: arguments, without the workdir.
  """

  paper: str
  name: str
  module: str
  flags: tuple[str, ...]

  @property
  def words(self) -> list[str]:
    """The command without the interpreter and the workdir."""
    return ['-m', self.module, *self.flags]

  @property
  def folder(self) -> str:
    """The subfolder of `reproduce`'s workdir, one per folder of data."""
    data = [f for f in self.flags if f.startswith('--data_dir=')]
    suffix = f'-data-{zlib.crc32(data[0].encode()):08x}' if data else ''
    return f'{self.paper}/{self.name}{suffix}'


def discover(root: pathlib.Path = ROOT) -> tuple[str, ...]:
  """Returns the folders of papers with claims, sorted."""
  return tuple(
    sorted(path.parent.name for path in root.glob('experiments/*/claims.py'))
  )


def load(papers: Iterable[str] = ()) -> dict[str, Declared]:
  """Loads the declarations of papers.

  Args:
    papers: folders of papers; all if empty.

  Returns:
    Runs and claims by paper.

  Raises:
    SettingsError: if a paper is unknown, or declares too little.
  """
  known = discover()
  for paper in papers:
    if paper not in known:
      raise errors.SettingsError(
        f'no claims of {paper!r} (experiments/{paper}/claims.py); known: '
        f'{", ".join(known)}.'
      )
  modules = {paper: claims_module(paper) for paper in papers or known}
  return {name: Declared(x.RUNS, x.CLAIMS) for name, x in modules.items()}


def claims_module(paper: str) -> types.ModuleType:
  """Imports `claims.py` of a folder; SettingsError if it declares too little.

  A field without a paper declares `PAPER = None`, and is in no table of papers.
  """
  module = importlib.import_module(f'experiments.{paper}.claims')
  if missing := {'PAPER', 'RUNS', 'CLAIMS'} - set(vars(module)):
    raise errors.SettingsError(
      f'experiments/{paper}/claims.py does not declare '
      f'{", ".join(sorted(missing))}: see "Add a paper" in CONTRIBUTING.md.'
    )
  return module


def commands(
  papers: Mapping[str, Declared],
  *,
  preset: str,
  data_dir: str | None,
  only: Sequence[str] = (),
) -> dict[tuple[str, str], Command]:
  """Returns the commands of runs by paper and name.

  Args:
    papers: declarations by paper.
    preset: smoke, quick or paper.
    data_dir: folder of data sets; None for packaged data.
    only: names of runs, `paper/name`, each with its own preset; all runs of the
      preset if empty.

  Returns:
    The commands.

  Raises:
    SettingsError: if a run is unknown.
  """
  for name in only:
    paper, _, run = name.partition('/')
    if run not in (papers[paper].runs if paper in papers else {}):
      known = [f'{p}/{n}' for p, x in papers.items() for n in x.runs]
      raise errors.SettingsError(
        f'there is no run {name}; there are {", ".join(known)}.'
      )
  folder = None if data_dir is None else os.path.abspath(data_dir)
  return {
    (paper, name): Command(
      paper,
      name,
      f'experiments.{paper}.{run.binary}',
      run.words(run.preset if only else preset, folder),
    )
    for paper, declared in papers.items()
    for name, run in declared.runs.items()
    if (f'{paper}/{name}' in only if only else preset in run.presets)
  }


def judged_in(
  papers: Mapping[str, Declared],
  commands: Mapping[tuple[str, str], Command],
  preset: str,
) -> list[tuple[Claim, Command]]:
  """Returns the claims of a preset with the commands that measure them."""
  judged = []
  for paper, declared in papers.items():
    for claim in declared.claims:
      command = commands.get((paper, claim.run))
      if command and preset in claim.presets:
        judged.append((claim, command))
  return judged


def why_missing(extra: str) -> str:
  """Returns why a pip extra is unavailable; '' if it is installed."""
  if not extra:
    return ''
  setup = configparser.ConfigParser()
  setup.read(ROOT / 'setup.cfg')
  packages = setup.get('options.extras_require', extra, fallback=None)
  if packages is None:
    return f'setup.cfg has no extra `{extra}`'
  for line in packages.split():
    try:
      importlib.metadata.version(re.split(r'[^\w.-]', line)[0])
    except importlib.metadata.PackageNotFoundError:
      return f'needs the extra `{extra}`'
  return ''
