"""Pictures of results: boxes and paths, on frames or on white."""

import io
import pathlib

import numpy as np
from PIL import Image, ImageDraw

from experiments import harness
from experiments.harness.store import files
from experiments.harness.study import films
from experiments.harness.study.plots import COLOURS
from experiments.tracking import mot_files

_TAIL = 30  # Frames of a path that are drawn behind a box.
_LARGEST = 480  # Pixels of a side.
_LABEL = 12  # Pixels that a number is high.


def read_picture(images: files.Path, frame: int) -> Image.Image:
  """A frame of a sequence.

  Args:
    images: folder of the frames, 000001.jpg and so on.
    frame: from 1.

  Returns:
    The picture, in colours.

  Raises:
    MissingDataError: if there is none.
    DamagedDataError: if it is no picture.
  """
  for end in ('jpg', 'png'):
    path = pathlib.Path(images) / f'{frame:06d}.{end}'
    if path.exists():
      with harness.parsing(path, 'picture'), Image.open(path) as picture:
        return picture.convert('RGB')
  raise harness.MissingDataError(
    f'there is no picture {frame:06d}.jpg or .png in {images}, the folder img1 '
    'of a sequence.'
  )


def draw(
  shown: mot_files.Boxes,
  info: mot_files.Info,
  frame: int,
  *,
  images: files.Path | None = None,
) -> Image.Image:
  """A frame with boxes and paths, a colour an identity.

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
    mine = recent.ids == identity
    pen.line([tuple(p) for p in feet[mine]], fill=colour, width=2)
    for left, top, wide, high in recent.boxes[mine & (recent.frames == frame)]:
      corners = np.array([left, top, left + wide, top + high]) * scale
      pen.rectangle(corners.tolist(), outline=colour, width=2)
      # Above the box, which a number would hide if it is small.
      above = corners[1] - _LABEL
      place = corners[0], above if above >= 0 else corners[3] + 1
      pen.text(place, str(identity), fill=colour)
  return picture


def kind_of(path: files.Path) -> str:
  """The end of an overlay's name, .png or .gif.

  Raises:
    SettingsError: if it ends in something else.
  """
  path = pathlib.Path(path)
  kind = path.suffix.lower()
  if kind not in ('.png', '.gif'):
    raise harness.SettingsError(
      f'{path.name}: an overlay is a .png, of one frame, or a .gif.'
    )
  return kind


def write(
  path: files.Path,
  shown: mot_files.Boxes,
  info: mot_files.Info,
  *,
  images: files.Path | None = None,
  most: int = 100,
) -> None:
  """Writes a picture of the middle frame, or a film of several.

  Args:
    path: ends in .png for a picture, in .gif for a film.
    shown: boxes with identities.
    info: of the sequence.
    images: folder of the frames; None draws on white.
    most: frames of a film, evenly spaced.

  Raises:
    SettingsError: if the name ends in something else.
    MissingDataError: if a frame is missing.
  """
  path, kind = pathlib.Path(path), kind_of(path)
  if kind == '.png':
    content = io.BytesIO()
    draw(shown, info, (info.length + 1) // 2, images=images).save(
      content, format='PNG'
    )
    files.write_bytes(path, content.getvalue())
  else:
    every = -(-info.length // most)
    pictures = (
      draw(shown, info, frame, images=images)
      for frame in range(1, info.length + 1, every)
    )
    films.write_film(path, pictures, milliseconds=1000 * every / info.rate)
