"""Imports of packages from pip extras."""

import importlib
from typing import Any

from experiments.harness.app import errors


def load_extra(module: str, extra: str, purpose: str) -> Any:
  """Imports a module of a pip extra.

  Args:
    module: full name of the module.
    extra: name of the extra in `setup.cfg`.
    purpose: what needs the module, for the message.

  Returns:
    The module.

  Raises:
    SettingsError: if the import fails; says why and how to install the extra.
  """
  try:
    return importlib.import_module(module)
  except (ImportError, OSError) as error:  # OSError: a library is missing.
    raise errors.SettingsError(
      f'{purpose} needs the extra `{extra}`: pip install -e '
      f"'.[experiments,{extra}]' ({' '.join(str(error).split())})."
    ) from error
