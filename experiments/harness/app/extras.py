"""Packages of pip extras, imported when they are needed."""

import importlib
from typing import Any

from experiments.harness.app import errors


def load_extra(module: str, extra: str, purpose: str) -> Any:
  """Imports a module of an extra, or says how to install it.

  Args:
    module: its full name.
    extra: of `setup.cfg`.
    purpose: what needs it, for the message.

  Returns:
    The module.

  Raises:
    SettingsError: if it does not load; says why, and how to install it.
  """
  try:
    return importlib.import_module(module)
  except (ImportError, OSError) as error:  # OSError: a library is missing.
    raise errors.SettingsError(
      f'{purpose} needs the extra `{extra}`: pip install -e '
      f"'.[experiments,{extra}]' ({' '.join(str(error).split())})."
    ) from error
