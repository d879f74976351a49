"""Claims of Shen, Yang and Chen, and the runs that judge them."""

import functools

from experiments import harness

PAPER = harness.Paper(
  'Penalty-based bilevel RL and RLHF, 2024',
  solvers=('pbrl',),
  headlines={
    'leader_return/value_penalty': 'Stackelberg: return {}, above '
    'independent gradients',
    'area/pbrl': 'RLHF: area {}, at or above DRLHF',
  },
)

# Runs of the preset `smoke` are too short for these claims.
_FULL = ('quick', 'paper')
_CONSTANT = 'area/control/constant_reward'
# Run of each environment, and the lead of the true reward over a constant one
# that an environment needs to show learning from preferences.
_ENVIRONMENTS = {
  'CartPole': ('cartpole', 5),
  'Breakout of MinAtar': ('breakout', 0.5),
}
# Runs on which a constant reward orders at most 60 % of the untied pairs.
_INFORMATIVE = {
  'Catch of bsuite': 'catch',
  'Space Invaders of MinAtar': 'space_invaders',
}
_CONTROLS = {
  'control/constant_reward': 'a constant reward of 1',
  'control/negative_reward': 'a constant reward of -1',
  'control/random_labels': 'labels by a coin',
}

# Of incentive design: the designer's reward, and its share of the payoffs.
_CONDITIONS = (('dense', 0.1), ('dense', 0.3), ('sparse', 0.3))

RUNS = {
  'stackelberg': harness.Run('stackelberg'),
  'incentive_design': harness.Run('incentive_design'),
  'four_rooms': harness.Run('four_rooms'),
  # The published number of updates; 100 minutes on a core.
  'four_rooms_long': harness.Run('four_rooms', preset='long', presets=()),
  'tax_design': harness.Run('tax_design'),
  'tax_design_penalty': harness.Run(
    'tax_design', flags=('--penalty=0.3,1000',), presets=()
  ),
  # The published number of updates.
  'tax_design_long': harness.Run('tax_design', preset='long', presets=()),
  # Ten times as many; an hour on a core.
  'tax_design_10000': harness.Run(
    'tax_design',
    preset='long',
    flags=('--steps=10000', '--chunk=500', '--seeds=5'),
    presets=(),
  ),
  'cartpole': harness.Run('rlhf'),
  'breakout': harness.Run(
    'rlhf', flags=('--env=Breakout-MinAtar', '--seeds=3'), presets=_FULL
  ),
  # The true reward is learnt in 100,000 steps of Catch.
  'catch': harness.Run(
    'rlhf',
    preset='informative',
    flags=('--env=Catch-bsuite', '--frames=300000'),
    presets=(),
  ),
  # A million steps: three hours of two cores. With the entropy weight of the
  # preset, 0.01, policies of learnt rewards become constant.
  'space_invaders': harness.Run(
    'rlhf',
    preset='informative',
    flags=('--env=SpaceInvaders-MinAtar', '--weights.tau=0.05'),
    presets=(),
  ),
}

_stackelberg = functools.partial(
  harness.Claim, run='stackelberg', published='curves'
)
_incentive = functools.partial(
  harness.Claim, run='incentive_design', presets=_FULL
)


def _preferences(sentence: str, name: str, **bound: object) -> harness.Claim:
  """A claim about learning from preferences on an environment."""
  return harness.Claim(
    f'{name} {sentence}',
    run=_ENVIRONMENTS[name][0],
    presets=_FULL,
    substituted=f'{name} in place of the Atari',
    **bound,
  )


def _informative(sentence: str, name: str, **bound: object) -> harness.Claim:
  """A claim about a game whose preferences carry the information."""
  return harness.Claim(
    f'{name} {sentence}',
    run=_INFORMATIVE[name],
    presets=_FULL,
    substituted=f'{name} in place of the Atari',
    **bound,
  )


CLAIMS = (
  *(
    _stackelberg(
      f'Stackelberg games, {title}: on 9 of 10 games the follower is at its '
      'optimum, and the leader, judged there, above independent policy '
      'gradients at the best rate of each game.',
      metric=f'wins/{method}',
      at_least=9,
      presets=_FULL,
    )
    for method, title in (
      ('value_penalty', 'value penalty'),
      ('bellman_penalty', 'Bellman penalty'),
    )
  ),
  *(
    _stackelberg(
      f'Stackelberg games, {title}: the mean return is above that of '
      'independent policy gradients.',
      metric=f'leader_return/{method}',
      at_least='leader_return/independent_best',
    )
    for method, title in (
      ('value_penalty', 'value penalty'),
      ('bellman_penalty', 'Bellman penalty'),
    )
  ),
  *(
    _incentive(
      f'Incentive design, {reward} reward, b = {bound}: the attainable bound '
      'is above incentives by hand by 5 % of their return.',
      metric=f'room/{reward}/bound={bound}',
      at_least=0.05,
    )
    for reward, bound in _CONDITIONS
  ),
  *(
    _incentive(
      f'Incentive design, {reward} reward, b = {bound}: the penalty with the '
      f'best return on the tuning games is above {title} (paired).',
      metric=f'lead_over/{rival}/{reward}/bound={bound}',
      at_least=0,
      **published,
    )
    for reward, bound in _CONDITIONS
    for rival, title, published in (
      ('by_hand', 'incentives by hand', {}),
      ('random_search', 'random search', {}),
      (
        'meta_gradient',
        'the meta-gradient of the best K',
        {'published': '2.35 against 2.2, in a run by others'},
      ),
    )
  ),
  *(
    harness.Claim(
      f'{name}: in at most {below} of {cells} cells the value penalty is below '
      'the best of HPGD, adaptive model design and zero order, by intervals.',
      run=run,
      metric='cells_below/value_penalty',
      at_most=below,
      published='none of the penalty',
      presets=_FULL,
    )
    for name, run, below, cells in (
      ('Four rooms', 'four_rooms', 4, 9),
      ('Tax design', 'tax_design', 1, 3),
    )
  ),
  *(
    harness.Claim(
      f'{name}, {rates}: in {words} {cells} cells the {title} is {word} the '
      'best of HPGD, adaptive model design and zero order, by paired '
      'intervals.',
      run=run,
      metric=f'cells_{word}{suffix}/{method}',
      **bound,
      published=published,
      presets=_FULL,
    )
    for name, run, cells, published in (
      (
        'Four rooms, 10,000 updates',
        'four_rooms_long',
        6,
        'HPGD ahead in 2 of 9',
      ),
      (
        'Tax design, 1,000 updates',
        'tax_design_long',
        3,
        'none of the penalty',
      ),
    )
    for suffix, rates in (
      ('', 'one rate for all cells'),
      ('_best_rate', 'the best rate of each cell'),
    )
    for method, title in (
      ('value_penalty', 'value penalty'),
      ('bellman_penalty', 'Bellman penalty'),
    )
    for word, words, bound in (
      ('above', 'at least 1 of', {'at_least': 1}),
      ('below', 'none of', {'at_most': 0}),
    )
  ),
  *(
    claim
    for name in _INFORMATIVE
    for claim in (
      _informative(
        'is informative: a constant reward orders at most 0.6 of the untied '
        'pairs of PBRL.',
        name,
        metric='constant_orders/pbrl',
        at_most=0.6,
      ),
      _informative(
        'has clear labels: at least 0.9 of the untied pairs of PBRL are '
        'labelled like their returns.',
        name,
        metric='right_labels/pbrl',
        at_least=0.9,
      ),
      _informative(
        'from preferences: PBRL is at or above DRLHF (areas, paired).',
        name,
        metric='area/pbrl',
        at_least='area/drlhf',
        published='curves of the Atari, above',
      ),
      _informative(
        'from preferences: PBRL returns nine tenths of what an actor-critic '
        'does on the true reward.',
        name,
        metric='true_return/pbrl',
        at_least='true_return/oracle',
        factor=0.9,
        published='curves of the Atari, near',
      ),
      _informative(
        'from preferences: DRLHF is at or above queries by disagreement '
        '(areas, paired).',
        name,
        metric='area/drlhf',
        at_least='area/ensemble',
      ),
      *(
        _informative(
          f'from preferences: {title} is above {control} (areas, paired).',
          name,
          metric=f'area/{method}',
          at_least=f'area/{rival}',
        )
        for method, title in (('pbrl', 'PBRL'), ('drlhf', 'DRLHF'))
        for rival, control in _CONTROLS.items()
      ),
    )
  ),
  *(
    _preferences(
      'can show learning from preferences: with the true reward an '
      f'actor-critic is above a constant reward by {margin:g} (areas under the '
      'curves, paired).',
      name,
      metric='area/oracle',
      at_least=_CONSTANT,
      lead=margin,
    )
    for name, (_, margin) in _ENVIRONMENTS.items()
  ),
  *(
    _preferences(
      f'from preferences: {title} is above the control of a constant reward '
      '(areas under the curves, paired).',
      name,
      metric=f'area/{method}',
      at_least=_CONSTANT,
    )
    for name in _ENVIRONMENTS
    for method, title in (('pbrl', 'PBRL'), ('drlhf', 'DRLHF'))
  ),
  *(
    _preferences(
      'from preferences: PBRL is above DRLHF, at equal labels and equal steps '
      'of all policies (areas under the curves, paired).',
      name,
      metric='area/pbrl',
      at_least='area/drlhf',
      published='curves of the Atari, above',
    )
    for name in _ENVIRONMENTS
  ),
  _preferences(
    'from preferences: PBRL returns nine tenths of what an actor-critic does '
    'on the true reward; a constant reward does too.',
    'CartPole',
    metric='true_return/pbrl',
    at_least='true_return/oracle',
    factor=0.9,
    published='curves of the Atari, near',
  ),
  _preferences(
    'from random labels: not learnt.',
    'CartPole',
    metric='true_return/control/random_labels',
    at_most=100,
  ),
)
