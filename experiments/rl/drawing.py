"""Pictures of environment states, as arrays of colours."""

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from experiments import harness

# One colour per channel, from the palette of Okabe and Ito.
_COLOURS = np.array(
  [
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (86, 180, 233),
    (230, 159, 0),
    (240, 228, 66),
    (120, 120, 120),
    (60, 60, 60),
    (180, 40, 40),
  ],
  np.uint8,
)
_WHITE, _GREY = (255, 255, 255), (150, 150, 150)


def painter(env: str) -> Callable[[Any, Any], np.ndarray]:
  """Finds the function that draws an environment.

  Args:
    env: name of the environment.

  Returns:
    (state, observation) -> colours, uint8 (height, width, 3).

  Raises:
    SettingsError: if the environment cannot be drawn.
  """
  if env == 'CartPole-v1':
    return cart_pole
  if env == 'Acrobot-v1':
    return acrobot
  if env.endswith('-MinAtar'):
    return cells
  raise harness.SettingsError(
    f'{env} cannot be drawn; CartPole-v1, Acrobot-v1 and the games of MinAtar '
    'can.'
  )


def cart_pole(state: Any, observation: Any) -> np.ndarray:
  """Draws a cart on a rail from -2.4 to 2.4, and its pole."""
  del observation
  image = Image.new('RGB', (240, 120), _WHITE)
  pen = ImageDraw.Draw(image)
  scale, ground = 240 / 4.8, 95
  x = 120 + scale * float(state.x)
  pen.line([(0, ground), (240, ground)], fill=_GREY, width=2)
  pen.rectangle([x - 20, ground - 14, x + 20, ground - 2], fill=(0, 114, 178))
  angle = float(state.theta)
  end = (x + 70 * np.sin(angle), ground - 14 - 70 * np.cos(angle))
  pen.line([(x, ground - 14), end], fill=(213, 94, 0), width=6)
  return np.asarray(image)


def acrobot(state: Any, observation: Any) -> np.ndarray:
  """Draws two links from a fixed joint, and the height to reach."""
  del observation
  image = Image.new('RGB', (160, 160), _WHITE)
  pen = ImageDraw.Draw(image)
  joint, scale = np.array([80.0, 80.0]), 36.0
  one, two = float(state.joint_angle1), float(state.joint_angle2)
  elbow = joint + scale * np.array([np.sin(one), np.cos(one)])
  tip = elbow + scale * np.array([np.sin(one + two), np.cos(one + two)])
  pen.line([(0, 80 - scale), (160, 80 - scale)], fill=_GREY, width=1)
  for start, end, colour in (
    (joint, elbow, (0, 114, 178)),
    (elbow, tip, (213, 94, 0)),
  ):
    pen.line([tuple(start), tuple(end)], fill=colour, width=6)
  return np.asarray(image)


def cells(state: Any, observation: Any) -> np.ndarray:
  """Draws cells, each in the colour of the last channel that is on."""
  del state
  active = np.asarray(observation) > 0
  picture = np.full((*active.shape[:2], 3), 255, np.uint8)
  for channel in range(active.shape[-1]):
    picture[active[..., channel]] = _COLOURS[channel % len(_COLOURS)]
  return picture.repeat(12, axis=0).repeat(12, axis=1)
