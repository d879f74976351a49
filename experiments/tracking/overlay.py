"""Draws results: boxes and paths, on frames or on white."""

import io
import math
import pathlib
import warnings

import numpy as np
from PIL import Image, ImageDraw

from experiments import harness
from experiments.harness.data import reading
from experiments.harness.store import files
from experiments.harness.study import films
from experiments.harness.study.plots import COLOURS
from experiments.tracking import mot_files

_TAIL = 30  # Frames of the path behind a box.
_LARGEST = 480  # Pixels of a side.
_LABEL = 12  # Height of an identity's number in pixels.
_MOST_PIXELS = 2**25  # Pixels of a frame, as many as 8K has.


def read_picture(images: files.Path, frame: int) -> Image.Image:
  """Reads a frame of a sequence.

  Args:
    images: folder of the frames, 000001.jpg and so on.
    frame: from 1.

  Returns:
    The picture, in RGB.

  Raises:
    MissingDataError: if it is missing.
    DamagedDataError: if it is no picture, or has too many pixels.
  """
  for end in ('jpg', 'png'):
    path = pathlib.Path(images) / f'{frame:06d}.{end}'
    if path.exists():
      reading.check_regular(path)
      with harness.parsing(path, 'picture'), _opened(path) as picture:
        pixels = math.prod(picture.size)
        if pixels > _MOST_PIXELS:
          raise reading.damaged(
            path,
            f'it has {pixels:,} pixels, more than {_MOST_PIXELS:,}',
            'give smaller frames',
          )
        return picture.convert('RGB')
  raise harness.MissingDataError(
    f'there is no picture {frame:06d}.jpg or .png in {images}: give the folder '
    'img1 of a sequence.'
  )


def _opened(path: pathlib.Path) -> Image.Image:
  """Opens a picture without the warning of Pillow, whose limit is higher."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', Image.DecompressionBombWarning)
    return Image.open(path)


def draw(
  shown: mot_files.Boxes,
  info: mot_files.Info,
  frame: int,
  *,
  images: files.Path | None = None,
) -> Image.Image:
  """Draws a frame with boxes and paths, one colour per identity.

  Args:
    shown: boxes with identities.
    info: of the sequence.
    frame: from 1.
    images: folder of the frames; None draws on white.

  Returns:
    The picture.
  """
  scale = min(1.0, _LARGEST / max(info.width, info.height))
  size = tuple(max(1, round(x * scale)) for x in (info.width, info.height))
  picture = Image.new('RGB', size, (255, 255, 255))
  if images is not None:
    picture = read_picture(images, frame).resize(size)
  pen = ImageDraw.Draw(picture)
  recent = shown.where((shown.frames <= frame) & (shown.frames > frame - _TAIL))
  feet = (recent.boxes[:, :2] + recent.boxes[:, 2:] * (0.5, 1.0)) * scale
  for identity in np.unique(recent.ids):
    colour = COLOURS[identity % len(COLOURS)]
    mask = recent.ids == identity
    pen.line([tuple(p) for p in feet[mask]], fill=colour, width=2)
    for left, top, wide, high in recent.boxes[mask & (recent.frames == frame)]:
      corners = np.array([left, top, left + wide, top + high]) * scale
      pen.rectangle(corners.tolist(), outline=colour, width=2)
      # Outside the box, since a number would hide a small one.
      above = corners[1] - _LABEL
      corner = corners[0], above if above >= 0 else corners[3] + 1
      pen.text(corner, str(identity), fill=colour)
  return picture


def check_suffix(path: files.Path) -> str:
  """Returns the suffix of an overlay, .png or .gif.

  Raises:
    SettingsError: if the suffix is another.
  """
  path = pathlib.Path(path)
  kind = path.suffix.lower()
  if kind not in ('.png', '.gif'):
    raise harness.SettingsError(
      f'{path.name}: an overlay must be a .png, of one frame, or a .gif.'
    )
  return kind


def write(
  path: files.Path,
  shown: mot_files.Boxes,
  info: mot_files.Info,
  *,
  images: files.Path | None = None,
  max_frames: int = 100,
) -> None:
  """Writes a picture of the middle frame, or a film.

  Args:
    path: ends in .png for a picture, .gif for a film.
    shown: boxes with identities.
    info: of the sequence.
    images: folder of the frames; None draws on white.
    max_frames: of a film, evenly spaced.

  Raises:
    SettingsError: if the suffix is another.
    MissingDataError: if a frame is missing.
  """
  path, kind = pathlib.Path(path), check_suffix(path)
  if kind == '.png':
    content = io.BytesIO()
    draw(shown, info, (info.length + 1) // 2, images=images).save(
      content, format='PNG'
    )
    files.write_bytes(path, content.getvalue())
  else:
    every = -(-info.length // max_frames)
    pictures = (
      draw(shown, info, frame, images=images)
      for frame in range(1, info.length + 1, every)
    )
    films.write_film(path, pictures, milliseconds=1000 * every / info.rate)
