"""Tests of results.json, tables and intervals."""

import dataclasses
import json
import math
import re
import types

import jax
import numpy as np
import pytest

from experiments import harness


@dataclasses.dataclass(frozen=True)
class Settings:
  steps: int = 10
  sizes: tuple[int, ...] = (1, 2)


class TestInterval:
  def test_against_a_table_of_student(self):
    """Four values: the quantile of t with 3 degrees of freedom is 3.1824."""
    interval = harness.mean_interval([1.0, 2.0, 3.0, 6.0])
    spread = math.sqrt((4 + 1 + 0 + 9) / 3)
    assert interval.mean == 3.0
    np.testing.assert_allclose(interval.half_width, 3.1824 * spread / 2, 1e-4)
    assert interval[2:5] == (4, 4, (1.0, 2.0, 3.0, 6.0))

  def test_leaving_out_one_of_a_mean_is_its_t_interval(self):
    values = np.random.default_rng(3).gamma(2, size=7)
    mean = harness.mean_interval(values)
    left_out = harness.jackknife_interval(lambda i: values[i].mean(), 7)
    np.testing.assert_allclose(left_out[:2], mean[:2], rtol=1e-12)
    assert math.isnan(harness.jackknife_interval(lambda i: 2.0, 1).half_width)

  def test_leaving_out_one_of_a_ratio_covers_it_in_95_of_100_cases(self):
    draws = np.random.default_rng(4).gamma(20, 1 / 20, (1_000, 2, 12))
    covered = 0
    for above, below in 3 * draws:
      found = harness.jackknife_interval(
        lambda i, a=above, b=below: a[i].mean() / b[i].mean(), 12
      )
      covered += abs(found.mean - 1) <= found.half_width
    # Four standard deviations of a count are 0.028 of them.
    assert abs(covered / len(draws) - 0.95) < 0.028

  def test_a_mean_keeps_its_values_and_is_a_number(self):
    metrics = harness.mean_interval([1.0, 3.0]).metrics('a')
    assert metrics['a'] == 2.0 and metrics['a'].per_seed == (1.0, 3.0)
    assert json.dumps(metrics['a']) == '2.0'
    assert not hasattr(metrics['a'] - 1, 'per_seed')

  def test_covers_the_mean_in_95_of_100_cases(self):
    rng = np.random.default_rng(0)
    intervals = [harness.mean_interval(rng.normal(size=5)) for _ in range(2000)]
    covered = np.mean([abs(x.mean) <= x.half_width for x in intervals])
    assert abs(covered - 0.95) < 0.015

  def test_stopped_seeds_are_left_out_and_counted(self):
    interval = harness.mean_interval([1.0, np.nan, 3.0])
    assert interval.mean == 2.0
    assert str(interval).endswith('(2 of 3)')

  @pytest.mark.parametrize('values', [[], [np.nan], [1.0]])
  def test_too_few_values_have_no_interval(self, values):
    assert math.isnan(harness.mean_interval(values).half_width)

  @pytest.mark.parametrize(
    ('mean', 'half_width', 'text'),
    [
      (0.123456, 0.0123, '0.123 ± 0.012'),
      (1234.5, 56.7, '1234 ± 57'),
      (0.5, 0.0, '0.5'),
      (2.346e-12, 4.3e-13, '2.35e-12 ± 4e-13'),
      (math.nan, math.nan, '-'),
    ],
  )
  def test_text(self, mean, half_width, text):
    assert str(harness.Interval(mean, half_width, 3, 3)) == text


class TestReduced:
  VALUES = (3.0, 1.0, 2.0)

  @pytest.mark.parametrize(
    ('how', 'result'),
    [
      ('min', 1),
      ('max', 3),
      ('mean', 2),
      ('median', 2),
      ('sum', 6),
      ('ptp', 2),
    ],
  )
  def test_nothing_is_dropped_wherever_it_stands(self, how, result):
    assert harness.reduced(self.VALUES, how) == result
    for bad in (math.nan, None):
      for place in range(4):
        values = [*self.VALUES[:place], bad, *self.VALUES[place:]]
        assert math.isnan(harness.reduced(values, how))
    assert math.isnan(harness.reduced([], how))

  def test_infinity_is_a_number(self):
    """The rounds of a seed that did not get there."""
    rounds = [2.0, math.inf, 1.0]
    assert harness.reduced(rounds, 'median') == 2.0
    assert harness.reduced(rounds, 'max') == math.inf


class TestResults:
  def options(self, folder):
    return harness.Options(
      'pbgd', 'toy', 'quick', Settings(), str(folder), None, (0, 1)
    )

  def test_content(self, tmp_path):
    path = harness.write_results(
      self.options(tmp_path / 'new'),
      metrics={'b': np.float32(0.5), 'a': math.nan, 'c': jax.numpy.array(2)},
      seconds=1.23456,
      cpu_seconds=np.float64(2.0),
      curves={'one': np.arange(64.0).reshape(32, 2), 'two': [1.0, math.nan]},
    )
    text = path.read_text()
    assert 'NaN' not in text
    results = json.loads(text)
    assert list(results['metrics'].items()) == [
      ('a', None),
      ('b', 0.5),
      ('c', 2),
    ]
    assert results['settings'] == {'steps': 10, 'sizes': [1, 2]}
    assert results['paper'] == 'pbgd'
    assert results['binary'] == 'toy'
    assert results['preset'] == 'quick'
    assert results['seeds'] == [0, 1]
    assert results['wall_seconds'] == 1.235
    assert results['cpu_seconds'] == 2.0
    assert results['hardware']['cores'] >= 1
    assert re.fullmatch(r'\d{4}-\d\d-\d\d', results['date'])
    assert results['data_dir'] is None
    one, two = results['curves']['one'], results['curves']['two']
    assert (len(one), one[0], one[-1]) == (16, 0.5, 62.5)
    assert two == [1.0, None]
    assert results['versions']['jax'] == jax.__version__
    for package in (
      'python',
      'jaxlib',
      'numpy',
      'optax',
      'flax',
      'bilevel_jax',
    ):
      assert re.match(r'\d+\.\d+', results['versions'][package])
    assert [p.name for p in path.parent.iterdir()] == ['results.json']

  def test_seconds_of_compiling_and_of_all_else(self, tmp_path):
    write = lambda: json.loads(
      harness.write_results(
        self.options(tmp_path), metrics={}, seconds=1.0
      ).read_text()
    )
    before = write()
    jax.jit(lambda x: jax.numpy.sin(x) * 0.123)(np.ones(17))
    compiled = write()
    after = write()
    assert compiled['compile_seconds'] > before['compile_seconds']
    assert after['compile_seconds'] == compiled['compile_seconds']
    assert after['run_seconds'] >= compiled['run_seconds'] > 0

  def test_a_failed_write_leaves_the_old_file(self, tmp_path, monkeypatch):
    options = self.options(tmp_path)
    path = harness.write_results(options, metrics={'a': 1.0}, seconds=1.0)

    def full(*_):
      raise OSError(28, 'No space left on device')

    monkeypatch.setattr('os.replace', full)
    with pytest.raises(harness.WriteError, match='No space left'):
      harness.write_results(options, metrics={'a': 2.0}, seconds=1.0)
    assert json.loads(path.read_text())['metrics'] == {'a': 1.0}

  def test_metrics_are_numbers(self, tmp_path):
    with pytest.raises((TypeError, ValueError)):
      harness.write_results(
        self.options(tmp_path), metrics={'a': 'good'}, seconds=1.0
      )


class TestTable:
  def test_lines_up_as_text_and_is_markdown(self):
    table = harness.format_table(
      [
        {'method': 'V-PBGD', 'steps': 1000, 'error': 0.123456},
        {'method': 'A', 'error': harness.Interval(0.5, 0.01, 3, 3)},
        {'method': 'B', 'steps': None, 'error': math.nan},
      ]
    )
    assert table == (
      '| method | steps |         error |\n'
      '| ------ | ----: | ------------: |\n'
      '| V-PBGD |  1000 |        0.1235 |\n'
      '| A      |       | 0.500 ± 0.010 |\n'
      '| B      |     - |             - |\n'
    )

  def test_columns_choose_and_order(self):
    rows = [{'a': 1, 'b': 'x'}]
    assert harness.format_table(rows, ['b']).splitlines()[0] == '| b   |'

  def test_columns_of_later_rows_are_shown_too(self):
    table = harness.format_table([{'a': 1, 'b': 2}, {'a': 3, 'c': 4}])
    assert [line.split() for line in table.splitlines()] == [
      ['|', 'a', '|', 'b', '|', 'c', '|'],
      ['|', '--:', '|', '--:', '|', '--:', '|'],
      ['|', '1', '|', '2', '|', '|'],
      ['|', '3', '|', '|', '4', '|'],
    ]

  def test_without_rows(self):
    assert harness.format_table([], ['a']) == '|   a |\n| --: |\n'

  def test_is_printed_and_written(self, tmp_path, capsys):
    table = harness.write_table(tmp_path, [{'a': 1}])
    assert capsys.readouterr().out == table
    assert (tmp_path / 'table.md').read_text() == table


def test_a_metric_that_no_run_has_names_the_nearest():
  history = {'accuracy': np.ones((2, 1)), 'loss/upper': np.ones((2, 1))}
  run = types.SimpleNamespace(steps=np.arange(2), history=history)
  for metric, near in (
    ('acuracy', 'the nearest are accuracy.'),
    ('zzz', 'it has accuracy, loss/upper.'),
  ):
    with pytest.raises(harness.SettingsError) as error:
      harness.Report.from_runs({'soba': run}, metric)
    assert str(error.value) == (
      f'from_runs: the run soba has no metric {metric!r}; {near}'
    )


def test_a_missing_number_of_one_seed_has_no_count():
  assert str(harness.mean_interval([np.nan])) == '-'
  assert str(harness.mean_interval([np.nan, np.nan])) == '- (0 of 2)'
