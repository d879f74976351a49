"""The package as users get it: its wheel, and environments without it."""

import pathlib
import shutil
import subprocess
import sys
import sysconfig

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = (
  *('bilevel_jax', 'README.md', 'LICENSE', 'setup.cfg', 'pyproject.toml'),
)


def run(*command, **fields):
  """Runs a command; an error shows what it printed."""
  done = subprocess.run(
    list(map(str, command)),
    capture_output=True,
    text=True,
    check=False,
    **fields,
  )
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
  return done.stdout


def copy_sources(folder: pathlib.Path) -> pathlib.Path:
  """Copies what the package is built from into a new folder."""
  folder.mkdir()
  for name in SOURCES:
    copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
    copy(ROOT / name, folder / name)
  return folder


def build_wheel(folder: pathlib.Path) -> pathlib.Path:
  """Builds the source distribution, and the wheel from it.

  Args:
    folder: an empty one; the checkout stays as it is.

  Returns:
    The wheel; the source distribution lies beside it.
  """
  source, out = copy_sources(folder / 'source'), folder / 'dist'
  run(sys.executable, '-m', 'build', '--outdir', out, source)
  (wheel,) = out.glob('*.whl')
  return wheel


def environment(
  folder: pathlib.Path, dependencies: bool = False
) -> pathlib.Path:
  """Makes an environment without the package.

  Args:
    folder: where to make it.
    dependencies: whether it sees what is installed here, apart from the
      package itself; otherwise it is empty.

  Returns:
    Its interpreter.
  """
  run(sys.executable, '-m', 'venv', folder / 'env')
  python = folder / 'env' / 'bin' / 'python'
  if dependencies:
    # Links, so that no path leads to the package.
    links = folder / 'links'
    links.mkdir()
    for path in pathlib.Path(sysconfig.get_path('purelib')).iterdir():
      if 'bilevel_jax' not in path.name and path.suffix != '.pth':
        (links / path.name).symlink_to(path)
    site = run(python, '-c', 'import site; print(site.getsitepackages()[0])')
    (pathlib.Path(site.strip()) / 'links.pth').write_text(str(links))
  return python
