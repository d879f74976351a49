"""Tasks on images: one domain each, or one kind of label for each pixel."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.moco import image_data, image_models
from experiments.moco import problem as problems

# Of ImageNet, with which such networks are used to being fed.
_MEAN, _SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_AT_ONCE = 32  # Images that are scored side by side.
_BINS = 1800  # Of angles between 0 and 180 degrees.


def office_problem(
  name: str, data_dir: str | None, *, side: int, width: int
) -> problems.Problem:
  """Which object is it: a task for each domain, a ResNet-18 for all of them.

  Args:
    name: office31 or office_home.
    data_dir: as in `image_data.read_office`.
    side: of the images, in pixels.
    width: of the first stage.

  Returns:
    The problem; accuracies are its measures, half of the images of a batch are
    mirrored.
  """
  data, domains, classes = image_data.read_office(name, data_dir, side)
  tasks = range(len(domains))
  stem = 'large' if side > 64 else 'small'
  trunk = harness.pure(lambda rngs: image_models.ResNet18(width, stem, rngs))

  def init(key):
    one, two = jax.random.split(key)
    heads = jax.vmap(lambda k: problems.dense(k, 8 * width, len(classes)))(
      jax.random.split(two, len(domains))
    )
    return bj.sequences(trunk=trunk.init(one), heads=heads)

  def logits(params, images, task):
    hidden = trunk.apply(params.trunk, images)
    return hidden @ params.heads['w'][task] + params.heads['b'][task]

  def loss(params, batch, task):
    images, labels = batch
    return optax.losses.softmax_cross_entropy_with_integer_labels(
      logits(params, images, task), labels
    ).mean()

  def losses(params, batch):
    # One by one, so that what is not asked for is not computed.
    of = lambda task: jax.tree.map(lambda x: x[task], batch)
    return jnp.stack([loss(params, of(task), task) for task in tasks])

  def draw(key, data, batch):
    images, labels, sizes = data['train']
    one, two = jax.random.split(key)
    shape = (len(domains), batch)
    rows = jax.random.randint(one, shape, 0, sizes[:, None])
    take = jax.vmap(lambda values, row: values[row])
    drawn = take(images, rows)
    mirrored = jax.random.bernoulli(two, shape=shape)[..., None, None, None]
    drawn = jnp.where(mirrored, drawn[..., ::-1, :], drawn)
    return normalise(drawn), take(labels, rows)

  def score(params, part):
    images, labels, sizes = part
    flat = images.reshape(-1, *images.shape[2:])
    hidden = jax.lax.map(
      lambda image: trunk.apply(params.trunk, normalise(image)[None])[0],
      flat,
      batch_size=_AT_ONCE,
    ).reshape(*labels.shape, -1)
    found = jnp.einsum('dnh,dhc->dnc', hidden, params.heads['w'])
    found = jnp.argmax(found + params.heads['b'][:, None], axis=-1)
    inside = jnp.arange(labels.shape[1]) < sizes[:, None]
    return jnp.sum((found == labels) & inside, axis=1) / sizes

  def split(batch, parts):
    deal = lambda x: jnp.moveaxis(
      x.reshape(len(domains), -1, parts, *x.shape[2:]), 2, 0
    )
    return jax.tree.map(deal, batch)

  return problems.Problem(
    name=name,
    tasks=domains,
    metric='accuracy',
    higher_is_better=True,
    init=init,
    oracle=lambda: bj.multi_objective(
      loss, domains, rest=('heads',), per_task=True
    ),
    losses=losses,
    batch=draw,
    split=split,
    score=score,
    data=jax.tree.map(jnp.asarray, data),
  )


def normalise(images: Any) -> Any:
  """Bytes to numbers of about zero mean and unit variance."""
  scaled = images.astype(jnp.float32) / 255
  return (scaled - jnp.array(_MEAN)) / jnp.array(_SPREAD)


def pixel_problem(
  name: str, data_dir: str | None, *, width: int, stages: int
) -> problems.Problem:
  """Class, depth and, of NYU-v2, normal of each pixel; a SegNet for all.

  Losses: the cross-entropy, the mean absolute error, and one less the cosine;
  of the pixels whose truth is known.

  Args:
    name: nyuv2 or cityscapes.
    data_dir: as in `image_data.read_pixels`.
    width: channels of the first stage; 64 in SegNet.
    stages: that pool; 5 in SegNet.

  Returns:
    The problem, with the measures of the field.
  """
  data = image_data.read_pixels(name, data_dir)
  spec = image_data.PIXELS[name]
  height, wide = data['train']['image'].shape[1:3]
  multiple = 2**stages
  if height % multiple or wide % multiple:
    raise harness.SettingsError(
      f'the sides of the images are {height} and {wide}, no multiples of '
      f'{multiple}: {stages} stages pool by 2; take fewer.'
    )
  widths = tuple(width * min(2**stage, 8) for stage in range(stages))
  trunk = harness.pure(lambda rngs: image_models.SegNet(widths, rngs))
  outputs = {'segmentation': spec.classes, 'depth': 1}
  if spec.normals:
    outputs['normal'] = 3
  heads = {
    task: harness.pure(lambda rngs, n=n: image_models.PixelHead(width, n, rngs))
    for task, n in outputs.items()
  }
  tasks = tuple(heads)

  def init(key):
    keys = jax.random.split(key, len(tasks) + 1)
    return bj.sequences(
      trunk=trunk.init(keys[0]),
      heads={task: heads[task].init(k) for task, k in zip(tasks, keys[1:])},
    )

  features = lambda params, batch: trunk.apply(params.trunk, batch['image'])

  def head_loss(task):
    def loss(params, hidden, batch):
      found = heads[task].apply(params.heads[task], hidden)
      return PIXEL_LOSSES[task](found, batch)

    return loss

  head_losses = tuple(head_loss(task) for task in tasks)

  def losses(params, batch):
    hidden = features(params, batch)
    return jnp.stack([loss(params, hidden, batch) for loss in head_losses])

  def draw(key, data, batch):
    count = len(data['train']['image'])
    rows = jax.random.randint(key, (batch,), 0, count)
    return jax.tree.map(lambda x: x[rows], data['train'])

  def score(params, part):
    def one(example):
      example = jax.tree.map(lambda x: x[None], example)
      hidden = features(params, example)
      return {
        task: PIXEL_STATISTICS[task](
          heads[task].apply(params.heads[task], hidden), example
        )
        for task in tasks
      }

    found = jax.lax.map(one, part, batch_size=_AT_ONCE)
    total = jax.tree.map(lambda x: x.sum(axis=0), found)
    return jnp.concatenate([PIXEL_MEASURES[t](total[t]) for t in tasks])

  return problems.Problem(
    name=name,
    tasks=tasks,
    metric='score',
    higher_is_better=True,
    init=init,
    oracle=lambda: bj.multi_objective(
      head_losses, tasks, trunk=features, rest=('heads',)
    ),
    losses=losses,
    batch=draw,
    split=bj.evaluation.deal_batch,
    score=score,
    data=jax.tree.map(jnp.asarray, data),
    measures=tuple(
      problems.Measure(measure, i, higher)
      for i, task in enumerate(tasks)
      for measure, higher in NAMES[task]
    ),
  )


NAMES = {
  'segmentation': (('mIoU', True), ('pixel accuracy', True)),
  'depth': (('absolute error', False), ('relative error', False)),
  'normal': (
    ('mean angle', False),
    ('median angle', False),
    ('within 11.25', True),
    ('within 22.5', True),
    ('within 30', True),
  ),
}


def _mean_where(values: Any, known: Any) -> Any:
  known = known.astype(values.dtype)
  return jnp.sum(values * known) / jnp.maximum(jnp.sum(known), 1)


def _cosine(found: Any, truth: Any) -> Any:
  length = jnp.sqrt(jnp.sum(found**2, axis=-1) + 1e-12)
  return jnp.sum(found * truth, axis=-1) / length


def _has_normal(batch: Any) -> Any:
  return jnp.any(batch['normal'] != 0, axis=-1)


def segmentation_loss(logits: Any, batch: Any) -> Any:
  """The mean cross-entropy of the pixels that have a class."""
  known = batch['label'] >= 0
  losses = optax.losses.softmax_cross_entropy_with_integer_labels(
    logits, jnp.where(known, batch['label'], 0)
  )
  return _mean_where(losses, known)


def depth_loss(found: Any, batch: Any) -> Any:
  """The mean absolute error of the pixels that have a depth."""
  return _mean_where(jnp.abs(found - batch['depth']), batch['depth'] != 0)


def normal_loss(found: Any, batch: Any) -> Any:
  """One less the mean cosine of the pixels that have a normal."""
  known = _has_normal(batch)
  return _mean_where(1 - _cosine(found, batch['normal']), known)


def confusion(logits: Any, batch: Any) -> Any:
  """How often which class was taken for which, (truth, found)."""
  classes = logits.shape[-1]
  truth = jax.nn.one_hot(batch['label'].ravel(), classes)  # -1 gives zeros.
  found = jax.nn.one_hot(jnp.argmax(logits, -1).ravel(), classes)
  return truth.T @ found


def segmentation_measures(counts: Any) -> Any:
  """Mean intersection over union of the classes there are, and accuracy."""
  right = jnp.diagonal(counts)
  union = counts.sum(0) + counts.sum(1) - right
  present = counts.sum(1) > 0
  share = jnp.where(present, right / jnp.maximum(union, 1), 0)
  miou = share.sum() / jnp.maximum(present.sum(), 1)
  return jnp.stack([miou, right.sum() / jnp.maximum(counts.sum(), 1)])


def depth_errors(found: Any, batch: Any) -> Any:
  """Sums of absolute and relative errors, and the number of pixels."""
  truth = batch['depth']
  known = truth != 0
  error = jnp.where(known, jnp.abs(found - truth), 0)
  relative = error / jnp.where(known, jnp.abs(truth), 1)
  return jnp.stack([error.sum(), relative.sum(), known.sum()])


def depth_measures(sums: Any) -> Any:
  """Mean absolute and relative errors."""
  return sums[:2] / jnp.maximum(sums[2], 1)


def angles(found: Any, batch: Any) -> Any:
  """How many pixels have a normal that is off by which angle, (bins,)."""
  length = jnp.linalg.norm(batch['normal'], axis=-1)
  known = _has_normal(batch)
  truth = batch['normal'] / jnp.where(known, length, 1)[..., None]
  cosine = jnp.clip(_cosine(found, truth), -1, 1)
  angle = jnp.degrees(jnp.arccos(cosine)).ravel()
  place = jnp.clip((angle * (_BINS / 180)).astype(jnp.int32), 0, _BINS - 1)
  return jnp.zeros(_BINS).at[place].add(known.ravel().astype(jnp.float32))


def normal_measures(counts: Any) -> Any:
  """Mean and median angle, degrees; shares within 11.25, 22.5 and 30."""
  middles = (jnp.arange(_BINS) + 0.5) * (180 / _BINS)
  total = jnp.maximum(counts.sum(), 1)
  below = jnp.cumsum(counts) / total
  mean = jnp.sum(counts * middles) / total
  median = middles[jnp.argmax(below >= 0.5)]
  ends = np.round(np.array([11.25, 22.5, 30]) * _BINS / 180).astype(int) - 1
  return jnp.concatenate([jnp.stack([mean, median]), below[ends]])


PIXEL_LOSSES = {
  'segmentation': segmentation_loss,
  'depth': depth_loss,
  'normal': normal_loss,
}
PIXEL_STATISTICS = {
  'segmentation': confusion,
  'depth': depth_errors,
  'normal': angles,
}
PIXEL_MEASURES = {
  'segmentation': segmentation_measures,
  'depth': depth_measures,
  'normal': normal_measures,
}
