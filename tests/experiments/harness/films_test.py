"""A film has its pictures, their colours and their time."""

import numpy as np
import pytest
from PIL import Image

from experiments import harness
from experiments.harness.study import films


def test_pictures_come_back(tmp_path):
  shown = np.zeros((3, 8, 6, 3), np.uint8)
  for i in range(3):
    shown[i, i] = (200, 60, 10)
  path = films.write_film(
    tmp_path / 'new' / 'a.gif', map(Image.fromarray, shown), milliseconds=80
  )
  with Image.open(path) as film:
    assert film.n_frames == 3 and film.info['loop'] == 0
    for i in range(3):
      film.seek(i)
      assert film.info['duration'] == 80
      found = np.asarray(film.convert('RGB')).astype(int)
      np.testing.assert_allclose(found, shown[i], atol=8)
  one = films.write_film(
    tmp_path / 'b.gif', [Image.fromarray(shown[0])], milliseconds=1
  )
  with Image.open(one) as film:
    assert film.n_frames == 1
  (tmp_path / 'file').write_text('')
  with pytest.raises(harness.WriteError):
    films.write_film(
      tmp_path / 'file' / 'c.gif', [Image.fromarray(shown[0])], milliseconds=50
    )
