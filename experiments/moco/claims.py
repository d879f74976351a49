"""What Fernando et al. claim of MoCo, and how it is judged here."""

from experiments import harness

_MOST = {1: 7, 3: 5}  # Seeds of 10, by start.

_REACHED = tuple(
  harness.Claim(
    f'Toy, learning rate 1e-3, start {start}: MoCo with exact weights reaches '
    f'the Pareto front from {"most" if start == 1 else "half"} of 10 seeds.',
    binary='toy',
    metric=f'moco_exact/lr1e-3/front_from_start{start}',
    at_least=seeds,
    published='most',
  )
  for start, seeds in _MOST.items()
)
_STUCK = tuple(
  harness.Claim(
    f'Toy, learning rate 1e-3, start {start}: {name} does not.',
    binary='toy',
    metric=f'{method}/lr1e-3/front_from_start{start}',
    at_most=1,
    published='0',
  )
  for method, name in (
    ('smg', 'the stochastic multi-gradient'),
    ('pcgrad', 'PCGrad'),
    ('cagrad', 'CAGrad'),
  )
  for start in _MOST
)

CLAIMS = (
  *_REACHED,
  *_STUCK,
  harness.Claim(
    'Multi-MNIST: tracking takes at least half of the bias away (the bias of '
    'the stochastic multi-gradient over that of MoCo, same batch size).',
    binary='multi_mnist',
    metric='multi_mnist/bias_ratio',
    at_least=2.0,
  ),
  harness.Claim(
    'Multi-MNIST: MoCo is as good as the mean of the losses, up to one percent '
    'of the single-task accuracy.',
    binary='multi_mnist',
    metric='moco/multi_mnist/dm',
    at_most='mean/multi_mnist/dm',
    margin=1.0,
    presets=('quick', 'paper'),
  ),
  harness.Claim(
    'Tables: tracking takes at least half of the bias away, on each of them.',
    binary='tabular',
    metric='bias_ratio',
    at_least=2.0,
  ),
)
