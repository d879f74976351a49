"""Claims of Shen and Chen, 2023, with their bounds."""

from typing import Any

from experiments import harness

PAPER = harness.Paper(
  'Penalty-based bilevel gradient descent, 2023',
  solvers=('v_pbgd', 'g_pbgd'),
  headlines={
    'gap_exponent/known_value': 'gap falls by the power {} of the penalty',
    'f1/v_pbgd/linear': 'cleaning: F1 {}, above RHG',
  },
)

_AGREEMENT = 'agreement with a classifier trained on the clean digits'
_RIVALS = {'rhg': 'RHG', 't_rhg': 'T-RHG', 'bome': 'BOME'}


def _ahead(
  run: str, place: str, words: str, metric: str, rivals: dict, **more: Any
) -> tuple[harness.Claim, ...]:
  """V-PBGD ahead of each rival at a place of a run, by the rival's metric."""
  return tuple(
    harness.Claim(
      f'Hyper-cleaning{words} {name}.',
      run=run,
      metric=f'{metric}/v_pbgd/{place}',
      at_least=f'{rival}/{place}',
      **more,
    )
    for rival, name in rivals.items()
  )


def _ahead_of_methods(words: str, metric: str, published: str) -> tuple:
  """V-PBGD ahead of each method of the published table."""
  rivals = {f'{metric}/{method}': name for method, name in _RIVALS.items()}
  return _ahead(
    'hyper_cleaning',
    'linear',
    f', linear model: {words}',
    metric,
    rivals,
    published=published,
    presets=('quick', 'paper'),
  )


RUNS = {
  'toy': harness.Run('toy'),
  'hyper_cleaning': harness.Run('hyper_cleaning'),
  'fashion': harness.Run(
    'hyper_cleaning',
    preset='table',
    flags=(
      '--methods=v_pbgd,val_only,noisy_train,clean_part',
      '--steps=1000',
      '--seeds=3',
    ),
    data='fashion',
    presets=(),
  ),
  'mlp': harness.Run(
    'hyper_cleaning',
    preset='table',
    flags=(
      '--model=mlp',
      '--methods=v_pbgd,noisy_train,clean_part',
      '--steps=1000',
      '--chunk=25',
      '--grid.steps=100',
      '--scales=30,100,300',
      '--seeds=2',
    ),
    data='mnist',
    presets=(),
  ),
  'network': harness.Run('network', presets=('smoke', 'quick')),
  'pollution': harness.Run('pollution', flags=('--seeds=10',)),
  'clean': harness.Run(
    'pollution', preset='clean', data='mnist', presets=('paper',)
  ),
}

CLAIMS = (
  harness.Claim(
    'Toy: from random starts, penalised descent ends at a local minimum of '
    'the nested problem (penalty 10, within 0.05).',
    run='toy',
    metric='fraction_at_minima/known_value/penalty=10',
    at_least=0.99,
    published='all',
  ),
  harness.Claim(
    'Toy: the lower gap falls with the square of the penalty.',
    run='toy',
    metric='gap_exponent/known_value',
    at_least=-2.3,
    at_most=-1.8,
    published='-2',
  ),
  harness.Claim(
    'Toy: the number of steps grows in proportion to the penalty.',
    run='toy',
    metric='steps_exponent/known_value',
    at_least=0.8,
    at_most=1.2,
    published='1',
  ),
  *_ahead_of_methods(
    'V-PBGD separates clean from polluted digits better (F1) than',
    'f1',
    '0.9199 against 0.8904 to 0.8983',
  ),
  *_ahead_of_methods(
    "V-PBGD's classifier is more accurate than that of",
    'test_accuracy',
    '0.9048 against 0.8709 to 0.8764',
  ),
  *_ahead_of_methods(
    'a model retrained on the digits that V-PBGD keeps is more accurate than '
    'on those of',
    'retrained_accuracy',
    '-',
  ),
  harness.Claim(
    'Hyper-cleaning: a model retrained on the digits that V-PBGD keeps beats '
    'one trained on all digits.',
    run='hyper_cleaning',
    metric='retrained_accuracy/v_pbgd/linear',
    at_least='test_accuracy/noisy_train/linear',
  ),
  harness.Claim(
    'Hyper-cleaning: its accuracy is at most 0.01 below that of a model '
    'trained on the truly clean digits.',
    run='hyper_cleaning',
    metric='retrained_accuracy/v_pbgd/linear',
    at_least='test_accuracy/clean_part/linear',
    lead=-0.01,
  ),
  harness.Claim(
    'Hyper-cleaning: untuned, with the settings of `bj.suggest`, V-PBGD '
    'reaches 98 % of its tuned F1.',
    run='hyper_cleaning',
    metric='f1/suggested/linear',
    at_least='f1/v_pbgd/linear',
    factor=0.98,
    presets=('quick', 'paper'),
  ),
  *_ahead(
    'hyper_cleaning',
    'linear',
    ', linear model: V-PBGD separates the digits better (F1) than',
    'f1',
    {'f1/agreement': _AGREEMENT},
    presets=('quick', 'paper'),
  ),
  *_ahead(
    'hyper_cleaning',
    'linear',
    ', linear model: a model retrained on the digits that V-PBGD keeps beats',
    'retrained_accuracy',
    {
      'retrained_accuracy/agreement': f'one on those of {_AGREEMENT}',
      'test_accuracy/both': 'one trained on clean and polluted digits together',
    },
    presets=('quick', 'paper'),
  ),
  *(
    claim
    for share in (0.2, 0.4, 0.6, 0.8, 0.9)
    for claim in (
      *_ahead(
        'pollution',
        f'polluted={share}',
        f', {share:.0%} redrawn labels: V-PBGD separates the digits better '
        '(F1) than',
        'f1',
        {'f1/rhg': 'RHG', 'f1/agreement': _AGREEMENT},
        presets=('quick',),
      ),
      *_ahead(
        'pollution',
        f'polluted={share}',
        f', {share:.0%} redrawn labels: a model retrained on the kept digits '
        'beats',
        'retrained_accuracy',
        {
          'test_accuracy/val_only': 'one trained on the clean digits of the '
          'upper loss',
          'retrained_accuracy/agreement': f'one on those of {_AGREEMENT}',
          'test_accuracy/both': 'one trained on clean and polluted digits',
        },
        presets=('quick',),
      ),
    )
  ),
  *(
    claim
    for clean in (100, 300, 1_000, 5_000)
    for claim in (
      *_ahead(
        'clean',
        f'clean={clean}',
        f' of 5,000 digits by {clean:,} clean ones: V-PBGD separates the '
        'digits better (F1) than',
        'f1',
        {'f1/agreement': _AGREEMENT},
        presets=('paper',),
      ),
      *_ahead(
        'clean',
        f'clean={clean}',
        f' of 5,000 digits by {clean:,} clean ones: a model retrained on the '
        'digits that V-PBGD keeps beats',
        'retrained_accuracy',
        {
          'retrained_accuracy/rhg': 'one on those of RHG',
          'retrained_accuracy/agreement': f'one on those of {_AGREEMENT}',
          'test_accuracy/val_only': 'one trained on the clean digits alone',
          'test_accuracy/noisy_train': 'one trained on all polluted digits',
          'test_accuracy/both': 'one trained on clean and polluted digits',
        },
        presets=('paper',),
      ),
    )
  ),
)
