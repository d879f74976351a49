"""Draws results: boxes and paths, on frames or on white."""

import functools
import io
import itertools
import math
import pathlib
import warnings
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, ImageDraw

from experiments import harness
from experiments.harness.data import reading
from experiments.harness.store import files
from experiments.harness.study import films
from experiments.harness.study.plots import COLOURS
from experiments.tracking import mot_files, videos

_TAIL = 30  # Frames of the path behind a box.
_LARGEST = 480  # Pixels of a side, except in videos.
_MOST_PIXELS = 2**26  # Of a frame that is read: twice 7,680 x 4,320.
_LABEL = 12  # Height of an identity's number in pixels, at least.


def read_picture(images: files.Path, frame: int) -> Image.Image:
  """Reads a frame of a sequence.

  Args:
    images: folder of the frames, 000001.jpg and so on.
    frame: from 1.

  Returns:
    The picture, in RGB.

  Raises:
    MissingDataError: if it is missing.
    DamagedDataError: if it is no picture, is too large, or is a link out of the
      folder.
  """
  for end in ('jpg', 'png'):
    path = pathlib.Path(images) / f'{frame:06d}.{end}'
    if path.exists():
      reading.check_regular(path)
      reading.check_inside(path, images)
      return _read(path)
  raise harness.MissingDataError(
    f'there is no picture {frame:06d}.jpg or .png in {images}: give the folder '
    'img1 of a sequence.'
  )


def _read(path: pathlib.Path) -> Image.Image:
  # Other formats run programs, such as an interpreter of PostScript. Pillow
  # warns of sizes that are refused here.
  with (
    reading.parsing(path, 'picture'),
    warnings.catch_warnings(
      action='ignore', category=Image.DecompressionBombWarning
    ),
    Image.open(path, formats=('JPEG', 'PNG')) as picture,
  ):
    if math.prod(picture.size) > _MOST_PIXELS:
      width, height = picture.size
      raise reading.damaged(
        path,
        f'it has {width:,} x {height:,} pixels; at most {_MOST_PIXELS:,} are '
        'read',
        'make it smaller',
      )
    return picture.convert('RGB')


def draw(
  shown: mot_files.Boxes,
  info: mot_files.Info,
  frame: int,
  *,
  picture: Image.Image | None = None,
  max_side: int = _LARGEST,
) -> Image.Image:
  """Draws a frame with boxes and paths, one colour per identity.

  Args:
    shown: boxes with identities.
    info: of the sequence.
    frame: from 1.
    picture: of the frame; None draws on white.
    max_side: larger pictures are reduced to this side, in pixels.

  Returns:
    The picture.
  """
  scale = min(1.0, max_side / max(info.width, info.height))
  size = tuple(max(1, round(x * scale)) for x in (info.width, info.height))
  if picture is None:
    picture = Image.new('RGB', size, (255, 255, 255))
  else:
    picture = picture.resize(size)
  label = max(_LABEL, size[1] // 40)
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
      above = corners[1] - label
      corner = corners[0], above if above >= 0 else corners[3] + 1
      pen.text(corner, str(identity), fill=colour, font_size=label - 2)
  return picture


def check_suffix(path: files.Path) -> str:
  """Returns the suffix of an overlay: .png, .gif or that of a video.

  Raises:
    SettingsError: if the suffix is another, or a video lacks its extra.
  """
  path = pathlib.Path(path)
  kind = path.suffix.lower()
  if kind in videos.ENDINGS:
    videos.check()
  elif kind not in ('.png', '.gif'):
    raise harness.SettingsError(
      f'{path.name}: an overlay must be a .png, of one frame, a .gif, or a '
      f'video: {", ".join(videos.ENDINGS)}.'
    )
  return kind


def open_images(path: files.Path) -> files.Path | videos.Video:
  """Opens frames to draw on: a folder stays, and a file is a video."""
  return path if pathlib.Path(path).is_dir() else videos.open_video(path)


def _pictures(
  shown: mot_files.Boxes,
  info: mot_files.Info,
  images: files.Path | videos.Video | None,
) -> Iterator[tuple[int, Callable[[], Image.Image | None]]]:
  """Frames, and functions that return their pictures, None for white."""
  if not isinstance(images, videos.Video):
    for frame in range(1, info.length + 1):
      read = functools.partial(read_picture, images, frame)
      yield frame, (lambda: None) if images is None else read
    return
  last, frame = 0, int(shown.frames.max(initial=0))
  for last, picture in enumerate(images.frames(), 1):
    yield last, functools.partial(Image.Image.copy, picture)
  if last < frame:
    raise harness.DamagedDataError(
      f'{images.path} has {last} frames, but there are boxes in frame {frame}: '
      'give the video of these detections.'
    )


def write(
  path: files.Path,
  shown: mot_files.Boxes,
  info: mot_files.Info,
  *,
  images: files.Path | videos.Video | None = None,
  max_frames: int = 100,
) -> None:
  """Writes a picture of the middle frame, a film, or a video of all frames.

  Args:
    path: ends in .png for a picture, .gif for a film, or as a video.
    shown: boxes with identities.
    info: of the sequence.
    images: folder of the frames, or their video; None draws on white.
    max_frames: of a film, evenly spaced.

  Raises:
    SettingsError: if the suffix is another, or a video lacks its extra.
    MissingDataError: if a frame is missing.
    DamagedDataError: if a frame is damaged, or the video is shorter than the
      result.
  """
  path, kind = pathlib.Path(path), check_suffix(path)
  if isinstance(images, videos.Video):
    info = info._replace(
      width=images.width, height=images.height, rate=images.rate
    )
  pictures = _pictures(shown, info, images)
  if kind == '.png':
    middle = (info.length + 1) // 2
    chosen = itertools.islice(pictures, middle - 1, middle)
  else:
    every = 1 if kind in videos.ENDINGS else -(-info.length // max_frames)
    chosen = itertools.islice(pictures, 0, None, every)
  side = max(info[2:4]) if kind in videos.ENDINGS else _LARGEST
  drawn = (
    draw(shown, info, frame, picture=read(), max_side=side)
    for frame, read in chosen
  )
  if kind == '.png':
    content = io.BytesIO()
    picture = next(drawn, None)
    if picture is None:
      raise harness.DamagedDataError(
        f'{images.path} ends before frame {middle}: give the video of these '
        'detections.'
      )
    picture.save(content, format='PNG')
    files.write_bytes(path, content.getvalue())
  elif kind == '.gif':
    films.write_film(path, drawn, milliseconds=1000 * every / info.rate)
  else:
    videos.write(path, drawn, rate=info.rate)
