"""Any flag of any binary: a run, or one line that says why not."""

import contextlib
import dataclasses
import importlib
import pathlib
import subprocess
import sys

import hypothesis
import jax
import numpy as np
import pytest
from absl import flags
from hypothesis import strategies as st

from experiments import harness
from experiments.aipod import client_digits, federated
from experiments.harness.app import flags as flags_lib
from experiments.harness.app import memory
from experiments.harness.app import settings as settings_lib
from experiments.harness.store import checkpoints, files
from experiments.moco import tabular
from tests.tiers import first

ROOT = pathlib.Path(__file__).parents[2]
BINARIES = [
  '.'.join(path.relative_to(ROOT).with_suffix('').parts)
  for path in sorted((ROOT / 'experiments').rglob('*.py'))
  if '\nSTUDY = ' in path.read_text() and path.parent.name != 'harness'
]
TEXTS = (
  *('0', '-3', '0.0', '-0.0', '1e400', 'nan', '-inf', '1e-400', '1_0', '5'),
  *('', ',', '1,,2', '1,-2', 'a', 'True', 'None', '\N{SUPERSCRIPT TWO}', ' 3 '),
  *(str(2**31), str(10**30), '9' * 5_000, '0.5', '2000', '0,1', '1e9', '\0'),
)


def checked(name, *arguments):
  """The settings that a binary would run with."""
  binary = importlib.import_module(name)
  values = flags.FlagValues()
  flags_lib.define(binary.PRESETS, values=values)
  values(['binary', *arguments])
  options = flags_lib.resolve(
    binary.PRESETS, paper='a', binary='b', values=values
  )
  getattr(binary, 'check', lambda settings: None)(options.settings)
  return options.settings


@pytest.mark.parametrize('name', BINARIES)
def test_presets_pass(name):
  for preset in importlib.import_module(name).PRESETS:
    try:
      checked(name, f'--preset={preset}')
    except harness.SettingsError as error:
      if 'needs the extra' not in str(error):
        raise
      pytest.skip(str(error))


@pytest.mark.parametrize('name', BINARIES)
def test_the_help_of_a_flag_stands_alone(name):
  settings = next(iter(importlib.import_module(name).PRESETS.values()))
  for name, field in settings_lib.flatten(settings).items():
    text = field.description
    assert not text or text.endswith('.'), name  # Not cut off.
    # `--help` sorts flags: what stood above is somewhere else.
    assert not text.lower().startswith(('likewise', 'as in')), name


@pytest.mark.parametrize('name', first(BINARIES, count=6))
@hypothesis.settings(max_examples=40)
@hypothesis.given(data=st.data())
def test_any_text_is_a_value_or_one_line(name, data):
  binary = importlib.import_module(name)
  fields = settings_lib.flatten(next(iter(binary.PRESETS.values())))
  field = data.draw(st.sampled_from(sorted(set(fields) - {'seeds'})))
  text = data.draw(st.sampled_from(TEXTS) | st.text(max_size=8))
  with contextlib.suppress(harness.SettingsError):
    checked(name, f'--{field}={text}')


def resolved(*arguments):
  """Options of a small study, from its flags."""
  values = flags.FlagValues()
  presets = importlib.import_module('experiments.custom_problem').PRESETS
  flags_lib.define(presets, values=values)
  values(['binary', *arguments])
  return flags_lib.resolve(presets, paper='a', binary='b', values=values)


@pytest.mark.parametrize('seconds', ['nan', 'inf', '1e999'])
def test_seconds_between_checkpoints_are_finite(seconds):
  with pytest.raises(harness.SettingsError, match='save_seconds must be finit'):
    resolved(f'--save_seconds={seconds}')


@pytest.mark.parametrize('name', ['file/run', 'file', 'link'])
def test_a_workdir_that_cannot_be_written_is_refused(name, tmp_path):
  (tmp_path / 'file').write_text('')
  (tmp_path / 'link').symlink_to(tmp_path / 'link')
  with pytest.raises(harness.WriteError, match=f'{name}.*--workdir'):
    files.check_writable(tmp_path / name)


def test_a_workdir_whose_name_is_not_utf8_is_refused(tmp_path):
  with pytest.raises(harness.WriteError, match=r'no name in UTF-8.*--workdir'):
    files.check_writable(tmp_path / 'a\udcff')


def test_a_workdir_is_made(tmp_path):
  files.check_writable(tmp_path / 'a/b')
  assert not list((tmp_path / 'a/b').iterdir())


@pytest.mark.parametrize('kind', ['folder', 'text'])
def test_settings_that_are_no_file_are_put_aside(kind, tmp_path):
  path = tmp_path / 'settings.json'
  if kind == 'folder':
    (path / 'inner').mkdir(parents=True)
  else:
    path.write_text('[' * 9_999)
  with pytest.warns(RuntimeWarning, match=r'settings\.json is damaged'):
    checkpoints.check_settings(path, {'a': 1})
  checkpoints.check_settings(path, {'a': 1})
  assert (tmp_path / 'damaged/settings.json').exists()


@pytest.mark.parametrize(
  'make',
  [
    lambda n: np.zeros((n, n, n)),
    lambda n: np.random.default_rng(0).uniform(size=(n, n)),
    lambda n: np.arange(n**3),
    lambda n: jax.random.uniform(jax.random.key(0), (n, n, n)),
  ],
)
def test_too_large_sizes_are_recognised(make):
  with pytest.raises(Exception, match=r'.') as error:
    make(2**31 - 1)
  assert memory.is_exceeded(error.value)
  assert not memory.is_exceeded(ValueError('shapes differ'))


@pytest.mark.parametrize('split', [{'clients': 10**8}, {'shards': 10**8}])
def test_more_shards_than_digits(split):
  with pytest.raises(harness.SettingsError, match=r'too few .* shards: take'):
    client_digits.load_digits(None, client_digits.Split(**split))


def test_windows_of_a_pooling_divide_an_image():
  split = client_digits.Split(pooling=3)
  settings = dataclasses.replace(federated.PRESETS['smoke'], digits=split)
  with pytest.raises(harness.SettingsError, match='pooling=3 must divide 28'):
    federated.check(settings)


def test_all_data_is_read_before_any_training(tmp_path, monkeypatch):
  (tmp_path / 'one.csv').write_text('a,b,c\n' + '1,2,3\n4,5,6\n' * 9)
  settings = dataclasses.replace(
    tabular.PRESETS['smoke'],
    datasets=('one.csv', 'two.csv'),
    targets=('a', 'b'),
  )
  options = harness.Options(
    *('moco', 'tabular', 'smoke', settings),
    *(str(tmp_path / 'run'), str(tmp_path), (0,)),
  )
  monkeypatch.setattr(tabular.compare, 'compare', lambda *_, **__: 1 / 0)
  with pytest.raises(harness.MissingDataError, match=r'two\.csv'):
    tabular.main(options)


@pytest.mark.slow
@pytest.mark.parametrize(
  'words',
  [
    'pbgd.hyper_cleaning --chunk=0',
    'moco.tabular --preset=smoke --hidden=-3',
    'stsa.bilevel_zoo --calls=-1',
    'stsa.bilevel_zoo --batch_size=0',
    'aipod.federated --preset=smoke --clients=2000',
    'aipod.federated --preset=smoke --taking_part=9',
    'aipod.federated --preset=smoke --digits.shards=2147483647',
    'aipod.federated --preset=smoke --digits.shards=100000000',
    'aipod.synthetic --preset=smoke --size=100000000',
    'a3c.synthetic --process.states=100000000',
    'a3c.synthetic --preset=smoke --process.actions=2147483647',
    'a3c.gymnax --preset=smoke --env=nonsense',
    'benchmarks.suite --preset=smoke --only=nonsense',
    'pbrl.incentive_design --preset=smoke --game.states=100000000',
    'pbrl.stackelberg --preset=smoke --game.actions=100000000,100000000',
    'pbrl.incentive_design --preset=smoke --game.states=100000000 '
    '--game.actions=100000000,100000000',
    'moco.tabular --preset=smoke --datasets=made_up,missing.csv',
    'a3c.synthetic --process.states=10000 --process.actions=9999',
    'stsa.bilevel_zoo --preset=smoke --quadratic.size=100000000',
  ],
)
def test_the_process_says_one_line(words, tmp_path):
  module, *rest = words.split()
  process = subprocess.run(
    [
      *(sys.executable, '-m', f'experiments.{module}'),
      *(*rest, f'--workdir={tmp_path}'),
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert process.returncode == 1
  assert process.stderr.count('\n') == 1, process.stderr
  assert process.stderr.startswith(module.replace('.', '/'))


@pytest.mark.slow
@pytest.mark.parametrize('flag', ['--help', '-h', '--helpfull'])
def test_help_exits_without_an_error(flag):
  process = subprocess.run(
    [sys.executable, '-m', 'experiments.custom_problem', flag],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert process.returncode == 0 and '--save_seconds' in process.stdout
