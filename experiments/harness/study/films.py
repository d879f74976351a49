"""Writes films as small GIF files."""

import io
import pathlib
from collections.abc import Iterable

from PIL import Image

from experiments.harness.store import files

_MIN_MILLISECONDS = 20  # Viewers slow shorter frames down.


def write_film(
  path: files.Path,
  pictures: Iterable[Image.Image],
  *,
  milliseconds: float,
  colours: int = 32,
) -> pathlib.Path:
  """Writes frames as an endlessly repeating film.

  Args:
    path: path of the file, with the ending .gif.
    pictures: frames of the same size, at least one.
    milliseconds: duration of a frame, at least 20.
    colours: maximum number of colours of a frame.

  Returns:
    The path.

  Raises:
    WriteError: if the file cannot be written.
  """
  first, *rest = [picture.quantize(colours) for picture in pictures]
  content = io.BytesIO()
  first.save(
    content,
    format='GIF',
    save_all=True,
    append_images=rest,
    duration=max(_MIN_MILLISECONDS, round(milliseconds)),
    loop=0,
  )
  files.write_bytes(path, content.getvalue())
  return pathlib.Path(path)
