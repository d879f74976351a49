"""The example of one's own problem: it converges, and leaves its results."""

from experiments import custom_problem


def test_converges_and_writes_its_results(options, results, tmp_path, capsys):
  given = options(custom_problem.Settings(steps=500))
  trained = custom_problem.main(given)
  assert trained.history['distance'][0].min() > 0.1
  assert trained.history['distance'][-1].max() < 0.1
  assert results()['metrics']['distance'] < 0.1
  assert (tmp_path / 'distance.png').stat().st_size > 5000
  assert 'V-PBGD' in capsys.readouterr().out
  again = custom_problem.main(given)  # Resumes: there is nothing left to do.
  assert (again.step, again.seconds) == (500, trained.seconds)
