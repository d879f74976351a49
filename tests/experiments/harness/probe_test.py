"""All that applied work asks of the harness at once, killed and gone on with.

Texts of several lengths from the host, frozen weights, params over a mesh, a
metric in plain Python.
"""

import numpy as np
import pytest

from experiments import harness
from tests.experiments.harness import processes

SCRIPT = """
import dataclasses, pathlib, time
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import PartitionSpec
import bilevel_jax as bj
from experiments import harness

WORDS, WIDTH = 32, 8
draw = np.random.default_rng(0)
lengths = draw.integers(1, 9, size=64)
texts = [
  {'tokens': draw.integers(1, WORDS, size=n).astype(np.int32),
   'label': np.float32(n % 2)} for n in lengths]
table = draw.normal(size=(WORDS, WIDTH)).astype(np.float32)

@dataclasses.dataclass(frozen=True)
class Settings:
  pause: float = 1e-6
  fsdp: int = 4
  tp: int = 2

def main(options):
  settings = options.settings

  def logits(params, table, batch):
    seen = (batch['tokens'] > 0)[..., None]
    mean = (table[batch['tokens']] * seen).sum(1) / seen.sum(1)
    hidden = jnp.tanh(mean @ params.lower['in'])
    return hidden @ params.lower['out'] + params.upper

  def loss(params, batch):
    table, batch = batch
    found = logits(params, table, batch)
    return optax.sigmoid_binary_cross_entropy(found, batch['label']).mean()

  def init(context):
    keys = jax.random.split(context.key)
    return bj.BilevelParams(
      upper=jnp.zeros(()),
      lower={'in': jax.random.normal(keys[0], (WIDTH, 16)) / 3,
             'out': jax.random.normal(keys[1], (16,)) / 4})

  def specs(tree):
    axes = {0: (), 1: ('fsdp',), 2: ('fsdp', 'tp')}
    return jax.tree.map(lambda x: PartitionSpec(*axes[x.ndim]), tree)

  def evaluate_host(params, step, state):
    params = harness.as_numpy(params)
    picked = np.random.default_rng(step).integers(len(texts), size=32)
    right = []
    for i in picked:
      mean = table[texts[i]['tokens']].mean(0)
      found = np.tanh(mean @ params.lower['in'][0]) @ params.lower['out'][0]
      right.append((found + params.upper[0] > 0) == texts[i]['label'])
    return {'accuracy': np.mean(right)}

  trained = harness.train(
    optax.chain(bj.gradient(loss), optax.adam(0.1)),
    harness.Task(
      init,
      lambda context: (context.frozen, context.streamed),
      frozen=table,
      stream=harness.Stream(
        texts, (16, 8), lengths=lengths, buckets=(4, 8), pad={'tokens': 0})),
    harness.Training(
      38, chunk=5, seeds=1, workdir=options.workdir, save_seconds=0,
      layout=harness.Layout(
        jax.make_mesh((settings.fsdp, settings.tp), ('fsdp', 'tp')), specs)),
    harness.Measure(
      evaluate_host=evaluate_host, host_every=10, select='accuracy',
      # Not to stop, but to leave time for the signal.
      stop_when=lambda history: time.sleep(settings.pause)))
  params, best = harness.as_numpy((trained.params, trained.best))
  if jax.process_index() == 0:
    np.savez(
      pathlib.Path(options.workdir) / 'result.npz', upper=params.upper,
      best_step=best.step, **params.lower, **trained.history)

PRESETS = {'quick': Settings()}
STUDY = harness.Study(main, PRESETS, paper='tests', binary='probe')


if __name__ == '__main__':
  harness.run(STUDY)
"""


def run_here(workdir, **settings):
  here = processes.run_here(SCRIPT)
  here['main'](
    harness.Options(
      'tests',
      'probe',
      'quick',
      here['Settings'](**settings),
      str(workdir),
      None,
      (0,),
    )
  )
  return np.load(workdir / 'result.npz')


@pytest.mark.slow
def test_killed_and_resumed_has_the_same_bits(tmp_path):
  whole = run_here(tmp_path / 'whole')
  assert whole['accuracy'][-1] > 0.7
  killed = tmp_path / 'killed'
  process = processes.start(SCRIPT, f'--workdir={killed}', '--pause=0.3')
  processes.kill_after(process[0], killed / 'run' / 'metrics.jsonl', 4)
  resumed = run_here(killed)
  assert set(resumed) == set(whole)
  for name in whole:
    np.testing.assert_array_equal(resumed[name], whole[name], strict=True)


@pytest.mark.slow
def test_two_processes_and_another_mesh_give_the_same(tmp_path):
  whole = run_here(tmp_path / 'whole')
  two = tmp_path / 'two'
  arguments = SCRIPT, f'--workdir={two}', '--distributed'
  both = processes.start(*arguments, '--pause=0.5', count=2)
  processes.wait_for_lines(both[0], two / 'run' / 'metrics.jsonl', 4)
  for process in both:
    process.kill()
    process.communicate()
  processes.finish(processes.start(*arguments, count=2))
  other = run_here(tmp_path / 'other', fsdp=2, tp=4)
  for found in (np.load(two / 'result.npz'), other):
    assert set(found) == set(whole)
    for name in whole:
      np.testing.assert_allclose(found[name], whole[name], 1e-5, 1e-5)
