"""System calls of a child process that fail, by seccomp's user notification.

    calls = Calls(folder)
    process = subprocess.Popen(command, pass_fds=[calls.child.fileno()])
    calls.watch(process)

The child calls `install(descriptor)` before it starts threads: from then on the
kernel asks this process before each call that writes, also before those of
native code. `calls.arm('rename', 3, errno.EIO)` makes the third rename below
the folder fail. Nothing is compiled, and no privilege is needed.
"""

import array
import collections
import ctypes
import errno
import fcntl
import os
import pathlib
import platform
import select
import signal
import socket
import struct
import subprocess
import threading
from typing import NamedTuple

# Kinds of calls: by machine, their numbers in the kernel's tables.
_NUMBERS = {
  'x86_64': {
    'write': (1, 18, 20, 296, 328),
    'sync': (74, 75),
    'rename': (82, 264, 316),
    'mkdir': (83, 258),
    'unlink': (84, 87, 263),
    'open': (2, 257),
    'truncate': (77,),
  },
  'aarch64': {
    'write': (64, 66, 68, 70, 287),
    'sync': (82, 83),
    'rename': (38, 276),
    'mkdir': (34,),
    'unlink': (35,),
    'open': (56,),
    'truncate': (46,),
  },
}.get(platform.machine(), {})
KINDS = tuple(_NUMBERS)
# Errors that a kernel may report for each kind.
ERRORS = {
  'write': errno.ENOSPC,
  'sync': errno.EIO,
  'rename': errno.EIO,
  'mkdir': errno.ENOSPC,
  'unlink': errno.EACCES,
  'open': errno.EMFILE,
  'truncate': errno.EIO,
}
_KINDS = {n: kind for kind, numbers in _NUMBERS.items() for n in numbers}
# Calls whose first argument is a path; the second one is for the others.
_PLAIN_PATHS = (2, 82, 83, 84, 87) if platform.machine() == 'x86_64' else ()
_PLAIN_OPEN = 2 if platform.machine() == 'x86_64' else -1
_SECCOMP = {'x86_64': 317, 'aarch64': 277}.get(platform.machine())

_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_NOTIFICATION = struct.Struct('=QIIiIQ6Q')
_RESPONSE = struct.Struct('=QqiI')
_CONTINUE = 1


class _Filter(ctypes.Structure):
  _fields_ = (
    ('code', ctypes.c_ushort),
    ('jt', ctypes.c_ubyte),
    ('jf', ctypes.c_ubyte),
    ('k', ctypes.c_uint),
  )


class _Program(ctypes.Structure):
  _fields_ = (('len', ctypes.c_ushort), ('filter', ctypes.POINTER(_Filter)))


def install(descriptor: int) -> None:
  """Makes this process ask the one at the other end of a socket.

  Args:
    descriptor: of the socket, from `Calls.child`.

  Raises:
    OSError: if the kernel has no such filter.
  """
  numbers = sorted(_KINDS)
  code = [_Filter(0x20, 0, 0, 0)]  # Loads the number of the call.
  for index, number in enumerate(numbers):
    code.append(_Filter(0x15, len(numbers) - index, 0, number))
  code.append(_Filter(0x06, 0, 0, 0x7FFF0000))  # Allows it.
  code.append(_Filter(0x06, 0, 0, 0x7FC00000))  # Asks.
  program = _Program(len(code), (_Filter * len(code))(*code))
  libc = ctypes.CDLL(None, use_errno=True)
  with socket.socket(fileno=os.dup(descriptor)) as end:
    # Sent by `sendmsg`, which is not filtered.
    if libc.prctl(38, 1, 0, 0, 0):
      raise OSError(ctypes.get_errno(), 'prctl')
    listener = libc.syscall(_SECCOMP, 1, 8, ctypes.byref(program))
    if listener < 0:
      raise OSError(ctypes.get_errno(), 'seccomp')
    end.sendmsg(
      [b'f'],
      [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [listener]))],
    )
  os.close(listener)


class Fault(NamedTuple):
  """A call that fails.

  Attributes:
    kind: of `KINDS`.
    number: from 1, among the calls of this kind below the folder.
    error: number of the error, or 0: the process is killed before the call.
  """

  kind: str
  number: int
  error: int


class Calls:
  """Counts the calls of a child below a folder, and lets one of them fail."""

  def __init__(self, folder: pathlib.Path):
    self._folder = f'{folder}/'
    self._parent, self.child = socket.socketpair()
    self._fault: Fault | None = None
    self.counts: collections.Counter[str] = collections.Counter()
    self.fired = ''  # The path of the call that failed.

  def watch(self, process: subprocess.Popen[str]) -> None:
    """Waits for the filter of a child, and serves it until it ends."""
    self.child.close()
    _, fds, _, _ = socket.recv_fds(self._parent, 1, 1)
    if not fds:
      raise OSError(f'the child ended: {process.wait()}')
    self._parent.close()
    threading.Thread(target=self._serve, args=fds, daemon=True).start()

  def arm(self, fault: Fault | None) -> None:
    """Counts from 0, and lets this call fail; None lets all succeed."""
    self.counts, self.fired = collections.Counter(), ''
    self._fault = fault

  def _serve(self, listener: int) -> None:
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    while True:
      ((_, events),) = poll.poll()
      if not events & select.POLLIN:
        return os.close(listener)
      content = bytearray(_NOTIFICATION.size)
      try:
        fcntl.ioctl(listener, _RECEIVE, content)
        answer = self._answer(_NOTIFICATION.unpack(content))
        fcntl.ioctl(listener, _SEND, bytearray(answer))
      except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EINTR):  # It has gone.
          raise

  def _answer(self, call: tuple[int, ...]) -> bytes:
    unique, task, _, number, _, _, *arguments = call
    go_on = _RESPONSE.pack(unique, 0, 0, _CONTINUE)
    try:
      path = _path(task, number, arguments)
    except OSError:
      return go_on
    if path is None or not path.startswith(self._folder):
      return go_on
    kind = _KINDS[number]
    self.counts[kind] += 1
    fault = self._fault
    if not fault or (kind, self.counts[kind]) != fault[:2]:
      return go_on
    self.fired = path
    if not fault.error:
      os.kill(task, signal.SIGKILL)
      return go_on
    return _RESPONSE.pack(unique, 0, -fault.error, 0)


def _path(task: int, number: int, arguments: list[int]) -> str | None:
  """Returns the path of a call; None if it only reads."""
  kind, proc = _KINDS[number], f'/proc/{task}'
  if kind in ('write', 'sync', 'truncate'):
    return os.readlink(f'{proc}/fd/{arguments[0]}')
  plain = number in _PLAIN_PATHS
  if kind == 'open':
    flags = arguments[1 if number == _PLAIN_OPEN else 2]
    if not flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
      return None
  with open(f'{proc}/mem', 'rb', buffering=0) as memory:
    memory.seek(arguments[0 if plain else 1])
    name = os.fsdecode(memory.read(4096).partition(b'\0')[0])
  if os.path.isabs(name):
    return name
  at = ctypes.c_int(arguments[0]).value
  base = 'cwd' if plain or at == -100 else f'fd/{at}'
  return os.path.join(os.readlink(f'{proc}/{base}'), name)
