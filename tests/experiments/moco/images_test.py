"""Images: small folders in the published layouts, measures by hand, runs."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

import bilevel_jax as bj
from experiments import harness
from experiments.harness import settings as settings_lib
from experiments.moco import image_data, image_models, image_problems, images

SIDE = 8
OFFICE = {
  'office31': ('amazon', 'dslr', 'webcam'),
  'office_home': ('Art', 'Clipart', 'Product', 'Real World'),
}


@pytest.fixture
def office(tmp_path):
  """Makes a folder of domains with classes a and b; gives it."""

  def make(name='office31', between='', count=6):
    rng = np.random.default_rng(0)
    for domain in OFFICE[name]:
      for label, level in (('a', 40), ('b', 200)):
        folder = tmp_path / domain / between / label
        folder.mkdir(parents=True)
        for i in range(count + (domain == 'webcam')):
          pixels = rng.integers(level, level + 40, (10, 12, 3), np.uint8)
          PIL.Image.fromarray(pixels).save(folder / f'{i}.png')
    return tmp_path

  return make


@pytest.fixture
def arrays(tmp_path):
  """Makes a folder of arrays; gives it."""

  def make(name='nyuv2', count=4):
    rng = np.random.default_rng(0)
    spec = image_data.PIXELS[name]
    for part in ('train', 'val'):
      for i in range(count):
        label = rng.integers(-1, spec.classes, (8, 12))
        image = rng.uniform(size=(8, 12, 3)) * (label[..., None] + 2) / 20
        fields = {
          'image': image,
          spec.labels[0]: label.astype(np.float32),
          'depth': rng.uniform(size=(8, 12, 1)),
        }
        if spec.normals:
          fields['normal'] = rng.normal(size=(8, 12, 3))
        for field, array in fields.items():
          folder = tmp_path / part / field
          folder.mkdir(parents=True, exist_ok=True)
          np.save(folder / f'{i}.npy', array)
    return tmp_path

  return make


@pytest.mark.parametrize('between', ['', 'images'])
@pytest.mark.parametrize('name', OFFICE)
def test_domains_of_class_folders(office, name, between):
  folder = office(name, between)
  parts, domains, classes = image_data.read_office(name, str(folder), SIDE)
  assert domains == tuple(image_data.OFFICE[name].domains)
  assert classes == ('a', 'b')
  for part, size in (('train', 8), ('validation', 2), ('test', 2)):
    pixels, labels, sizes = parts[part]
    assert pixels.dtype == np.uint8
    assert pixels.shape[2:] == (SIDE, SIDE, 3)
    for domain, count in enumerate(sizes):
      assert count == size + 2 * (
        part == 'train' and domains[domain] == 'webcam'
      )
      # A class is told by how light it is.
      light = pixels[domain, :count].mean((1, 2, 3)) > 128
      np.testing.assert_array_equal(light, labels[domain, :count] == 1)
      assert not pixels[domain, count:].any()


def test_a_data_folder_may_hold_the_data_set_in_a_folder(office, tmp_path):
  office()
  inner = tmp_path / 'office31'
  inner.mkdir()
  for domain in OFFICE['office31']:
    shutil.move(tmp_path / domain, inner / domain)
  assert image_data.read_office('office31', str(tmp_path), SIDE)[2]


def test_what_is_missing_or_other_is_named(office):
  with pytest.raises(harness.MissingDataError, match=r'no --data_dir.*Saenko'):
    image_data.read_office('office31', None, SIDE)
  folder = office()
  read = lambda: image_data.read_office('office31', str(folder), SIDE)
  with pytest.raises(
    harness.MissingDataError, match=r'Art or Clipart is missing.*Office-Home'
  ):
    image_data.read_office('office_home', str(folder), SIDE)
  path = folder / 'dslr' / 'a' / '0.png'
  whole = path.read_bytes()
  path.write_bytes(whole[:30])
  with pytest.raises(harness.DamagedDataError, match=r'0\.png is damaged'):
    read()
  path.write_bytes(whole)
  shutil.copytree(folder / 'dslr' / 'a', folder / 'dslr' / 'c')
  with pytest.raises(harness.DamagedDataError, match='only one of them has c'):
    read()
  shutil.rmtree(folder / 'dslr' / 'c')
  for file in sorted((folder / 'webcam' / 'b').iterdir())[2:]:
    file.unlink()
  with pytest.raises(harness.DamagedDataError, match='b has 2 images'):
    read()
  shutil.rmtree(folder / 'webcam')
  with pytest.raises(harness.MissingDataError, match='webcam is missing'):
    read()


@pytest.mark.parametrize('name', image_data.PIXELS)
def test_folders_of_arrays(arrays, name):
  parts = image_data.read_pixels(name, str(arrays(name)), validation=0.25)
  sizes = {part: len(fields['image']) for part, fields in parts.items()}
  assert sizes == {'train': 3, 'validation': 1, 'test': 4}
  fields = parts['train']
  assert fields['label'].dtype == np.int32
  assert fields['depth'].shape == (3, 8, 12, 1)
  assert ('normal' in fields) == (name == 'nyuv2')


def test_arrays_that_do_not_fit_are_named(arrays):
  folder = arrays()
  read = lambda: image_data.read_pixels('nyuv2', str(folder))
  with pytest.raises(harness.MissingDataError, match=r'no --data_dir.*MTAN'):
    image_data.read_pixels('nyuv2', None)
  place = folder / 'train' / 'label' / '2.npy'
  label = np.load(place)
  np.save(place, label[:-1])
  with pytest.raises(
    harness.DamagedDataError, match=r'2\.npy has shape \(7, 12\), expected'
  ):
    read()
  np.save(place, np.full_like(label, 13))
  with pytest.raises(harness.DamagedDataError, match=r'classes 13 to 13'):
    read()
  place.write_bytes(b'text')
  with pytest.raises(harness.DamagedDataError, match=r'2\.npy is damaged'):
    read()
  place.unlink()
  with pytest.raises(harness.MissingDataError, match=r'2\.npy is missing'):
    read()
  shutil.rmtree(folder / 'train' / 'normal')
  with pytest.raises(harness.MissingDataError, match=r'normal is missing'):
    read()


def test_resnet_18_has_the_published_number_of_weights():
  network = harness.pure(lambda rngs: image_models.ResNet18(64, 'large', rngs))
  shapes = jax.eval_shape(network.init, jax.random.key(0))
  sizes = [np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)]
  assert sum(sizes) == 11_176_512  # Without its last layer.
  pixels = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
  assert jax.eval_shape(network.apply, shapes, pixels).shape == (2, 512)


def test_segnet_keeps_the_size_of_images():
  network = harness.pure(lambda rngs: image_models.SegNet((4, 8, 8), rngs))
  shapes = jax.eval_shape(network.init, jax.random.key(0))
  pixels = jax.ShapeDtypeStruct((2, 16, 24, 3), jnp.float32)
  out = jax.eval_shape(network.apply, shapes, pixels)
  assert out.shape == (2, 16, 24, 4)


def test_unpooling_puts_values_where_the_maxima_were():
  before = jnp.array([[1.0, 5.0], [3.0, 2.0]])[None, :, :, None]
  values = jnp.full((1, 1, 1, 1), 7.0)
  found = image_models.unpool(jnp.full((1, 1, 1, 1), 5.0), before, values)
  np.testing.assert_array_equal(found[0, :, :, 0], [[0, 7], [0, 0]])


def test_classes_of_pixels_by_hand():
  # Truth 0 0 1 and none; found 0 1 1 1.
  batch = {'label': jnp.array([[0, 0, 1, -1]])}
  logits = jnp.log(jnp.array([[[0.8, 0.2], [0.3, 0.7], [0.1, 0.9], [0, 1]]]))
  counts = image_problems.confusion(logits, batch)
  np.testing.assert_array_equal(counts, [[1, 1], [0, 1]])
  found = image_problems.segmentation_measures(counts)
  np.testing.assert_allclose(found, [0.5, 2 / 3], rtol=1e-6)
  loss = image_problems.segmentation_loss(
    logits[:, :3], {'label': batch['label'][:, :3]}
  )
  wanted = -np.log([0.8, 0.3, 0.9]).mean()
  np.testing.assert_allclose(loss, wanted, rtol=1e-6)


def test_depths_by_hand():
  batch = {'depth': jnp.array([2.0, 0.0, 4.0])}
  found = jnp.array([1.0, 9.0, 6.0])
  sums = image_problems.depth_errors(found, batch)
  np.testing.assert_allclose(image_problems.depth_measures(sums), [1.5, 0.5])
  np.testing.assert_allclose(image_problems.depth_loss(found, batch), 1.5)


def test_normals_by_hand():
  turned = np.radians([0.02, 10.02, 20.02, 40.02])
  truth = np.stack([np.cos(turned), np.sin(turned), 0 * turned], -1)
  batch = {'normal': jnp.array([*truth, [0.0, 0.0, 0.0]])}
  found = jnp.tile(jnp.array([3.0, 0.0, 0.0]), (5, 1))
  counts = image_problems.angles(found, batch)
  mean, median, *within = image_problems.normal_measures(counts)
  np.testing.assert_allclose(mean, 17.5, atol=0.1)
  np.testing.assert_allclose(median, 10, atol=0.1)
  np.testing.assert_allclose(within, [0.5, 0.75, 0.75], rtol=1e-6)
  loss = image_problems.normal_loss(found, batch)
  np.testing.assert_allclose(loss, 1 - np.cos(turned).mean(), rtol=1e-5)


TINY = {
  'epochs': 2,
  'batch': 2,
  'side': SIDE,
  'width': 4,
  'stages': 2,
  'methods': ('moco',),
}


def test_each_domain_sees_its_own_images(office):
  settings = images.Settings(**TINY)
  problem, steps = images.make_problem(settings, str(office()))
  assert steps == 4  # Of 8, 8 and 10 images, by 2.
  batch = problem.batch(jax.random.key(0), problem.data, 2)
  light = batch[0].mean((2, 3, 4)) > 0
  np.testing.assert_array_equal(light, batch[1] == 1)
  assert problem.split(batch, 2)[0].shape == (2, 3, 1, SIDE, SIDE, 3)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['office31', 'nyuv2'])
def test_runs_on_small_folders(options, office, arrays, tmp_path, name):
  few = name in OFFICE
  settings = images.Settings(dataset=name, **TINY)
  folder = office(name) if few else arrays(name)
  workdir = tmp_path / 'run'
  given = options(settings, data_dir=str(folder), workdir=str(workdir))
  harness.execute(images.main, given)
  results = json.loads((workdir / 'results.json').read_text())
  for method in settings.methods:
    assert np.isfinite(results['metrics'][f'dm/{method}/{name}'])
  assert (workdir / f'{name}_weights.png').stat().st_size > 5_000


@pytest.mark.slow
@pytest.mark.parametrize('name', ['office31', 'nyuv2'])
def test_rows_are_gradients_of_the_losses(office, arrays, name):
  folder = office() if name == 'office31' else arrays(name)
  settings = images.Settings(dataset=name, **TINY)
  problem, _ = images.make_problem(settings, str(folder))
  params = problem.init(jax.random.key(1))
  batch = problem.batch(jax.random.key(2), problem.data, 2)
  oracle = problem.oracle()
  jacobian, _ = jax.jit(oracle.update)(batch, oracle.init(params), params)
  rows = jax.jit(jax.jacobian(problem.losses))(params, batch)
  np.testing.assert_allclose(
    jacobian.values, problem.losses(params, batch), rtol=1e-4
  )
  for ours, theirs in zip(
    jax.tree.leaves(jacobian.rows.trunk), jax.tree.leaves(rows.trunk)
  ):
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)
  assert isinstance(jacobian, bj.Jacobian)


@pytest.mark.slow
def test_accuracies_are_of_each_domain_without_what_fills_up(office):
  settings = images.Settings(**TINY)
  problem, _ = images.make_problem(settings, str(office()))
  params = problem.init(jax.random.key(1))
  pixels, labels, sizes = problem.data['train']
  score = jax.jit(problem.score)
  found = score(params, (pixels, labels, sizes))
  wrong = score(params, (pixels, 1 - labels, sizes))
  np.testing.assert_allclose(found + wrong, 1, rtol=1e-6)
  # Only the labels of the second domain are turned.
  turned = labels.at[1].set(1 - labels[1])
  mixed = score(params, (pixels, turned, sizes))
  np.testing.assert_allclose(mixed, [found[0], wrong[1], found[2]], rtol=1e-6)


def test_settings_that_no_run_can_have(arrays, tmp_path):
  with pytest.raises(ValueError, match=r'imagenet: dataset knows office31'):
    settings_lib.check(images.Settings(dataset='imagenet'))
  with pytest.raises(ValueError, match='8 and 12, no multiples of 8'):
    images.make_problem(
      images.Settings(dataset='cityscapes', stages=3),
      str(arrays('cityscapes')),
    )
