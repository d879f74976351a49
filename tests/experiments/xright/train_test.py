"""A user's own model and rows, killed and gone on, to a folder for others."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest

from experiments import harness
from experiments.harness import saved
from experiments.lm import decoder, sharding, tokenizer, tuning, weights
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
    ({'method': 'maxright', 'parts': 4, 'refresh': 6}, 'refresh=6 rows do not'),
    ({'buckets': (16, 8)}, 'rising lengths'),
    ({'method': 'reversed', 'steps': 1}, 'each stage at least, got steps=1'),
    ({'optima': 'nan,1'}, "two finite numbers, .* got 'nan,1'"),
    ({'optima': '1'}, "two finite numbers, .* got '1'"),
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


def test_a_tokeniser_of_another_model_is_refused(tmp_path):
  user_files(tmp_path)
  small = dataclasses.replace(CONFIG, vocabulary=200)
  (tmp_path / 'model' / 'model.safetensors').unlink()
  weights.export(tmp_path / 'model', small, decoder.init(small, 0))
  settings = train.Settings(model=f'{tmp_path}/model')
  options = harness.Options(
    'xright', 'train', 'quick', settings, '', None, (0,)
  )
  with pytest.raises(harness.UserError, match='embeddings for 200 only'):
    train.prepare(options)


def test_files_that_are_exchanged_are_named(tmp_path):
  user_files(tmp_path)
  settings = train.Settings(
    model=f'{tmp_path}/model',
    sft_data=f'{tmp_path}/b.jsonl',
    pref_data=f'{tmp_path}/b.jsonl',
  )
  for given, match in (
    (settings, 'b.jsonl, row 0: two answers, expected one'),
    (
      dataclasses.replace(
        settings,
        **{n: f'{tmp_path}/a.jsonl' for n in ('sft_data', 'pref_data')},
      ),
      'a.jsonl, row 0: one answer, expected two, chosen and rejected',
    ),
  ):
    options = harness.Options('xright', 'train', 'quick', given, '', None, (0,))
    with pytest.raises(harness.UserError, match=match):
      train.prepare(options)


def test_what_is_written_is_of_the_last_step(tmp_path, monkeypatch):
  """More steps, a folder that is gone, and a kill while it was written."""
  user_files(tmp_path)
  words = weights.load(tmp_path / 'model')
  settings = dataclasses.replace(
    train.PRESETS['smoke'], model='given', output=f'{tmp_path}/out', rank=0
  )
  problem = types.SimpleNamespace(
    names=(),
    model=words,
    words=tokenizer.load(words.vocabulary, words.config),
    tuning=tuning.Tuning(words.config, rank=0),
  )

  def run(problem, method, plan, **given):
    del problem, method, given
    params = jax.tree.map(lambda w: w[None] + plan.steps, words.params)
    history = {'held_out/accuracy': np.zeros((2, 1))}
    return types.SimpleNamespace(
      params=params, step=plan.steps, steps=[0, plan.steps], history=history
    )

  monkeypatch.setattr(train, 'prepare', lambda options: (problem, None))
  monkeypatch.setattr(train.runs, 'run', run)

  def trained(steps, workdir='run', **more):
    given = dataclasses.replace(settings, steps=steps, **more)
    options = harness.Options(
      'xright', 'train', 'smoke', given, f'{tmp_path}/{workdir}', None, (0,)
    )
    train.main(options)
    norm = weights.load(given.output).params['norm']
    return round(float((norm - words.params['norm'])[0]))

  file = tmp_path / 'out' / 'model.safetensors'
  assert trained(2) == 2
  before = file.stat().st_mtime_ns
  assert trained(2) == 2 and file.stat().st_mtime_ns == before
  assert trained(4) == 4
  file.unlink()
  assert trained(4) == 4
  with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
    patched.setattr(train.weights, 'export', _half_an_export)
    trained(6)
  assert trained(6) == 6
  assert trained(6, output=f'{tmp_path}/other') == 6
  with pytest.raises(harness.UserError, match='give another --output'):
    trained(6, workdir='another')


def _half_an_export(folder, *_):
  (folder / 'model.safetensors').write_bytes(b'half')
  raise KeyboardInterrupt


def test_stages_are_not_made_longer(monkeypatch):
  seen = {}
  monkeypatch.setattr(
    train.runs, 'run', lambda *_, settings, **__: seen.update(settings) or 1 / 0
  )
  monkeypatch.setattr(train, 'prepare', lambda options: (None, None))
  for method, kept in (
    ('sequential', True),
    ('reversed', True),
    ('mix', False),
  ):
    seen.clear()
    settings = train.Settings(method=method)
    options = harness.Options(
      'xright', 'train', 'quick', settings, '', None, (0,)
    )
    with pytest.raises(ZeroDivisionError):
      train.main(options)
    assert ('steps' in seen) == kept
