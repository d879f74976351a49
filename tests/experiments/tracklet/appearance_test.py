"""Crops are cut where boxes are; their looks tell people apart."""

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import harness
from experiments.tracklet import (
  appearance,
  detections,
  models,
  mot_files,
  motion,
  network,
  track,
  tracker,
)

COLOURS = np.array(
  [(200, 40, 40), (40, 200, 40), (40, 40, 200), (180, 180, 30)]
)


@pytest.fixture(scope='module')
def filmed(tmp_path_factory):
  """People in coats of four colours, upper halves grey, in noisy pictures."""
  folder = tmp_path_factory.mktemp('img1')
  rng = np.random.default_rng(0)
  rows = []
  for frame in range(1, 21):
    picture = rng.integers(60, 120, (100, 200, 3))
    for i, colour in enumerate(COLOURS):
      left, top = 5 + 48 * i + rng.integers(0, 8), 20 + rng.integers(0, 30)
      picture[top : top + 40, left : left + 20] = 128
      low = picture[top + 20 : top + 40, left : left + 20]
      low[:] = np.clip(colour + rng.normal(size=low.shape) * 25, 0, 255)
      rows.append((frame, i + 1, left, top, 20, 40))
    Image.fromarray(picture.astype(np.uint8)).save(folder / f'{frame:06d}.png')
  table = np.array(rows, float)
  boxes = mot_files.make(table[:, 0], table[:, 2:], ids=table[:, 1])
  info = mot_files.Info('made', 20, 200, 100, 25.0)
  none = np.zeros((len(boxes.ids), 0), np.float32)
  return detections.Detected(boxes, boxes.ids, none, info), folder


def test_a_crop_is_what_a_box_holds():
  picture = np.zeros((50, 40, 3), np.uint8)
  picture[10:30, 5:15] = (255, 0, 51)
  found = appearance.crop(
    Image.fromarray(picture), np.array([[5, 10, 10, 20], [35, 10, 10, 20]])
  )
  assert found.shape == (2, 128, 64, 3) and found.dtype == np.float32
  np.testing.assert_allclose(found[0], np.tile([1, 0, 0.2], (128, 64, 1)))
  assert (found[1] == 0).all()  # Beyond the edge, too.


def test_looks_are_learnt_and_kept(filmed, tmp_path):
  found, images = filmed
  rng = np.random.default_rng(0)
  crops, ids = appearance.gather([(found, images)], most=10, rng=rng)
  assert np.bincount(ids).tolist() == [10] * 4
  first = appearance.init(jax.random.key(1), numbers=8)
  encoder, losses = appearance.train(
    first, crops, ids, steps=60, batch=16, key=jax.random.key(2)
  )
  assert losses[-5:].mean() < 0.3 * losses[0]
  # Most of these crops it has not seen.
  later = found._replace(
    boxes=found.boxes.where(found.boxes.frames > 10),
    ids=found.ids[found.boxes.frames > 10],
  )
  seen = appearance.with_looks(encoder, later, images)
  np.testing.assert_allclose(np.linalg.norm(seen.looks, axis=1), 1, atol=1e-5)
  assert detections.auc(seen, rng, pairs=500) > 0.95
  appearance.save(tmp_path / 'looks.npz', encoder)
  again = appearance.with_looks(
    appearance.load(tmp_path / 'looks.npz'), later, images
  )
  np.testing.assert_allclose(again.looks, seen.looks, atol=1e-6)


def test_a_file_is_tracked_by_looks_of_crops(filmed, tmp_path, capsys):
  found, images = filmed
  weights = network.init(jax.random.key(0), hidden=4, looks=8)
  models.save(
    tmp_path / 'search.npz',
    jax.device_get(weights),
    motion.NOISE,
    tracker.Rules(least=-50.0),
  )
  mot_files.write_boxes(tmp_path / 'det.txt', found.boxes)
  arguments = [
    f'--checkpoint={tmp_path}',
    f'--detections={tmp_path}/det.txt',
    f'--output={tmp_path}/out.txt',
    f'--images={images}',
  ]
  assert track.main(arguments) == 1
  assert 'it needs looks' in capsys.readouterr().err
  appearance.save(
    tmp_path / 'appearance.npz', appearance.init(jax.random.key(0), numbers=8)
  )
  assert track.main(arguments) == 0
  assert 'tracklets' in capsys.readouterr().out
  assert track.main(arguments[:3]) == 1  # Without pictures, no looks.


def test_resnet_50_has_its_size():
  start, apply = appearance._functions('resnet50', 128)
  weights = jax.eval_shape(start, jax.random.key(0))
  shapes = [leaf.shape for leaf in jax.tree.leaves(weights)]
  kernels = [shape for shape in shapes if len(shape) == 4]
  # 49 convolutions of the trunk and 4 of shortcuts.
  assert len(kernels) == 53
  trunk = sum(int(np.prod(shape)) for shape in kernels)
  assert trunk == 23_454_912  # As published, without norms and the last layer.
  crops = jax.ShapeDtypeStruct((2, 128, 64, 3), np.float32)
  assert jax.eval_shape(apply, weights, crops).shape == (2, 128)


def test_what_is_wrong_is_said(filmed, tmp_path):
  found = filmed[0]
  with pytest.raises(harness.SettingsError, match=r"'large'; there are small,"):
    appearance.init(jax.random.key(0), kind='large')
  with pytest.raises(harness.DamagedDataError, match='several people'):
    appearance.train(
      appearance.init(jax.random.key(0)),
      np.zeros((2, 128, 64, 3), np.float32),
      np.zeros(2, int),
      steps=1,
      key=jax.random.key(0),
    )
  with pytest.raises(harness.MissingDataError, match=r'000001\.jpg or \.png'):
    next(appearance.by_frame(found.boxes, tmp_path))
  (tmp_path / '000001.png').write_text('no picture')
  with pytest.raises(harness.DamagedDataError, match='picture'):
    next(appearance.by_frame(found.boxes, tmp_path))
  with pytest.raises(harness.MissingDataError, match='beside the tracker'):
    appearance.load(tmp_path / 'none.npz')
  (tmp_path / 'text.npz').write_text('no network')
  with pytest.raises(harness.DamagedDataError, match='network of crops'):
    appearance.load(tmp_path / 'text.npz')
