"""Packages of the extra `asr`, imported when they are needed."""

import importlib
from typing import Any

from experiments import harness

INSTALL = "pip install -e '.[experiments,asr]'"


def need(package: str, what: str) -> Any:
  """Imports a package of the extra, or says how to install it.

  Args:
    package: its name.
    what: is done by it, for the message.

  Returns:
    The package.

  Raises:
    SettingsError: if it is not installed, or lacks its library; says how to.
  """
  try:
    return importlib.import_module(package)
  except (ImportError, OSError) as error:  # OSError: no library libsndfile.
    raise harness.SettingsError(
      f'{what} needs the package {package}, which does not load '
      f'({" ".join(str(error).split())}): {INSTALL}.'
    ) from error
