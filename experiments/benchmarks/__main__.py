"""The same as `python -m experiments.benchmarks.suite`."""

from experiments import harness
from experiments.benchmarks import suite

if __name__ == '__main__':
  harness.run(suite.STUDY)
