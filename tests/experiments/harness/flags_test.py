"""Tests of the flags of a binary."""

import dataclasses
import json
import pathlib
import signal
import sys
from typing import Annotated, Literal

import jax
import numpy as np
import pytest
from absl import flags

from experiments import harness
from experiments.harness.app import compile_cache
from experiments.harness.app import flags as flags_lib
from experiments.harness.app import settings as settings_lib
from experiments.harness.study import help as help_lib


@dataclasses.dataclass(frozen=True)
class Settings:
  steps: int = 10
  rate: float = 0.5
  name: str = 'a'
  fast: bool = False
  sizes: tuple[int, ...] = (1, 2)
  names: tuple[str, ...] = ('a',)
  limit: float | None = None
  mode: Literal['mean', 'max'] = 'mean'
  seeds: int = 3


PRESETS = {'quick': Settings(), 'paper': Settings(steps=1000)}


def parse(*arguments, presets=PRESETS):
  values = flags.FlagValues()
  flags_lib.define(presets, values=values)
  values(['toy', *arguments])
  return flags_lib.resolve(presets, paper='pbgd', binary='toy', values=values)


@dataclasses.dataclass(frozen=True)
class Training:
  """How long.

  Attributes:
    steps: updates, of
      each method.
    rate: step size.
  """

  steps: int = 10
  rate: float = 0.5


@dataclasses.dataclass(frozen=True)
class Grouped:
  """Settings with words, of two groups with one name in common."""

  other: Annotated[str, harness.Among(('a', 'b'))] = 'a'
  train: Training = Training()
  again: Training = Training(rate=0.1)
  own: Settings = Settings()


GROUPED = {'quick': Grouped(), 'paper': Grouped(train=Training(steps=99))}


class TestGroups:
  def test_names(self):
    settings = parse('--train.steps=3', '--again.rate=2', presets=GROUPED)
    settings = settings.settings
    assert settings.train == Training(steps=3)
    assert settings.again == Training(rate=2.0)
    told = settings_lib.run_settings(settings, 'own', 'again.rate')
    assert told == {
      'other': 'a',
      'train.steps': 3,
      'train.rate': 0.5,
      'again.steps': 10,
    }

  def test_a_last_part_that_is_one_field_s_is_a_flag_too(self):
    assert parse('--limit=3', presets=GROUPED).settings.own.limit == 3
    with pytest.raises(harness.SettingsError, match='are the same flag'):
      parse('--limit=3', '--own.limit=3', presets=GROUPED)
    with pytest.raises(flags.UnrecognizedFlagError):
      parse('--rate=3', presets=GROUPED)

  @pytest.mark.parametrize(
    ('argument', 'says'),
    [
      ('--train.steps=0', '--train.steps=0: train.steps must be at least 1.'),
      ('--train.steps=x', 'train.steps takes an integer.'),
      ('--other=c', '--other=c: other knows a, b.'),
    ],
  )
  def test_refused(self, argument, says):
    with pytest.raises(harness.SettingsError, match=says):
      parse(argument, presets=GROUPED)

  def test_help(self, run):
    main = lambda options: None
    assert run(main, '--help', '--preset=paper', presets=GROUPED) == 0
    lines = run.said().splitlines()
    assert lines[0] == 'Tests of the flags of a binary.'
    assert '  --preset=paper' in lines and '  --workdir' in lines
    of = lines.index('Train, with values of the preset paper:')
    assert lines[of + 1 : of + 3] == [
      '  --train.steps=99',
      '      Updates, of each method. Takes an integer.',
    ]
    assert max(map(len, lines)) <= 80


class TestMeanings:
  """Of presets and of names, in `--help`."""

  def study(self):
    @dataclasses.dataclass(frozen=True)
    class Named:
      """Settings.

      Attributes:
        methods: a first one, then others.
        model: linear, or mlp.
        others: more of them.
      """

      methods: Annotated[
        tuple[str, ...],
        harness.Among(
          {'soba': 'SOBA', 'plain': 'penalty'}, {'plain': 'no penalty'}
        ),
      ] = ('soba',)
      model: Literal['linear', 'mlp'] = 'linear'
      others: Annotated[str, harness.Among(('soba', 'plain'))] = 'soba'

    presets = {
      'quick': Named(),
      'wide': Named(model='mlp'),
      'paper': Named(),
    }
    return harness.Study(
      lambda options: None, presets, paper='pbgd', binary='toy'
    )

  def test_names(self):
    page = help_lib.text('A study.', self.study(), 'quick')
    assert page.count(' plain: no penalty') == 1
    assert page.count(' soba: SOBA: steps of the lower variable') == 1
    assert '      linear, or mlp. Takes one of linear, mlp.' in page
    assert '      A first one, then others.' in page

  def test_presets(self, tmp_path):
    folder = tmp_path / 'experiments' / 'pbgd' / 'results'
    folder.mkdir(parents=True)
    for name, seconds in (('one', 30), ('two', 600)):
      results = {'binary': 'toy', 'preset': 'wide', 'wall_seconds': seconds}
      (folder / f'{name}.json').write_text(json.dumps(results))
    page = help_lib.text('A study.', self.study(), 'quick', tmp_path)
    says = 'wide: see above. Sets model=mlp. Stored runs took 30 s to 10 min.'
    assert f'\n        {says}\n' in page
    assert 'The settings of quick.' in ' '.join(page.split())


class TestOptions:
  def test_defaults(self, monkeypatch):
    monkeypatch.delenv('BILEVEL_JAX_DATA', raising=False)
    options = parse()
    assert options == harness.Options(
      paper='pbgd',
      binary='toy',
      preset='quick',
      settings=Settings(),
      workdir='runs/pbgd/toy/quick',
      data_dir=None,
      seeds=(0, 1, 2),
    )

  def test_what_quick_reads_is_a_part_of_it(self, monkeypatch):
    """Elsewhere the environment says where data lies."""
    monkeypatch.setenv('BILEVEL_JAX_DATA', '/data')
    assert parse().data_dir is None
    assert parse('--data_dir=/other').data_dir == '/other'
    assert parse('--preset=paper').data_dir == '/data'
    assert parse('--preset=paper', '--data_dir=').data_dir is None

  def test_preset_and_its_folder(self):
    options = parse('--preset=paper', '--rate=0.1')
    assert options.settings == Settings(steps=1000, rate=0.1)
    assert options.workdir == 'runs/pbgd/toy/paper'
    assert parse('--workdir=/tmp/here').workdir == '/tmp/here'

  def test_seeds_replace_the_field(self):
    options = parse('--seeds=2')
    assert (options.seeds, options.settings.seeds) == ((0, 1), 2)

  def test_how_often_to_save(self):
    assert parse().save_seconds == 10
    assert parse('--save_seconds=0').save_seconds == 0

  def test_a_training_has_the_seeds_the_folder_and_how_often_to_save(self):
    options = parse('--save_seconds=3', '--seeds=2', '--workdir=/tmp/here')
    training = harness.Training.from_options(options, steps=4, chunk=2)
    assert training == harness.Training(
      4, 2, seeds=(0, 1), workdir='/tmp/here', save_seconds=3
    )

  def test_a_preset_without_seeds_has_one(self):
    @dataclasses.dataclass(frozen=True)
    class Small:
      steps: int = 1

    assert parse(presets={'quick': Small()}).seeds == (0,)

  def test_unknown_preset_names_the_known(self):
    with pytest.raises(flags.IllegalFlagValueError, match='quick'):
      parse('--preset=huge')

  def test_several_binaries_in_one_process(self):
    assert parse('--steps=1').settings.steps == 1
    assert parse('--steps=2').settings.steps == 2


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
  """`harness.run` on the process's flags, which are put back afterwards."""
  before, handler = set(flags.FLAGS), signal.getsignal(signal.SIGTERM)

  def clean():
    for name in set(flags.FLAGS) - before:
      delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()

  # No test fills the user's folders.
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv(compile_cache.VARIABLE, compile_cache.OFF)

  def call(main, *arguments, presets=PRESETS, **more):
    clean()
    compile_cache.stop()
    monkeypatch.setattr(sys, 'argv', ['toy', *arguments])
    with pytest.raises(SystemExit) as stopped:
      about = {'paper': 'pbgd', 'binary': 'toy'}
      harness.run(harness.Study(main, presets, **about, **more))
    return stopped.value.code

  call.said = lambda: capsys.readouterr().out
  yield call
  clean()
  compile_cache.stop()
  signal.signal(signal.SIGTERM, handler)


class TestRun:
  def test_a_former_flag_is_named_with_its_current_name(self, run, capsys):
    seen, renamed = [], {'speed': 'rate', 'length': 'steps'}
    assert not run(seen.append, '--speed=0.1', renamed=renamed)
    assert seen[0].settings.rate == 0.1
    assert capsys.readouterr().err == (
      'pbgd/toy: --speed is now --rate; the former name will be removed.\n'
    )
    assert not run(seen.append, '--rate=0.1', renamed=renamed)
    assert not capsys.readouterr().err

  def test_calls_main(self, run):
    seen = []
    code = run(seen.append, '--steps=7')
    assert not code
    assert seen[0].settings.steps == 7

  def test_compiled_programs_are_kept_for_the_next_run(
    self, run, tmp_path, monkeypatch
  ):
    """By default; moved by the flag, which wins over the variable."""

    def folder(*arguments):
      seen = []
      main = lambda _: seen.append(jax.config.jax_compilation_cache_dir)
      assert not run(main, *arguments)
      return seen[0] and pathlib.Path(seen[0])

    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'user'))
    flag = f'--compile_cache={tmp_path / "flag"}'
    assert folder() is None
    assert folder(flag) == tmp_path / 'flag'
    monkeypatch.delenv(compile_cache.VARIABLE)
    assert folder() == tmp_path / 'user' / 'bilevel_jax' / 'programs'
    assert folder('--compile_cache=off') is None

  def test_user_errors_are_one_line(self, run):
    def main(options):
      raise harness.MissingDataError('no data')

    assert run(main) == 'pbgd/toy: no data'

  def test_too_large_for_the_memory(self, run):
    said = run(lambda options: np.empty(2**56))
    assert said.startswith('pbgd/toy: out of memory (Unable to all')

  def test_check_goes_before_any_work(self, run):
    def check(settings):
      raise harness.SettingsError(f'{settings.steps} is odd')

    code = run(pytest.fail, '--steps=7', check=check)
    assert code == 'pbgd/toy: 7 is odd'

  @pytest.mark.parametrize(
    ('argument', 'message'),
    [
      ('--steps=x', '--steps=x: steps takes an integer.'),
      ('--steps=0', '--steps=0: steps must be at least 1.'),
      ('--sizes=1,-3', '--sizes=-3: sizes must be at least 1.'),
      ('--step=1', "Unknown command line flag 'step'. Did you mean: steps"),
      ('--preset=huge', 'value should be one of <quick|paper>'),
      ('--seeds=0', 'Number of seeds'),
      ('--seeds=1000000000', 'Number of seeds'),
      ('steps=1', 'unknown arguments: steps=1.'),
      ('train', 'unknown arguments: train.'),
    ],
  )
  def test_wrong_usage_is_one_line(self, run, argument, message):
    said = run(pytest.fail, argument)
    assert said.startswith('pbgd/toy: ')
    assert message in said or '--seeds' in said
    assert '\n' not in said


class TestModes:
  """What a binary does beside training."""

  def called(self, run, *words):
    seen = []

    def evaluate(options):
      seen.append(('evaluate', options.preset))

    def score(options, reference, *files):
      seen.append(('score', options.preset, reference, *files))

    modes = {'evaluate': evaluate, 'score': score}
    main = lambda options: seen.append(('main', options.preset))
    code = run(main, *words, modes=modes)
    return seen[0] if seen else code

  def test_one_function_each(self, run, tmp_path):
    a, b = tmp_path / 'a', tmp_path / 'b'
    a.touch()
    called = lambda *words: self.called(run, *words)
    assert called() == called('train') == ('main', 'quick')
    assert called('evaluate', '--preset=paper') == ('evaluate', 'paper')
    assert called('score', str(a), str(a)) == ('score', 'quick', str(a), str(a))
    assert called('score', '--preset=paper', str(a)) == (
      ('score', 'paper', str(a))
    )
    for words, message in (
      (['test'], 'unknown arguments: test; the modes are train, evaluate, '),
      (['score'], 'score takes REFERENCE FILES..., got 0.'),
      (['evaluate', 'a'], 'evaluate takes no files, got 1.'),
      (['score', str(b)], f'there is no file {b}.'),
    ):
      assert called(*words).startswith(f'pbgd/toy: {message}')
