"""Claims of Fernando et al., 2023, with their bounds."""

from typing import Any

from experiments import harness

PAPER = harness.Paper(
  'Mitigating gradient bias in multi-objective learning, 2023',
  solvers=('moco',),
  headlines={
    'seeds_on_front/moco_exact/learning_rate=0.001/start=1': 'toy: {} of 10 '
    'seeds reach the front',
    'bias_ratio/moco_exact/multi_mnist': 'Multi-MNIST: bias of SMG '
    'over that of MoCo {}',
  },
)

_MIN_SEEDS = {1: 7, 3: 5}  # Of 10, by start.


def _front(words: str, method: str, start: int, **more: Any) -> harness.Claim:
  """A claim on the seeds of a method that reach the front from a start."""
  return harness.Claim(
    f'Toy, learning rate 1e-3, start {start}: {words}.',
    run='toy',
    metric=f'seeds_on_front/{method}/learning_rate=0.001/start={start}',
    **more,
  )


_REACHED = tuple(
  _front(
    'MoCo with exact weights and a tracking share tuned on this problem '
    f'reaches the Pareto front from {"most" if start == 1 else "half"} of 10 '
    'seeds',
    *('moco_exact', start),
    at_least=seeds,
    published='most',
  )
  for start, seeds in _MIN_SEEDS.items()
)
_PUBLISHED_SHARE = tuple(
  _front(
    'so does MoCo with the published tracking share',
    *('moco_exact_published', start),
    at_least=seeds,
    published='most',
    presets=('quick', 'paper'),
  )
  for start, seeds in _MIN_SEEDS.items()
)
_STUCK = tuple(
  _front(f'{name} does not reach it', method, start, at_most=1, published='0')
  for method, name in (
    ('smg', 'the stochastic multi-gradient'),
    ('pcgrad', 'PCGrad'),
    ('cagrad', 'CAGrad, its radius tuned,'),
  )
  for start in _MIN_SEEDS
)

_FEW = ('--methods=mean,moco,moco_plus', '--steps=400', '--seeds=3')
_MANY_SEEDS = (
  '--methods=moco_exact_published,moco_exact',
  '--learning_rates=0.001',
  '--seeds=200',
)

_LEADS = tuple(
  harness.Claim(
    f'By batch size: the lead of {title} over methods without memory (dm %) is '
    'larger in the smallest batches than in the largest (mean over data sets).',
    run='small_batches',
    metric=f'lead_growth/{name}',
    at_least=0.0,
    presets=('quick', 'paper'),
  )
  for name, title in (
    ('moco_exact', 'MoCo with exact weights'),
    ('moco', 'MoCo'),
  )
)

RUNS = {
  'toy': harness.Run('toy'),
  # How many seeds reach the front with the published share, at the published
  # number of steps and at twice that.
  'toy_seeds': harness.Run('toy', flags=_MANY_SEEDS, presets=()),
  'toy_long': harness.Run(
    'toy', flags=(*_MANY_SEEDS, '--steps=140000'), presets=()
  ),
  'multi_mnist': harness.Run('multi_mnist'),
  'multi_fashion': harness.Run(
    'multi_mnist',
    flags=(
      *_FEW,
      *('--grid.rates=0.003,0.005,0.01', '--grid.extra_learning_rates=0.01'),
      '--bias_batches=',
    ),
    data='fashion',
    presets=(),
  ),
  'multi_mnist_reduced': harness.Run(
    'multi_mnist',
    preset='paper',
    flags=(
      *_FEW,
      *('--chunk=100', '--batch=128', '--hidden=128', '--pool=2'),
      *('--grid.rates=0.001,0.003,0.01', '--grid.extra_learning_rates=0.01'),
      *('--evaluated=5000', '--bias_batches='),
    ),
    data='mnist',
    presets=(),
  ),
  'tabular': harness.Run('tabular'),
  **{
    name: harness.Run(
      'tabular',
      flags=(f'--datasets={name}', *more),
      data='multitask',
      presets=(),
    )
    for name, more in (
      ('school', ('--steps=200',)),
      ('sarcos', ()),
      ('adult', ()),
    )
  },
  'small_batches': harness.Run('small_batches'),
  'multi_task_rl': harness.Run('multi_task_rl', presets=('smoke', 'quick')),
}

CLAIMS = (
  *_REACHED,
  *_PUBLISHED_SHARE,
  *_STUCK,
  harness.Claim(
    'Multi-MNIST: MoCo with exact weights has less bias than the stochastic '
    'multi-gradient (SMG over MoCo, same batch size).',
    run='multi_mnist',
    metric='bias_ratio/moco_exact/multi_mnist',
    at_least=1.0,
    published='less, a theorem',
  ),
  harness.Claim(
    'Multi-MNIST: the relative loss dm of MoCo is at most 1 % above that of '
    'the mean of the losses.',
    run='multi_mnist',
    metric='dm/moco/multi_mnist',
    at_most='dm/mean/multi_mnist',
    lead=-1.0,
    presets=('quick', 'paper'),
  ),
  harness.Claim(
    'Tabular data: MoCo with exact weights has less bias on each data set.',
    run='tabular',
    metric='least_bias_ratio/moco_exact',
    at_least=1.0,
    published='less, a theorem',
  ),
  harness.Claim(
    'By batch size: the relative bias of the stochastic multi-gradient is '
    'larger in the smallest batches than in the largest (mean over data sets).',
    run='small_batches',
    metric='bias_growth/smg',
    at_least=0.0,
    published='larger, a theorem',
    presets=('quick', 'paper'),
  ),
  *_LEADS,
)
