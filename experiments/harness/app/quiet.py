"""Silence of orbax about errors that the harness tells by itself."""

import logging
import pathlib
import sys
import threading


class Quiet:
  """Leaves an error of orbax to its one message, from `start` to `stop`.

  Otherwise its log repeats it, its threads print their tracebacks, and reads or
  writes that are under way when one fails complain about a closed event loop.
  """

  def start(self) -> None:
    """Begins to be quiet."""
    logging.getLogger('absl').addFilter(_not_of_orbax)
    self._before = threading.excepthook, sys.unraisablehook
    in_thread, unraisable = self._before

    def in_other_thread(arguments):
      if not type(arguments.thread).__module__.startswith('orbax.'):
        in_thread(arguments)

    def other_unraisable(arguments):
      if str(arguments.exc_value) != 'Event loop is closed':
        unraisable(arguments)

    threading.excepthook = in_other_thread
    sys.unraisablehook = other_unraisable

  def stop(self) -> None:
    """Puts back what was."""
    logging.getLogger('absl').removeFilter(_not_of_orbax)
    threading.excepthook, sys.unraisablehook = self._before


def _not_of_orbax(record: logging.LogRecord) -> bool:
  return 'orbax' not in pathlib.Path(record.pathname).parts
