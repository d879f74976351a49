"""Image data sets from folders: Office-31, Office-Home, NYU-v2, Cityscapes.

Office: `<folder>/<domain>/<class>/*.jpg`, with or without a folder `images`
between domain and class, as both are distributed.

NYU-v2 and Cityscapes as preprocessed arrays: `<folder>/<train or val>/<field>/
<number>.npy`, in which image is (height, width, 3) in [0, 1], the classes of
pixels (height, width) with -1 where there is none, depth (height, width, 1)
with 0 where there is none, and normal (height, width, 3).
"""

import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import harness

_ENDS = ('.bmp', '.jpeg', '.jpg', '.png')


class Office(NamedTuple):
  """Where a data set of domains is.

  Attributes:
    folders: names under which its folder goes.
    domains: its domains, each with the names of its folder.
    images: of each domain, by which the data set is told.
    source: where to get it, in words.
  """

  folders: tuple[str, ...]
  domains: dict[str, tuple[str, ...]]
  images: tuple[int, ...]
  source: str


class Pixels(NamedTuple):
  """Where a data set of labelled pixels is.

  Attributes:
    folders: names under which its folder goes.
    labels: folders of the classes of pixels.
    classes: their number.
    normals: whether it has surface normals.
    images: in the folders train and val, by which the data set is told.
    source: where to get it, in words.
  """

  folders: tuple[str, ...]
  labels: tuple[str, ...]
  classes: int
  normals: bool
  images: tuple[int, ...]
  source: str


_ARRAYS = (
  'the preprocessed arrays of NYU-v2 and Cityscapes are linked from the code '
  'of Multi-Task Attention Network (MTAN) by Liu, Johns and Davison'
)
OFFICE = {
  'office31': Office(
    ('office31', 'office-31', 'Office31', ''),
    {name: (name,) for name in ('amazon', 'dslr', 'webcam')},
    (2_817, 498, 795),
    'Office-31 is by Saenko, Kulis, Fritz and Darrell (domain_adaptation_images'
    '.tar.gz)',
  ),
  'office_home': Office(
    (
      'office-home',
      'office_home',
      'OfficeHome',
      'OfficeHomeDataset_10072016',
      '',
    ),
    {
      'art': ('Art',),
      'clipart': ('Clipart',),
      'product': ('Product',),
      'real_world': ('Real World', 'Real_World', 'RealWorld'),
    },
    (2_427, 4_365, 4_439, 4_357),
    'Office-Home is at hemanthdv.github.io/officehome-dataset',
  ),
}
PIXELS = {
  'nyuv2': Pixels(
    ('nyuv2', 'nyu_v2', ''), ('label',), 13, True, (795, 654), _ARRAYS
  ),
  'cityscapes': Pixels(
    ('cityscapes', 'cityscapes_preprocess', ''),
    ('label_7', 'label'),
    7,
    False,
    (2_975, 500),
    _ARRAYS,
  ),
}


def _folder(parent, names, spec, folders=('',)):
  """The first of several folders that is there."""
  return harness.find(
    parent, names, folders=folders, advice=spec.source, is_folder=True
  )


def source_of(name: str, parts: dict[str, Any]) -> harness.Source:
  """Tells from the numbers of images whether they are the data set's.

  Args:
    name: of the data set.
    parts: as they were read.

  Returns:
    A `harness.Source`; its name is the data set's, or unknown images.
  """
  if name in OFFICE:
    images = tuple(int(n) for n in sum(part[2] for part in parts.values()))
    known = images == OFFICE[name].images
  else:
    train, held_out, test = (
      len(parts[part]['image']) for part in ('train', 'validation', 'test')
    )
    images = (train + held_out, test)
    known = images == PIXELS[name].images
  words = (
    f'{" + ".join(f"{n:,}" for n in images)} images in the place of {name}'
  )
  arrays = [np.asarray(z) for z in jax.tree.leaves(parts)]
  return harness.source_of(
    words, arrays, otherwise=name if known else 'unknown images'
  )


def read_office(
  name: str, data_dir: str | None, side: int, seed: int = 0
) -> tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]:
  """Reads the images of all domains, resized.

  Args:
    name: office31 or office_home.
    data_dir: the data set's folder, or one that has it.
    side: images are resized to side x side.
    seed: of the split, 60 % of each class for training, 20 % for validation, 20
      % for tests.

  Returns:
    The parts, each `(images uint8 (domains, most, side, side, 3), labels int32
    (domains, most), sizes int32 (domains,))`, filled up with zeros; names of
    the domains and of the classes.

  Raises:
    MissingDataError: if a folder is missing; says where to get it.
    DamagedDataError: if classes of the domains differ, or an image cannot be
      read; names it.
  """
  spec = OFFICE[name]
  inside = [n for names in spec.domains.values() for n in names]
  root = _folder(data_dir, inside, spec, spec.folders).parent
  found = {}
  for domain, names in spec.domains.items():
    folder = _folder(root, names, spec)
    if (folder / 'images').is_dir():
      folder = folder / 'images'
    found[domain] = {p.name: p for p in sorted(folder.iterdir()) if p.is_dir()}
  first, *others = found
  classes = tuple(found[first])
  if not classes:
    raise harness.MissingDataError(
      f'{root} has no class folders in its domain {first}: {spec.source}.'
    )
  for other in others:
    if tuple(found[other]) != classes:
      only = sorted(set(classes) ^ set(found[other]))
      raise harness.DamagedDataError(
        f'the domains {first} and {other} in {root} have other classes: only '
        f'one of them has {", ".join(only[:5])}.'
      )
  rng = np.random.default_rng(seed)
  parts: dict[str, list] = {'train': [], 'validation': [], 'test': []}
  for domain in found:
    split: dict[str, list] = {part: [] for part in parts}
    for label, folder in enumerate(found[domain].values()):
      files = [p for p in folder.iterdir() if p.suffix.lower() in _ENDS]
      if len(files) < 3:
        raise harness.DamagedDataError(
          f'{folder} has {len(files)} images; training, validation and test '
          'need one each.'
        )
      files = [sorted(files)[i] for i in rng.permutation(len(files))]
      tail = max(1, len(files) // 5)
      ends = [len(files) - 2 * tail, len(files) - tail]
      cut = files[: ends[0]], files[ends[0] : ends[1]], files[ends[1] :]
      for part, some in zip(split, cut):
        split[part] += [
          (harness.read_image(path, side), label) for path in some
        ]
    for part, pairs in split.items():
      parts[part].append(pairs)
  stacked = {part: _stack(domains, side) for part, domains in parts.items()}
  return stacked, tuple(found), classes


def _stack(domains, side):
  most = max(map(len, domains))
  images = np.zeros((len(domains), most, side, side, 3), np.uint8)
  labels = np.zeros((len(domains), most), np.int32)
  for i, pairs in enumerate(domains):
    images[i, : len(pairs)] = [image for image, _ in pairs]
    labels[i, : len(pairs)] = [label for _, label in pairs]
  return images, labels, np.array([len(p) for p in domains], np.int32)


def read_pixels(
  name: str, data_dir: str | None, validation: float = 0.1
) -> dict[str, dict[str, np.ndarray]]:
  """Reads preprocessed arrays.

  Args:
    name: nyuv2 or cityscapes.
    data_dir: the data set's folder, or one that has it.
    validation: share of the training images that is set aside.

  Returns:
    The parts train, validation and test (the folder val), each with image
    float32 (n, height, width, 3), label int32 (n, height, width), -1 for none,
    depth float32 (n, height, width, 1), 0 for none, and of NYU-v2 normal
    float32 (n, height, width, 3).

  Raises:
    MissingDataError: if a folder or a file is missing; says where to get it.
    DamagedDataError: if shapes or classes are wrong; names the file.
  """
  spec = PIXELS[name]
  root = _folder(data_dir, ('train',), spec, spec.folders).parent
  parts = {}
  for part, folder in (('train', 'train'), ('test', 'val')):
    place = _folder(root, (folder,), spec)
    fields = {
      'image': ('image',),
      'label': spec.labels,
      'depth': ('depth',),
    } | ({'normal': ('normal',)} if spec.normals else {})
    parts[part] = _read_fields(place, fields, spec)
  count = len(parts['train']['image'])
  order = np.random.default_rng(0).permutation(count)
  some = order[: max(1, round(validation * count))]
  rest = np.sort(order[len(some) :])
  parts['validation'] = {k: v[some] for k, v in parts['train'].items()}
  parts['train'] = {k: v[rest] for k, v in parts['train'].items()}
  return parts


def _read_fields(place, fields, spec):
  found: dict[str, list] = {field: [] for field in fields}
  folders = {
    field: _folder(place, names, spec) for field, names in fields.items()
  }
  files = sorted(folders['image'].glob('*.npy'), key=_number)
  if len(files) < 2:
    raise harness.MissingDataError(
      f'{folders["image"]} has {len(files)} files .npy, it needs two or more: '
      f'{spec.source}.'
    )
  shape = None
  for file in files:
    for field, folder in folders.items():
      path = folder / file.name
      if not path.is_file():
        raise harness.MissingDataError(
          f'{path} is missing, but {file} is there: {spec.source}.'
        )
      array = harness.read_npy(path)
      shape = array.shape[:2] if shape is None else shape
      last = {'image': (3,), 'label': (), 'depth': (1,), 'normal': (3,)}[field]
      if array.shape == shape and last == (1,):
        array = array[..., None]
      if array.shape != (*shape, *last):
        raise harness.DamagedDataError(
          f'{path} has shape {array.shape}, expected {(*shape, *last)}.'
        )
      if field == 'label':
        array = array.astype(np.int32)
        if array.min() < -1 or array.max() >= spec.classes:
          raise harness.DamagedDataError(
            f'{path} has classes {array.min()} to {array.max()}, expected -1 '
            f'to {spec.classes - 1}.'
          )
      found[field].append(array)
  as_type = lambda field: np.int32 if field == 'label' else np.float32
  return {k: np.stack(v).astype(as_type(k)) for k, v in found.items()}


def _number(path: pathlib.Path) -> tuple[int, str]:
  return (int(path.stem), '') if path.stem.isdigit() else (-1, path.stem)
