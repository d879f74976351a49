"""Films, as small GIF files."""

import io
import pathlib
from collections.abc import Iterable

from PIL import Image

from experiments.harness.store import files

_SHORTEST = 20  # Milliseconds of a picture that all viewers show as asked.


def write_film(
  path: files.Path,
  pictures: Iterable[Image.Image],
  *,
  milliseconds: float,
  colours: int = 32,
) -> pathlib.Path:
  """Writes pictures as a film that begins anew at its end.

  Args:
    path: ends in .gif.
    pictures: at least one, of one size.
    milliseconds: that each is shown; 20 at least.
    colours: of a picture, at most.

  Returns:
    The path.

  Raises:
    WriteError: if it cannot be written; names the folder.
  """
  first, *rest = [picture.quantize(colours) for picture in pictures]
  content = io.BytesIO()
  first.save(
    content,
    format='GIF',
    save_all=True,
    append_images=rest,
    duration=max(_SHORTEST, round(milliseconds)),
    loop=0,
  )
  files.write_bytes(path, content.getvalue())
  return pathlib.Path(path)
