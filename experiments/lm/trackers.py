"""Metrics under the names of TRL: in a file, and in Weights & Biases.

The package `wandb` is imported only on request. Without a network, `wandb
offline` stores its files in the run's folder, and `wandb sync` sends them.
"""

import contextlib
import hashlib
import importlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from experiments import harness
from experiments.harness.store import files

# Metrics that TRL names differently.
_NAMES = {'held_out/accuracy': 'eval/rewards/accuracies'}
_SPLITS = {'loss': 'train', 'held_out': 'eval'}
# Beginnings of the names that TRL has, too.
_METRICS = ('rewards/', 'logps/', 'grad_norm', 'mean_token_accuracy')


def rename(
  step: int,
  metrics: Mapping[str, Any],
  weights: Mapping[str, float],
  rate: Callable[[int], Any],
) -> dict[str, float]:
  """Renames the metrics of a record to those of TRL.

  Args:
    step: updates so far.
    metrics: values (seeds,) by name: `loss/OBJECTIVE` of training,
      `held_out/OBJECTIVE`, `held_out/accuracy`, `held_out/rewards/...`, and
      `loss/METRIC` of `training_metrics`.
    weights: weights of the objectives by name.
    rate: from updates so far to the learning rate.

  Returns:
    Means over seeds by name. `train/loss` and `eval/loss` are weighted means of
    the losses that were evaluated; several objectives are also listed, as
    `train/loss/OBJECTIVE`. `train/mean_token_accuracy` is that of the first
    objective that has one. Metrics that are not finite are left out.
  """
  means = {}
  for name, values in metrics.items():
    finite = [x for x in np.atleast_1d(values) if np.isfinite(x)]
    if finite:
      means[name] = float(np.mean(finite))
  result = {
    'train/global_step': step,
    'train/learning_rate': float(rate(step)),
  }
  for new, own in (('train/loss', 'loss'), ('eval/loss', 'held_out')):
    losses = {n: means[f'{own}/{n}'] for n in weights if f'{own}/{n}' in means}
    if not losses:
      continue
    # One evaluated loss may have the weight 0.
    shares = [weights[name] + 1e-12 for name in losses]
    result[new] = float(np.average([*losses.values()], weights=shares))
    if len(weights) > 1:
      result |= {f'{new}/{name}': loss for name, loss in losses.items()}
  for name, value in means.items():
    split, _, metric = name.partition('/')
    if name in _NAMES:
      result[_NAMES[name]] = value
    elif split in _SPLITS and metric.startswith(_METRICS):
      result[f'{_SPLITS[split]}/{metric}'] = value
  accuracy = 'train/mean_token_accuracy'
  for name in weights:
    if (own := f'{accuracy}/{name}') in result:
      result.setdefault(accuracy, result[own])
      if len(weights) == 1:
        del result[own]
  return result


def write(
  path: pathlib.Path,
  steps: Any,
  history: Mapping[str, Any],
  rename_record: Callable[[int, Mapping[str, Any]], Mapping[str, float]],
) -> None:
  """Writes all records as JSON lines.

  Args:
    path: the file.
    steps: steps of the records, (records,).
    history: values by metric, (records, seeds).
    rename_record: `rename` of a step and its metrics.
  """
  lines = [
    json.dumps(rename_record(int(step), {n: x[i] for n, x in history.items()}))
    for i, step in enumerate(steps)
  ]
  files.write_text(path, ''.join(f'{line}\n' for line in lines))


@contextlib.contextmanager
def open_wandb(
  project: str, folder: files.Path, name: str, config: Mapping[str, Any]
) -> Iterator[Callable[[Mapping[str, float]], None] | None]:
  """Opens a run of Weights & Biases; the same folder and name resume it.

  Args:
    project: its project; '' for no run.
    folder: folder of the run.
    name: name of the run.
    config: its settings.

  Yields:
    A function that logs metrics of `rename`, or None without a project.

  Raises:
    SettingsError: if the package is not installed.
  """
  if not project or not files.is_writer():
    yield None
    return
  try:
    wandb = importlib.import_module('wandb')
  except ImportError as error:
    raise harness.SettingsError(
      f'--wandb={project} needs the package wandb: pip install wandb. Without '
      'it, the same metrics are in trl_metrics.jsonl of the run.'
    ) from error
  folder = files.make_folder(folder)
  digest = hashlib.blake2b(f'{folder} {name}'.encode(), digest_size=8)
  run = wandb.init(
    project=project,
    name=name,
    id=digest.hexdigest(),
    resume='allow',
    dir=str(folder),
    config=dict(config),
  )
  # A run that resumes from a checkpoint repeats some steps.
  run.define_metric('train/global_step')
  run.define_metric('*', step_metric='train/global_step')
  try:
    yield run.log
  finally:
    run.finish()
