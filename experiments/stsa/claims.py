"""What Shen and Chen claim, and what is claimed of the bilevel family."""

from experiments import harness

_MONOTONE = tuple(
  harness.Claim(
    f'Strongly monotone, N = {n}: the summed squared error falls as 1 / k.',
    binary='rates',
    metric=f'slope/strongly_monotone/n{n}',
    at_least=-1.1,
    at_most=-0.9,
    published='-1',
    presets=('smoke', 'quick', 'paper') if n in (1, 3) else ('quick', 'paper'),
  )
  for n in (1, 2, 3, 5)
)
_NONMONOTONE = tuple(
  harness.Claim(
    f'Non-monotone main sequence, N = {n}: the mean squared gradient norm '
    'falls as 1 / sqrt(K).',
    binary='rates',
    metric=f'slope/nonmonotone/n{n}',
    at_least=-0.56,
    at_most=-0.44,
    published='-0.5',
    presets=('smoke', 'quick', 'paper') if n == 1 else ('quick', 'paper'),
  )
  for n in (1, 3, 5)
)

CLAIMS = (
  *_MONOTONE,
  harness.Claim(
    'The rate does not depend on the number of sequences.',
    binary='rates',
    metric='slope/strongly_monotone/spread',
    at_most=0.1,
    published='0',
  ),
  harness.Claim(
    'Two timescales are slower: steps k^-2/3 of the inner sequences.',
    binary='rates',
    metric='slope/two_timescale',
    at_least=-0.75,
    at_most=-0.62,
    published='-2/3',
  ),
  harness.Claim(
    "TTSA's steps are slower: k^-3/5 and k^-2/5, the main sequence.",
    binary='rates',
    metric='slope/ttsa_main',
    at_least=-0.7,
    at_most=-0.52,
    published='-3/5',
  ),
  *_NONMONOTONE,
  harness.Claim(
    'Three-level risk-averse composition, near its solution: the squared error '
    'falls as 1 / k (SCSC).',
    binary='rates',
    metric='slope/risk_averse',
    at_least=-1.1,
    at_most=-0.9,
    published='-1',
    presets=('quick', 'paper'),
  ),
  harness.Claim(
    'Tabular actor-critic, both steps of one order: the mean squared gradient '
    'norm falls as 1 / sqrt(K).',
    binary='rates',
    metric='slope/actor_critic',
    at_least=-0.56,
    at_most=-0.44,
    published='-0.5',
    presets=('quick', 'paper'),
  ),
  harness.Claim(
    'Control: with too small a constant c the rate 1 / k is not reached.',
    binary='rates',
    metric='control/small_c',
    at_least=-0.75,
  ),
  harness.Claim(
    'Control: with one step for all lengths there is a floor.',
    binary='rates',
    metric='control/fixed_step',
    at_least=-0.44,
  ),
  harness.Claim(
    'Bilevel quadratics: a memory of batches takes all noise away (SABA).',
    binary='bilevel_zoo',
    metric='saba/final',
    at_most=1e-8,
  ),
  harness.Claim(
    'Bilevel quadratics: SOBA ends below half of what dropping the implicit '
    'term reaches.',
    binary='bilevel_zoo',
    metric='soba/of_control',
    at_most=0.5,
  ),
  harness.Claim(
    'Bilevel quadratics: SABA ends below SOBA.',
    binary='bilevel_zoo',
    metric='saba/below_soba',
    at_least=1e4,
  ),
  harness.Claim(
    'Bilevel quadratics: every method reduces the squared hypergradient norm.',
    binary='bilevel_zoo',
    metric='worst/reduction',
    at_least=500,
  ),
  harness.Claim(
    'Bilevel quadratics: every method ends below half of what dropping the '
    'implicit term reaches.',
    binary='bilevel_zoo',
    metric='worst/of_control',
    at_most=0.5,
  ),
  harness.Claim(
    'Bilevel quadratics: the correction of SUSTAIN pays, at equal steps.',
    binary='bilevel_zoo',
    metric='sustain/correction_gain',
    at_least=1.2,
    presets=('quick', 'paper'),
  ),
)
