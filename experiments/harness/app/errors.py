"""Errors of users, which `harness.run` prints in one line without a traceback.

Each class also derives from the built-in exception that a caller would catch.
"""

from typing import Any


class UserError(Exception):
  """Base of the errors below."""


class SettingsError(UserError, ValueError):
  """A setting is invalid."""


class WriteError(UserError, OSError):
  """A folder cannot be written to."""


class OtherRunError(UserError, ValueError):
  """A folder holds a run of another program, or with other settings."""


class BusyError(UserError, OSError):
  """Another process is using a folder."""


class MissingDataError(UserError, FileNotFoundError):
  """A data file or a checkpoint is missing."""


class DamagedDataError(UserError, ValueError):
  """A data file is damaged or has another format."""


class AllStoppedError(UserError, FloatingPointError):
  """All seeds became non-finite.

  Attributes:
    trained: the `Trained` up to that step, or None.
  """

  trained: Any = None
