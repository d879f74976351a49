"""Claims of Shen and Chen, 2022, and of the bilevel methods, with bounds."""

from experiments import harness

PAPER = harness.Paper(
  'Multiple coupled sequences, single-timescale, 2022',
  solvers=('stsa', 'soba', 'saba'),
  headlines={
    'slope/strongly_monotone/inner=3': 'error falls by the power {} '
    '(theory: -1)',
    'of_control/soba': "SOBA: {} of a direct gradient's error",
  },
)

_ALL, _LONG = ('smoke', 'quick', 'paper'), ('quick', 'paper')


def _rate(
  words: str, case: str, low: float, high: float, published: str, presets: tuple
) -> harness.Claim:
  """A claim on a slope between two bounds."""
  return harness.Claim(
    words,
    run='rates',
    metric=f'slope/{case}',
    at_least=low,
    at_most=high,
    published=published,
    presets=presets,
  )


_RATES = (
  *(
    _rate(
      f'Strongly monotone, N = {n}: the summed squared error falls as 1 / k.',
      *(f'strongly_monotone/inner={n}', -1.1, -0.9, '-1'),
      presets=_ALL if n in (1, 3) else _LONG,
    )
    for n in (1, 2, 3, 5)
  ),
  harness.Claim(
    'The rate does not depend on the number of sequences.',
    run='rates',
    metric='slope_spread/strongly_monotone',
    at_most=0.1,
    published='0',
  ),
  _rate(
    'Two timescales, inner steps k^-2/3: the summed error falls more slowly.',
    *('two_timescale/sum', -0.75, -0.62, '-2/3', _ALL),
  ),
  _rate(
    'TTSA, steps k^-3/5 and k^-2/5: the main error falls more slowly.',
    *('ttsa/main', -0.7, -0.52, '-3/5', _ALL),
  ),
  *(
    _rate(
      f'Non-monotone main sequence, N = {n}: the mean squared gradient norm '
      'falls as 1 / sqrt(K).',
      *(f'nonmonotone/inner={n}', -0.56, -0.44, '-0.5'),
      presets=_ALL if n == 1 else _LONG,
    )
    for n in (1, 3, 5)
  ),
  _rate(
    'Three-level risk-averse composition, near its solution: the squared error '
    'falls as 1 / k (SCSC).',
    *('risk_averse', -1.1, -0.9, '-1', _LONG),
  ),
  _rate(
    'Tabular actor-critic, both steps of one order: the mean squared gradient '
    'norm falls as 1 / sqrt(K).',
    *('actor_critic', -0.56, -0.44, '-0.5', _LONG),
  ),
)

_IMPLICIT = 'bsa,ttsa,stocbio,alset,amigo,sustain,mrbo,vrbo,pzobo,f2sa,meha'
RUNS = {
  'rates': harness.Run('rates'),
  'zoo': harness.Run('bilevel_zoo'),
  'zoo_regularisation': harness.Run(
    'bilevel_zoo',
    flags=(
      '--problem=regularisation',
      f'--methods=control/direct,soba,ma_soba,saba,{_IMPLICIT}',
      '--records=20',
    ),
    data='tabular',
    presets=(),
  ),
  'zoo_cleaning': harness.Run(
    'bilevel_zoo',
    flags=(
      '--problem=cleaning',
      f'--methods=control/direct,soba,ma_soba,{_IMPLICIT}',
      '--digits.corruptions=0.5,0.7',
    ),
    data='mnist',
    presets=(),
  ),
}

CLAIMS = (
  *_RATES,
  harness.Claim(
    'Control: with too small a constant c, the error falls more slowly.',
    run='rates',
    metric='slope/control/small_c',
    at_least=-0.75,
  ),
  harness.Claim(
    'Control: with the same step for all lengths, the error has a floor.',
    run='rates',
    metric='slope/control/fixed_step',
    at_least=-0.44,
  ),
  *(
    harness.Claim(f'Bilevel quadratics: {words}.', run='zoo', **number)
    for words, number in (
      (
        'SABA, with a memory of batches, converges to rounding',
        {'metric': 'final/saba', 'at_most': 1e-8},
      ),
      (
        'SOBA ends below half of the control without the implicit term',
        {'metric': 'of_control/soba', 'at_most': 0.5},
      ),
      ('SABA ends below SOBA', {'metric': 'soba_over_saba', 'at_least': 1e4}),
      (
        'every method reduces the squared hypergradient norm',
        {'metric': 'worst_reduction', 'at_least': 500},
      ),
      (
        'every method ends below half of the control without the implicit term',
        {'metric': 'worst_of_control', 'at_most': 0.5},
      ),
      (
        'the correction of SUSTAIN lowers its error at equal steps',
        {'metric': 'correction_gain', 'at_least': 1.2, 'presets': _LONG},
      ),
    )
  ),
)
