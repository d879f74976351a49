"""Silences orbax while the harness reports its errors in one message."""

import contextlib
import logging
import pathlib
import sys
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def silenced() -> Iterator[None]:
  """Hides what orbax prints besides raising an error.

  Otherwise its log repeats the error, its threads print tracebacks, and other
  pending reads or writes complain about a closed event loop.
  """
  in_thread, unraisable = before = threading.excepthook, sys.unraisablehook

  def in_other_thread(arguments):
    if not type(arguments.thread).__module__.startswith('orbax.'):
      in_thread(arguments)

  def other_unraisable(arguments):
    if str(arguments.exc_value) != 'Event loop is closed':
      unraisable(arguments)

  logging.getLogger('absl').addFilter(_not_from_orbax)
  threading.excepthook = in_other_thread
  sys.unraisablehook = other_unraisable
  try:
    yield
  finally:
    logging.getLogger('absl').removeFilter(_not_from_orbax)
    threading.excepthook, sys.unraisablehook = before


def _not_from_orbax(record: logging.LogRecord) -> bool:
  return 'orbax' not in pathlib.Path(record.pathname).parts
