"""A user's model and rows: kills, resumption, export and refusals."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import harness
from experiments.harness.app import settings as settings_lib
from experiments.harness.store import loading as saved
from experiments.lm import (
  byte_tokenizer,
  decoder,
  hugging_face,
  lora,
  sharding,
  tokenizer,
  tuning,
  weights,
)
from experiments.xright import methods, runs, train
from experiments.xright import problem as problem_lib
from tests.experiments.changes import change
from tests.experiments.lm import decoder_test

ROOT = pathlib.Path(__file__).parents[3]
CONFIG = dataclasses.replace(
  decoder_test.SMALL, layers=2, vocabulary=260, context=64
)


def user_files(folder):
  """Writes a model, demonstrations and comparisons."""
  weights_test = pytest.importorskip(
    'tests.experiments.lm.weights_test', reason='needs the extra llm'
  )
  params = decoder.init(CONFIG, 0)
  hugging_face.export(folder / 'model', CONFIG, params, weights_test.words())
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
def test_a_killed_run_resumes_to_the_same_exported_weights(tmp_path):
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
  # transformers checks names, shapes, dtypes and fields.
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
  config = json.loads((run / 'out' / 'config.json').read_text())
  assert config['architectures'] == ['LlamaForCausalLM']
  assert config['torch_dtype'] == 'float32' and config['tie_word_embeddings']
  for file in ('tokenizer.json', 'tokenizer_config.json'):
    assert (run / 'out' / file).exists()
  before = weights.load(tmp_path / 'model').params
  after = weights.load(run / 'out').params
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, after)
  layers = moved.pop('layers')
  assert {n for n, is_moved in layers.items() if is_moved} == {'q', 'v'}
  assert not any(moved.values())
  metrics = json.loads((run / 'results.json').read_text())['metrics']
  assert np.isfinite(metrics['loss/sft']) and np.isfinite(metrics['loss/dpo'])
  # A finished run is only read; weights of another run are not overwritten.
  subprocess.run(command(tmp_path, run), cwd=ROOT, check=True, timeout=300)
  refused = subprocess.run(
    command(tmp_path, tmp_path / 'other', f'--output={run}/out'),
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert refused.returncode == 1
  assert 'which this run has not written: give another' in refused.stderr


def checked(**given):
  settings = change(train.Settings(), **given)
  settings_lib.check(settings)
  train.check(settings)


@pytest.mark.parametrize(
  ('given', 'match'),
  [
    ({'method': 'ppo'}, '--method=ppo: method knows sequential'),
    ({'comparisons': 'sft'}, '=sft: losses.comparisons knows dpo, ipo, kto'),
    ({'micro_batches': 3}, 'batch_size=4 is no multiple of micro_batches=3'),
    (
      {'method': 'maxright', 'micro_batches': 4, 'refresh': 6},
      'refresh=6 is no multiple of micro_batches=4',
    ),
    ({'buckets': (16, 8)}, 'rising lengths'),
    ({'method': 'reversed', 'steps': 1}, 'per stage, got steps=1'),
    ({'optima': 'nan,1'}, "two finite numbers, .* got 'nan,1'"),
    ({'optima': '1'}, "two finite numbers, .* got '1'"),
    (
      {'sft_data': 'a.jsonl'},
      'alright needs --pref_data too; --method=demonstrations trains on your',
    ),
    (
      {'sft_data': 'a.jsonl', 'method': 'comparisons'},
      'comparisons needs --pref_data too',
    ),
    (
      {'pref_data': 'a.jsonl', 'method': 'demonstrations'},
      'demonstrations needs --sft_data too',
    ),
    ({'weights': ('q_proj', 'qkv')}, 'q, k, v, o, gate, .* _proj; got qkv'),
    ({'weights': ()}, 'weights needs at least one entry'),
    (
      {'demonstrations': 'distillation', 'sft_data': 'a', 'pref_data': 'b'},
      'needs --teacher=DIR',
    ),
    ({'teacher': 'DIR'}, '--demonstrations=distillation, got sft'),
    ({'demonstrations': 'uft', 'pack': True}, 'mean over tokens.*; got uft'),
    ({'stream': True, 'layers': 3}, 'in memory for --layers=3: leave out'),
    (
      {'stream': True, 'layers': 3, 'mesh': 'tp=1'},
      'in memory for --mesh=tp=1 and --layers=3: ',
    ),
  ],
)
def test_settings_that_contradict_each_other(given, match):
  with pytest.raises(harness.SettingsError, match=match):
    checked(**given)


def test_settings_that_fit_together():
  for given in (
    {'sft_data': 'a', 'method': 'demonstrations'},
    {'pref_data': 'a', 'method': 'comparisons'},
    {'weights': ('q_proj', 'down_proj', 'o', 'q')},
    {'demonstrations': 'distillation', 'pack': True},
    {'stream': True, 'pack': True},
  ):
    checked(**given)
  names = lora.weight_names(('q_proj', 'down_proj', 'o', 'q'))
  assert names == ('q', 'down', 'o')


def test_rows_are_checked_before_the_model_is_loaded(tmp_path):
  """The model is missing, but errors about rows come first."""
  good = {'prompt': 'a', 'response': 'b'}
  for name, rows in (
    ('bad', [good, {'texts': 'c'}]),
    ('good', [good]),
    ('pairs', [{'prompt': 'a', 'chosen': 'b', 'rejected': 'c'}, good]),
  ):
    lines = '\n'.join(map(json.dumps, rows))
    (tmp_path / f'{name}.jsonl').write_text(lines)
  file = lambda name: f'{tmp_path}/{name}.jsonl'
  for files, skip, match in (
    ({}, False, 'give your rows'),
    ({'sft_data': file('bad')}, False, r'bad.jsonl, line 2 .*keys are'),
    ({'sft_data': file('none')}, False, 'there is no file .*none.jsonl'),
    ({'pref_data': file('pairs')}, False, r'line 2 .*one answer, expected two'),
    ({'sft_data': file('good')}, False, 'nowhere is neither a folder'),
    ({'sft_data': file('bad')}, True, 'nowhere is neither a folder'),
    ({'pref_data': file('pairs')}, True, 'nowhere is neither a folder'),
  ):
    settings = change(train.Settings(model='nowhere'), skip=skip, **files)
    options = harness.Options(
      'xright', 'train', 'quick', settings, '', None, (0,)
    )
    with pytest.raises(harness.UserError, match=match):
      train.prepare(options)


def test_invalid_rows_are_skipped_counted_and_named(tmp_path, capsys):
  """Invalid rows of each kind are skipped."""
  good = [
    json.dumps({'prompt': f'say {n}: ', 'response': 3 * n}).encode()
    for n in 'abcdefghijklmnopqrstuvwx'
  ]
  message = lambda role: {'role': role, 'content': 'a'}
  bad = [
    json.dumps(row).encode()
    for row in (
      {'messages': [message('assistant')]},
      {'messages': [message('user'), message('tool'), message('assistant')]},
      {'prompt': 'a', 'chosen': 'b', 'rejected': 'c'},
      {'prompt': 'a', 'completion': 'b', 'label': False},
    )
  ]
  bad += [b'{"prompt": "\xff", "response": "a"}', good[0][:-3]]
  path = tmp_path / 'rows.jsonl'
  path.write_bytes(b'\xef\xbb\xbf' + b'\n'.join([*good, b'', *bad]))
  settings = change(
    train.PRESETS['smoke'],
    method='demonstrations',
    sft_data=str(path),
    skip=True,
  )
  options = harness.Options(
    'xright', 'train', 'smoke', settings, str(tmp_path / 'run'), None, (0,)
  )
  problem, _ = train.prepare(options)
  tables = (problem.tables[part]['sft'] for part in problem.tables)
  count = sum(len(p['index']) for table in tables for p in table.parts)
  assert count == len(good)
  output = capsys.readouterr().out
  assert f'{path}: rows skipped: 6.\n  1 in line 26 (row 24 from 0)' in output
  assert 'no user turn' in output and 'line 31 ' in output
  for i, reason in enumerate(
    (
      'no user turn',
      "role 'tool'",
      'two answers',
      'label is false',
      'not UTF-8',
      'invalid JSON',
    )
  ):
    path.write_bytes(b'\n'.join([*good, b'', bad[i]]))
    options = options._replace(settings=change(settings, skip=False))
    match = rf'line 26 \(row 24 from 0\): .*{reason}.*--skip=True skips'
    with pytest.raises(harness.UserError, match=match):
      train.prepare(options)


@pytest.mark.slow
def test_on_a_mesh_of_eight_devices_it_learns_the_same(tmp_path):
  """Up to rounding, with micro-batches and rematerialisation."""
  metrics = {}
  more = ['--steps=6', '--batch_size=8', '--micro_batches=2', '--remat=True']
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
    metrics[name] = json.loads(results)['metrics']
  for name in ('loss/sft', 'loss/dpo'):
    np.testing.assert_allclose(
      metrics['mesh'][name], metrics['one'][name], rtol=1e-4
    )


def test_an_invalid_mesh_is_refused():
  for mesh, match in (('tp=a', 'fsdp=4,tp=2'), ('fsdp=64', '64 devices')):
    with pytest.raises(harness.SettingsError, match=match):
      sharding.parse_layout(CONFIG, mesh)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
  user_files(tmp_path)
  small = dataclasses.replace(CONFIG, vocabulary=200)
  (tmp_path / 'model' / 'model.safetensors').unlink()
  hugging_face.export(tmp_path / 'model', small, decoder.init(small, 0))
  settings = change(
    train.Settings(),
    model=f'{tmp_path}/model',
    sft_data=f'{tmp_path}/a.jsonl',
    pref_data=f'{tmp_path}/b.jsonl',
  )
  options = harness.Options(
    'xright', 'train', 'quick', settings, '', None, (0,)
  )
  with pytest.raises(harness.UserError, match='only 200 embeddings'):
    train.prepare(options)


def test_swapped_files_are_named(tmp_path):
  user_files(tmp_path)
  settings = change(
    train.Settings(),
    model=f'{tmp_path}/model',
    sft_data=f'{tmp_path}/b.jsonl',
    pref_data=f'{tmp_path}/b.jsonl',
  )
  for given, match in (
    (settings, r'b.jsonl, line 1 .* two answers .* expected one'),
    (
      change(
        settings,
        **{n: f'{tmp_path}/a.jsonl' for n in ('sft_data', 'pref_data')},
      ),
      r'a.jsonl, line 1 .* one answer, expected two .*chosen',
    ),
  ):
    options = harness.Options('xright', 'train', 'quick', given, '', None, (0,))
    with pytest.raises(harness.UserError, match=match):
      train.prepare(options)


def test_errors_of_files_name_the_flag_that_helps(tmp_path):
  user_files(tmp_path)
  files = {n: f'{tmp_path}/{p}.jsonl' for n, p in zip(FILES, 'ab')}
  settings = change(train.Settings(model=f'{tmp_path}/model'), **files)
  wrong = tmp_path / 'c.jsonl'
  wrong.write_text('\n{"texts": "no row"}\n')
  for more, match in (
    ({'sft_data': str(wrong)}, r'c.jsonl, line 2 \(row 0 .*--skip=True skips'),
    ({'sft_data': str(tmp_path)}, 'is a folder, expected a file of rows'),
    ({'buckets': (4, 8)}, r'a.jsonl: no example of 20 .*--buckets, .* longer'),
    (
      {'buckets': (64,), 'held_out': 12},
      r'a.jsonl: 20 rows fit .*more rows, or --held_out=5 --refresh=5\.',
    ),
  ):
    given = change(settings, **more)
    options = harness.Options('xright', 'train', 'quick', given, '', None, (0,))
    with pytest.raises(harness.UserError, match=match):
      train.prepare(options)


FILES = ('sft_data', 'pref_data')
MADE_UP = change(train.PRESETS['smoke'], steps=4, chunk=2, rank=2, batch_size=2)


def run_made_up(folder, **values):
  """Metrics of a short run of the made-up model."""
  settings = change(MADE_UP, **values)
  train.check(settings)
  options = harness.Options(
    'xright', 'train', 'smoke', settings, str(folder), None, (0,)
  )
  harness.execute(train.main, options)
  return json.loads((folder / 'results.json').read_text())['metrics']


def made_up_rows(path, pairs):
  """Writes the made-up rows, with an invalid one, to a file."""
  *_, examples = problem_lib.made_up(24)
  rows = ['{"a": 1}']
  for one in examples['dpo' if pairs else 'sft']:
    row = {'prompt': one.prompt, 'response': one.answer}
    if pairs:
      row = {'prompt': one.prompt, 'chosen': one.answer}
      row['rejected'] = one.rejected
    rows.append(json.dumps(row))
  path.write_text('\n'.join(rows))
  return str(path)


def test_the_preset_smoke_takes_a_users_dialogues(tmp_path, capsys):
  """They are longer than its own rows, need a template, and stay on disk."""
  pytest.importorskip('jinja2')
  path = tmp_path / 'dialogues.jsonl'
  texts = [f'How much is {i} + 1, please?' for i in range(30)] + [600 * 'a']
  rows = [
    {
      'messages': [
        {'role': 'user', 'content': text},
        {'role': 'assistant', 'content': f'It is {i + 1}.'},
      ]
    }
    for i, text in enumerate(texts)
  ]
  path.write_text('\n'.join(map(json.dumps, rows)))
  metrics = run_made_up(
    tmp_path / 'run', method='demonstrations', sft_data=str(path), stream=True
  )
  assert metrics['loss/sft'] < metrics['loss/sft/start']
  assert 'Examples left out: 1 (too long: 1).' in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize('pack', [False, True])
def test_rows_on_disk_are_trained_like_rows_in_memory(
  tmp_path, monkeypatch, pack
):
  """Also after a resumption, with every kind of objective."""
  # References of several chunks.
  monkeypatch.setattr(train.objectives, '_CHUNK', 8)
  files = {
    'sft_data': made_up_rows(tmp_path / 'a.jsonl', pairs=False),
    'pref_data': made_up_rows(tmp_path / 'b.jsonl', pairs=True),
  }
  values = dict(
    method='maxright',
    skip=True,
    held_out=4,
    refresh=2,
    micro_batches=2,
    pack=pack,
    buckets=(32, 48),
  )
  memory = run_made_up(tmp_path / 'memory', **files, **values)
  values |= {'stream': True}
  run_made_up(tmp_path / 'disk', **files, **values, steps=2)
  disk = run_made_up(tmp_path / 'disk', **files, **values)
  assert disk == memory and np.isfinite(disk['loss/dpo'])
  # The content of the file identifies the run.
  change_one = pathlib.Path(files['pref_data'])
  change_one.write_text(change_one.read_text().replace('aaa', 'zzz', 1))
  with pytest.raises(harness.OtherRunError, match='changed: data'):
    run_made_up(tmp_path / 'disk', **files, **values)


def test_metrics_are_written_under_the_names_of_trl(tmp_path):
  run_made_up(tmp_path, method='mix', mixing_ratio=0.25, learning_rate=0.01)
  read = lambda name: [
    json.loads(line)
    for line in (tmp_path / 'mix' / name).read_text().splitlines()
  ]
  own, renamed = read('metrics.jsonl'), read('trl_metrics.jsonl')
  assert [one['train/global_step'] for one in renamed] == [0, 2, 4]
  assert {one['train/learning_rate'] for one in renamed} == {0.01}
  for one, other in zip(own, renamed, strict=True):
    losses = [one[f'held_out/{name}'][0] for name in ('sft', 'dpo')]
    assert other['eval/loss'] == pytest.approx(losses @ np.array([0.75, 0.25]))
    assert other['eval/rewards/accuracies'] == one['held_out/accuracy'][0]
    margin = other['eval/rewards/chosen'] - other['eval/rewards/rejected']
    assert other['eval/rewards/margins'] == pytest.approx(margin, abs=1e-6)
  last = own[-1]
  assert renamed[-1]['train/loss'] == pytest.approx(
    0.75 * last['loss/sft'][0] + 0.25 * last['loss/dpo'][0]
  )
  assert renamed[-1]['train/grad_norm'] == last['loss/grad_norm'][0] > 0
  assert (
    renamed[-1]['train/mean_token_accuracy']
    == (last['loss/mean_token_accuracy/sft'][0])
  )
  # Batches since the first record, at larger rewards than these of the start.
  rewards = [renamed[-1][f'train/rewards/{n}'] for n in ('chosen', 'rejected')]
  margin = rewards[0] - rewards[1]
  assert renamed[-1]['train/rewards/margins'] == pytest.approx(margin, abs=1e-6)
  assert renamed[-1]['train/logps/chosen'] < 0
  # Before the first update, nothing was trained on.
  assert not any('train/rewards' in name for name in renamed[0])
  # The loss of comparisons is about log 2 - margin / 2 for small margins.
  assert renamed[0]['eval/rewards/margins'] == 0
  assert renamed[-1]['eval/rewards/margins'] == pytest.approx(
    2 * (np.log(2) - last['held_out/dpo'][0]), rel=0.1, abs=1e-3
  )


def test_layers_are_recomputed_above_a_size(monkeypatch):
  """With the same gradients, and less memory."""
  tuned = train.Settings().tuning(CONFIG)
  limit = tuning.REMAT_BYTES
  per_row = 4 * CONFIG.layers * 64 * CONFIG.stored_per_token(64)
  rows = limit // per_row
  assert not tuned.recomputes(rows, 64) and tuned.recomputes(rows + 1, 64)
  for other in (tuned._replace(layers=1), tuned._replace(dtype=jnp.bfloat16)):
    assert not other.recomputes(rows + 1, 64)
    assert other.recomputes(2 * rows + 2, 64)
  for given in (True, False):
    forced = change(train.Settings(), remat=given).tuning(CONFIG)
    assert forced.recomputes(1, 64) == forced.recomputes(10**9, 64) == given

  model, words, examples = problem_lib.made_up(24)
  tuned = tuning.Tuning(model.config, rank=2, remat='auto')
  problem = problem_lib.prepare(
    model, words, tuned, examples, problem_lib.Sizes(4, (16,), 7, 3)
  )
  trained = tuned.init(problem.frozen, jax.random.key(0))
  trained = jax.tree.map(lambda leaf: leaf + 0.01, trained)

  def compile_gradient():
    losses = problem.losses(
      problem.tables['train'], problem.frozen, jax.random.key(1)
    )
    total = lambda t: sum(loss(t, 0) for loss in losses.values())
    return jax.jit(jax.grad(total)).lower(trained).compile()

  stored = compile_gradient()
  monkeypatch.setattr(tuning, 'REMAT_BYTES', 0)
  recomputed = compile_gradient()
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    stored(trained),
    recomputed(trained),
  )
  assert all(np.any(leaf) for leaf in jax.tree.leaves(stored(trained)))
  less, more = (
    compiled.memory_analysis().temp_size_in_bytes
    for compiled in (recomputed, stored)
  )
  assert less < 0.9 * more


def test_length_controls_count_ties_half():
  tokens = lambda *lengths: np.arange(4) < np.array(lengths)[:, None]
  part = {
    'chosen_mask': tokens(4, 2, 1, 3),
    'rejected_mask': tokens(1, 2, 3, 2),
  }
  table = problem_lib.tables.Table((part,), 0, 4, (4,))
  problem = types.SimpleNamespace(tables={'held_out': {'dpo': table}})
  accuracy = problem_lib.length_controls(problem)
  assert {*accuracy} == {*methods.CONTROLS}
  assert accuracy['control/longer_answer'] == 5 / 8
  assert accuracy['control/shorter_answer'] == 3 / 8
  problem.tables['held_out'] = {'sft': table}
  assert problem_lib.length_controls(problem) == {}


@pytest.mark.slow
def test_one_objective_needs_its_rows_only_and_its_loss_falls(
  tmp_path, monkeypatch
):
  """Comparisons only, and distillation of packed rows only."""
  model, first_tokenizer, _ = problem_lib.made_up()
  file = made_up_rows(tmp_path / 'b.jsonl', pairs=True)
  metrics = run_made_up(
    tmp_path / 'b',
    method='comparisons',
    comparisons='uft_pairs',
    pref_data=file,
    skip=True,
    held_out=4,
    refresh=1,
  )
  assert metrics['loss/uft_pairs'] < 0.25  # The loss of zero rewards.
  assert 'accuracy/uft_pairs' in metrics
  assert {f'accuracy/control/{n}_answer' for n in ('longer', 'shorter')} <= (
    set(metrics)
  )
  file = made_up_rows(tmp_path / 'a.jsonl', pairs=False)
  llm = all(map(importlib.util.find_spec, ('safetensors', 'tokenizers')))
  monkeypatch.setattr(train, 'load_teacher', lambda *_: model)
  metrics = run_made_up(
    tmp_path / 'a',
    method='demonstrations',
    demonstrations='distillation',
    teacher='itself',
    sft_data=file,
    skip=True,
    pack=True,
    held_out=4,
    refresh=1,
    buckets=(16, 32),
    rank=0,
    learning_rate=1e-7,  # Adam scales rounding errors up to steps.
    output=str(tmp_path / 'out') if llm else '',
  )
  assert not [name for name in metrics if 'accuracy' in name]
  # The model is its own teacher.
  np.testing.assert_allclose(metrics['loss/distillation'], 0, atol=1e-6)
  if not llm:
    pytest.skip('needs the extra llm')
  # A made-up model is written on request.
  after = weights.load(tmp_path / 'out')
  assert after.config.width == model.config.width
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
    after.params,
    model.params,
  )
  again = tokenizer.load(after.vocabulary, after.config)
  text = 'say\n\x00 \u00e9\U0001f600'
  assert (
    again.encode(text) == first_tokenizer.encode(text) == list(text.encode())
  )
  assert again.decode([*again.encode(text), 256]) == f'{text}</s>'
  assert again.end == first_tokenizer.end
  assert again.numbers() == first_tokenizer.numbers()


def test_the_best_step_is_written(tmp_path):
  """A step size that is too large makes the last losses worse."""
  llm = all(map(importlib.util.find_spec, ('safetensors', 'tokenizers')))
  metrics = run_made_up(
    tmp_path / 'run',
    method='mix',
    mixing_ratio=0.25,
    steps=16,
    learning_rate=0.1,
    keep='best',
    output=str(tmp_path / 'out') if llm else '',
  )
  lines = (tmp_path / 'run/mix/metrics.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  losses = [[row[f'held_out/{n}'][0] for n in ('sft', 'dpo')] for row in rows]
  scores = [0.75 * sft + 0.25 * dpo for sft, dpo in losses]
  best = losses[np.argmin(scores)]
  assert best not in (losses[0], losses[-1])
  for name, value in zip(('sft', 'dpo'), best, strict=True):
    assert metrics[f'loss/{name}'] == pytest.approx(value)
  if llm:
    written = weights.load(tmp_path / 'out')
    problem, _ = train.prepare(
      harness.Options(
        *('xright', 'train', 'smoke', MADE_UP, str(tmp_path), None, (0,))
      )
    )
    table = problem.tables['held_out']
    full = problem._replace(tuning=problem.tuning._replace(rank=0))
    again = problem_lib.measure(full, written.params, {}, table)
    assert float(again['sft']) == pytest.approx(metrics['loss/sft'], rel=1e-4)


def test_a_second_stage_starts_from_the_adapters_of_the_first(tmp_path):
  pytest.importorskip('safetensors')
  pytest.importorskip('tokenizers')
  first = run_made_up(
    tmp_path / 'first', method='mix', output=str(tmp_path / 'one')
  )
  second = run_made_up(
    tmp_path / 'second',
    method='mix',
    start_adapters=str(tmp_path / 'one/adapters'),
    output=str(tmp_path / 'two'),
  )
  start = pytest.approx(first['loss/sft'], rel=1e-5)
  assert second['loss/sft/start'] == start
  # The merged model is the reference, so that all rewards are zero.
  assert first['accuracy/dpo'] != 0.5 == second['accuracy/dpo/start']
  assert second['loss/dpo/start'] == pytest.approx(np.log(2), rel=1e-5)
  # Its adapters would be wrong without those of the first stage.
  assert not (tmp_path / 'two/adapters').exists()


def test_adapters_are_not_merged_twice(tmp_path):
  settings = change(
    MADE_UP, model=f'{tmp_path}/one', start_adapters=f'{tmp_path}/one/adapters'
  )
  with pytest.raises(harness.SettingsError, match='merged already'):
    train.check(settings)


def test_labelled_answers_are_learned(tmp_path):
  """Wanted answers are ranked above unwanted ones after training."""
  *_, examples = problem_lib.made_up(24)
  rows = []
  for one in examples['dpo']:
    for answer, label in ((one.answer, True), (one.rejected, False)):
      row = {'prompt': one.prompt, 'completion': answer, 'label': label}
      rows.append(json.dumps(row))
  file = tmp_path / 'labelled.jsonl'
  file.write_text('\n'.join(rows))
  values = dict(
    method='comparisons',
    comparisons='kto_labelled',
    pref_data=str(file),
    held_out=16,
    refresh=1,
    batch_size=4,
    steps=40,
    chunk=20,
  )
  metrics = run_made_up(tmp_path / 'run', **values)
  assert metrics['loss/kto_labelled/start'] == pytest.approx(0.5, rel=1e-5)
  assert metrics['loss/kto_labelled'] < 0.5
  assert metrics['accuracy/kto_labelled/start'] == 0.5  # All rewards are 0.
  assert metrics['accuracy/kto_labelled'] > 0.55
  file.write_text('\n'.join(rows[::2]))
  with pytest.raises(harness.SettingsError, match='16 held-out answers are wa'):
    run_made_up(tmp_path / 'one', **values)


def test_a_teacher_needs_the_tokenizer_of_the_model(tmp_path):
  user_files(tmp_path)
  model = weights.load(tmp_path / 'model')
  same_tokenizer = tokenizer.load(model.vocabulary, model.config)
  same = weights.teacher(tmp_path / 'model', model, same_tokenizer)
  assert same.config == model.config
  with pytest.raises(harness.UserError, match='has other tokens'):
    weights.teacher(tmp_path / 'model', model, byte_tokenizer.make())
  more = dataclasses.replace(CONFIG, vocabulary=300)
  hugging_face.export(
    tmp_path / 'more', more, decoder.init(more, 0), same_tokenizer
  )
  with pytest.raises(harness.UserError, match='300 embeddings, the model 260'):
    weights.teacher(tmp_path / 'more', model, same_tokenizer)


def test_the_exported_model_is_that_of_the_last_step(tmp_path, monkeypatch):
  """More steps, a missing folder, and a kill during the export."""
  user_files(tmp_path)
  model = weights.load(tmp_path / 'model')
  settings = change(
    train.PRESETS['smoke'], model='given', output=f'{tmp_path}/out', rank=0
  )
  problem = types.SimpleNamespace(
    names=(),
    weights=lambda ratio: {},
    tables={'held_out': {}},
    model=model,
    tokenizer=tokenizer.load(model.vocabulary, model.config),
    tuning=tuning.Tuning(model.config, rank=0),
  )

  def run(options, problem, method, plan, **given):
    del options, problem, method, given
    params = jax.tree.map(lambda w: w[None] + plan.steps, model.params)
    history = {'held_out/accuracy': np.zeros((2, 1))}
    return types.SimpleNamespace(
      params=params,
      step=plan.steps,
      steps=np.array([0, plan.steps]),
      history=history,
    )

  monkeypatch.setattr(train, 'prepare', lambda options: (problem, None))
  monkeypatch.setattr(train.runs, 'run', run)

  def trained(steps, workdir='run', **more):
    given = change(settings, steps=steps, **more)
    options = harness.Options(
      'xright', 'train', 'smoke', given, f'{tmp_path}/{workdir}', None, (0,)
    )
    harness.execute(train.main, options)
    norm = weights.load(given.files.output).params['norm']
    return round(float((norm - model.params['norm'])[0]))

  file = tmp_path / 'out' / 'model.safetensors'
  assert trained(2) == 2
  before = file.stat().st_mtime_ns
  assert trained(2) == 2 and file.stat().st_mtime_ns == before
  assert trained(4) == 4
  file.unlink()
  assert trained(4) == 4
  with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
    patched.setattr(train.hugging_face, 'export', _half_an_export)
    trained(6)
  assert trained(6) == 6
  assert trained(6, output=f'{tmp_path}/other') == 6
  # Both folders belong to this run; another run may not write there.
  before = file.stat().st_mtime_ns
  assert trained(6) == 6 and file.stat().st_mtime_ns == before
  assert trained(8) == 8 and trained(8, output=f'{tmp_path}/other') == 8
  for name in ('out', 'other'):
    with pytest.raises(harness.UserError, match='give another --output'):
      trained(6, workdir='another', output=f'{tmp_path}/{name}')
  # Files that replaced exported ones are not overwritten.
  file.write_bytes((tmp_path / 'model' / 'model.safetensors').read_bytes())
  with pytest.raises(harness.UserError, match='give another --output'):
    trained(8)


def _half_an_export(folder, *_, **__):
  (folder / 'model.safetensors').write_bytes(b'half')
  raise KeyboardInterrupt


def test_the_identity_of_stages_has_their_steps(monkeypatch):
  recorded = {}
  monkeypatch.setattr(
    train.runs,
    'run',
    lambda *_, identity, **__: recorded.update(identity) or 1 / 0,
  )
  problem = types.SimpleNamespace(
    tuning=tuning.Tuning(CONFIG), weights=lambda ratio: {}
  )
  monkeypatch.setattr(train, 'prepare', lambda options: (problem, None))
  for method, kept in (
    ('sequential', True),
    ('reversed', True),
    ('mix', False),
  ):
    recorded.clear()
    settings = train.Settings(method=method)
    options = harness.Options(
      'xright', 'train', 'smoke', settings, '', None, (0,)
    )
    with pytest.raises(ZeroDivisionError):
      train.main(options)
    assert ('steps' in recorded) == kept


@pytest.mark.parametrize(
  ('fields', 'rates'),
  [
    ({}, [1, 1, 1, 1, 1, 1]),
    ({'warmup': 2}, [1 / 3, 2 / 3, 1, 1, 1, 1]),
    ({'schedule': 'linear'}, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
    (
      {'schedule': 'linear', 'warmup': 2},
      [1 / 3, 2 / 3, 1, 3 / 4, 1 / 2, 1 / 4],
    ),
    (
      {'schedule': 'cosine', 'warmup': 2},
      [1 / 3, 2 / 3, *((1 + np.cos(np.pi * np.arange(4) / 4)) / 2)],
    ),
  ],
)
def test_learning_rates_rise_and_decay(fields, rates):
  """Weight decay alone shows the learning rate: no gradient, no Adam."""
  rate, decay = 0.01, 0.5
  optimiser = runs.Optimiser(rate, weight_decay=decay, **fields).make(6)
  params = jnp.array([2.0])
  state, sizes = optimiser.init(params), []
  for _ in range(6):
    update, state = optimiser.update(jnp.zeros(1), state, params)
    sizes.append(float(-update[0] / (rate * decay * 2.0)))
  # float32, and a few roundings of each rate.
  np.testing.assert_allclose(sizes, rates, rtol=1e-5)


def test_a_decay_needs_updates_after_the_warm_up():
  optimiser = runs.Optimiser(schedule='cosine', warmup=200)
  with pytest.raises(harness.SettingsError, match='leaves none of --steps=200'):
    train.check(train.Settings(optimiser=optimiser))
  assert train.Settings(
    optimiser=runs.Optimiser(schedule='linear')
  ).has_fixed_length
  assert not train.Settings(optimiser=runs.Optimiser(warmup=9)).has_fixed_length
