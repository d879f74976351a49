"""A user's own model and rows, killed and gone on, to a folder for others."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from experiments import harness
from experiments.harness import saved
from experiments.lm import decoder, sharding, weights
from experiments.xright import train
from tests.experiments.lm import decoder_test

ROOT = pathlib.Path(__file__).parents[3]
CONFIG = dataclasses.replace(
  decoder_test.SMALL, layers=2, vocabulary=260, context=64
)


def user_files(folder):
  """A model, demonstrations and comparisons with other keys each."""
  weights_test = pytest.importorskip(
    'tests.experiments.lm.weights_test', reason='needs the extra llm'
  )
  params = decoder.init(CONFIG, 0)
  weights.export(folder / 'model', CONFIG, params, weights_test.words())
  demonstrations = [
    {'instruction': f'Name {i}', 'input': '', 'output': f'It is {i % 7}.'}
    for i in range(20)
  ]
  comparisons = [
    {
      'chosen': f'\n\nHuman: Is {i} odd?\n\nAssistant: {i % 2 == 1}',
      'rejected': f'\n\nHuman: Is {i} odd?\n\nAssistant: Maybe',
    }
    for i in range(20)
  ]
  for name, rows in (('a', demonstrations), ('b', comparisons)):
    lines = '\n'.join(map(json.dumps, rows))
    (folder / f'{name}.jsonl').write_text(lines + '\n')


def command(folder, workdir, *more):
  return [
    sys.executable,
    '-m',
    'experiments.xright.train',
    '--preset=smoke',
    '--method=maxright',
    f'--model={folder}/model',
    f'--sft_data={folder}/a.jsonl',
    f'--pref_data={folder}/b.jsonl',
    '--buckets=40,64',
    '--held_out=4',
    '--refresh=4',
    '--steps=60',
    '--chunk=2',
    '--save_seconds=0',
    f'--workdir={workdir}',
    f'--output={workdir}/out',
    *more,
  ]


@pytest.mark.slow
def test_killed_it_goes_on_to_weights_that_others_read(tmp_path):
  user_files(tmp_path)
  run = tmp_path / 'killed'
  checkpoints = run / 'maxright' / 'checkpoints'
  process = subprocess.Popen(
    command(tmp_path, run), cwd=ROOT, stderr=subprocess.PIPE, text=True
  )
  deadline = time.monotonic() + 600
  while max(saved.saved_steps(checkpoints), default=0) < 6:
    assert time.monotonic() < deadline and process.poll() is None
    time.sleep(0.05)
  os.kill(process.pid, signal.SIGKILL)
  process.communicate(timeout=60)
  assert max(saved.saved_steps(checkpoints)) < 60
  for workdir in (run, tmp_path / 'straight'):
    subprocess.run(
      command(tmp_path, workdir), cwd=ROOT, check=True, timeout=900
    )
  tensors = pytest.importorskip('safetensors.numpy')
  files = [
    p / 'out' / 'model.safetensors' for p in (run, tmp_path / 'straight')
  ]
  first, second = (tensors.load_file(file) for file in files)
  assert first.keys() == second.keys()
  for name, array in first.items():
    np.testing.assert_array_equal(array, second[name], err_msg=name)
  # What transformers checks when it loads: names, shapes, dtype, fields.
  width, heads = CONFIG.width, CONFIG.heads * CONFIG.head_width
  expected = {
    'model.embed_tokens.weight': (260, width),
    'model.norm.weight': (width,),
  }
  for i in range(CONFIG.layers):
    layer = f'model.layers.{i}'
    keys = CONFIG.kv_heads * CONFIG.head_width
    expected |= {
      f'{layer}.input_layernorm.weight': (width,),
      f'{layer}.post_attention_layernorm.weight': (width,),
      f'{layer}.self_attn.q_proj.weight': (heads, width),
      f'{layer}.self_attn.k_proj.weight': (keys, width),
      f'{layer}.self_attn.v_proj.weight': (keys, width),
      f'{layer}.self_attn.o_proj.weight': (width, heads),
      f'{layer}.mlp.gate_proj.weight': (CONFIG.hidden, width),
      f'{layer}.mlp.up_proj.weight': (CONFIG.hidden, width),
      f'{layer}.mlp.down_proj.weight': (width, CONFIG.hidden),
    }
  assert {n: a.shape for n, a in first.items()} == expected
  assert {a.dtype for a in first.values()} == {np.dtype(np.float32)}
  told = json.loads((run / 'out' / 'config.json').read_text())
  assert told['architectures'] == ['LlamaForCausalLM']
  assert told['torch_dtype'] == 'float32' and told['tie_word_embeddings']
  for file in ('tokenizer.json', 'tokenizer_config.json'):
    assert (run / 'out' / file).exists()
  before = weights.load(tmp_path / 'model').params
  after = weights.load(run / 'out').params
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, after)
  layers = moved.pop('layers')
  assert {n for n, is_moved in layers.items() if is_moved} == {'q', 'v'}
  assert not any(moved.values())
  metrics = json.loads((run / 'results.json').read_text())['metrics']
  assert np.isfinite(metrics['sft']) and np.isfinite(metrics['dpo'])
  # A finished run is only read, and foreign weights are never written over.
  subprocess.run(command(tmp_path, run), cwd=ROOT, check=True, timeout=300)
  refused = subprocess.run(
    command(tmp_path, tmp_path / 'other', f'--output={run}/out'),
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert refused.returncode == 1
  assert 'has weights already: give another --output' in refused.stderr


@pytest.mark.parametrize(
  ('given', 'match'),
  [
    ({'method': 'ppo'}, "'ppo'; known: sequential"),
    ({'comparisons': 'sft'}, "'sft'; known here: dpo, ipo, kto, orpo"),
    ({'parts': 3}, 'batches of 4 do not divide into parts=3'),
    ({'optima': '1'}, "two numbers, .* got '1'"),
    ({'sft_data': 'a.jsonl'}, 'are given together'),
  ],
)
def test_settings_that_no_run_can_have(given, match):
  with pytest.raises(harness.SettingsError, match=match):
    train.check(dataclasses.replace(train.Settings(), **given))


def test_rows_are_asked_for():
  weights_of_none = train.Settings(model='nowhere')
  options = harness.Options(
    'xright', 'train', 'quick', weights_of_none, '', None, (0,)
  )
  with pytest.raises(harness.UserError, match='nowhere is neither a folder'):
    train.prepare(options)


@pytest.mark.slow
def test_on_a_mesh_of_eight_devices_it_learns_the_same(tmp_path):
  """Up to rounding, also in micro-batches and with layers computed anew."""
  found = {}
  more = ['--steps=6', '--batch_size=8', '--parts=2', '--remat=True']
  for name, mesh in (('one', ''), ('mesh', 'fsdp=4,tp=2')):
    run = [
      sys.executable,
      '-m',
      'experiments.xright.train',
      '--preset=smoke',
      f'--mesh={mesh}',
      f'--workdir={tmp_path}/{name}',
      *more,
    ]
    flags = '--xla_force_host_platform_device_count=8'
    env = os.environ | ({'XLA_FLAGS': flags} if mesh else {})
    subprocess.run(run, cwd=ROOT, check=True, timeout=900, env=env)
    results = (tmp_path / name / 'results.json').read_text()
    found[name] = json.loads(results)['metrics']
  for name in ('sft', 'dpo'):
    np.testing.assert_allclose(
      found['mesh'][name], found['one'][name], rtol=1e-4
    )


def test_words_that_are_no_mesh():
  for words, match in (('tp=a', 'fsdp=4,tp=2 for'), ('fsdp=64', '64 places')):
    with pytest.raises(harness.SettingsError, match=match):
      sharding.layout_of(CONFIG, words)
