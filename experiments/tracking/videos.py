"""Reads and writes videos, with `imageio` and PyAV from the extra `video`."""

import pathlib
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from experiments import harness
from experiments.harness.app import extras
from experiments.harness.store import files

ENDINGS = ('.mp4', '.mkv', '.mov', '.avi')


class Video(NamedTuple):
  """A video file.

  Attributes:
    path: of the file.
    width: of a frame, in pixels.
    height: of a frame, in pixels.
    rate: frames/s.
  """

  path: pathlib.Path
  width: int
  height: int
  rate: float

  def frames(self) -> Iterator[Image.Image]:
    """Decodes the frames, one at a time."""
    with harness.parsing(self.path, 'video'), _open(self.path, 'r') as file:
      for frame in file.iter():
        yield Image.fromarray(frame)


def _open(path: pathlib.Path, mode: str) -> Any:
  extras.load_extra('av', 'video', 'a video')
  imageio = extras.load_extra('imageio.v3', 'video', 'a video')
  return imageio.imopen(path, mode, plugin='pyav')


def check() -> None:
  """Raises SettingsError without the extra `video`; says how to install it."""
  for module in ('av', 'imageio.v3'):
    extras.load_extra(module, 'video', 'a video')


def open_video(path: files.Path) -> Video:
  """Opens a video.

  Args:
    path: of the file, in any format that FFmpeg reads.

  Returns:
    Its properties.

  Raises:
    SettingsError: without the extra `video`.
    MissingDataError: if the file is missing.
    DamagedDataError: if it is no video.
  """
  path = pathlib.Path(path)
  check()
  if not path.is_file():
    raise harness.MissingDataError(f'there is no video {path}.')
  with harness.parsing(path, 'video'), _open(path, 'r') as file:
    rate = float(file.metadata(exclude_applied=False).get('fps') or 0)
    height, width = next(file.iter()).shape[:2]
    return Video(path, width, height, rate if rate > 0 else 25.0)


def write(
  path: files.Path, pictures: Iterable[Image.Image], *, rate: float
) -> None:
  """Writes pictures as a video, in H.264.

  Args:
    path: of the file; the ending, one of `ENDINGS`, gives the container.
    pictures: frames of the same size, at least one.
    rate: frames/s.

  Raises:
    SettingsError: without the extra `video`.
    WriteError: if the file cannot be written.
  """
  path = pathlib.Path(path)
  with tempfile.TemporaryDirectory() as folder:
    temporary = pathlib.Path(folder) / f'video{path.suffix.lower()}'
    with _open(temporary, 'w') as file:
      file.init_video_stream('libx264', fps=rate)
      for picture in pictures:
        # The colours have half the resolution, so sizes are even.
        frame = np.asarray(picture)
        odd = [(0, side % 2) for side in frame.shape[:2]]
        file.write_frame(np.pad(frame, [*odd, (0, 0)], mode='edge'))
    files.write_bytes(path, temporary.read_bytes())
