"""What Fernando et al. claim of MoCo, and how it is judged here."""

from experiments import harness

_MOST = {1: 7, 3: 5}  # Seeds of 10, by start.

_REACHED = tuple(
  harness.Claim(
    f'Toy, learning rate 1e-3, start {start}: MoCo with exact weights and a '
    'tracking share tuned on this problem reaches the Pareto front from '
    f'{"most" if start == 1 else "half"} of 10 seeds.',
    binary='toy',
    metric=f'moco_exact/lr1e-3/front_from_start{start}',
    at_least=seeds,
    published='most',
  )
  for start, seeds in _MOST.items()
)
_PUBLISHED_SHARE = tuple(
  harness.Claim(
    f'Toy, learning rate 1e-3, start {start}: the same with the published '
    'share.',
    binary='toy',
    metric=f'moco_exact_published/lr1e-3/front_from_start{start}',
    at_least=seeds,
    published='most',
    presets=('quick', 'paper'),
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
    ('cagrad', 'CAGrad, its radius tuned,'),
  )
  for start in _MOST
)

CLAIMS = (
  *_REACHED,
  *_PUBLISHED_SHARE,
  *_STUCK,
  harness.Claim(
    'Multi-MNIST: tracked gradients leave less bias than the stochastic '
    "multi-gradient, with weights that follow as fast as that one's (its bias "
    'over that of MoCo with exact weights, same batch size).',
    binary='multi_mnist',
    metric='moco_exact/multi_mnist/bias_ratio',
    at_least=1.0,
    published='less, a theorem',
  ),
  harness.Claim(
    'Multi-MNIST: MoCo is as good as the mean of the losses, up to one percent '
    'of the single-task accuracy.',
    binary='multi_mnist',
    metric='moco/multi_mnist/dm',
    at_most='mean/multi_mnist/dm',
    lead=-1.0,
    presets=('quick', 'paper'),
  ),
  harness.Claim(
    'Tables: the same of tracked gradients and exact weights, on each of them.',
    binary='tabular',
    metric='moco_exact/bias_ratio',
    at_least=1.0,
    published='less, a theorem',
  ),
)
