"""Errors whose message is all that a person at a command line needs.

`harness.run` shows them without a traceback. Each is also of the built-in type
that fits, which is what a caller catches.
"""

from typing import Any


class UserError(Exception):
  """Base of the errors below."""


class SettingsError(UserError, ValueError):
  """A setting that no run can have."""


class WriteError(UserError, OSError):
  """A folder cannot be written to."""


class OtherRunError(UserError, ValueError):
  """A folder holds a run with other settings, or of another program."""


class BusyError(UserError, OSError):
  """Another process is at work in a folder."""


class MissingDataError(UserError, FileNotFoundError):
  """A file of a data set, or what a run has saved, is missing."""


class DamagedDataError(UserError, ValueError):
  """A file of a data set is damaged, or of another format."""


class AllStoppedError(UserError, FloatingPointError):
  """All seeds became non-finite.

  Attributes:
    trained: the run so far, a `Trained`: what was reached before may
      count. None where there is none.
  """

  trained: Any = None
