"""What Shen, Yang and Chen claim, and how it is judged here."""

from experiments import harness

PAPER = harness.Paper(
  'Penalty-based bilevel RL and RLHF, 2024',
  solvers=('pbrl',),
  headlines={
    'value_penalty/lead': 'Stackelberg: return above independent gradients {}',
    'pbrl/area_lead_over_drlhf': 'RLHF: area above DRLHF {}',
  },
)

_WORDS = {
  'value_penalty': 'value penalty',
  'bellman_penalty': 'Bellman penalty',
}

# A few episodes in, nothing has been learnt.
_RLHF = ('quick', 'paper')
# The run of an environment, and how far the true reward has to be above a
# constant one, so that the environment can tell what preferences teach.
_ENVIRONMENTS = {
  'CartPole': ('cartpole', 5),
  'Breakout of MinAtar': ('breakout', 0.5),
}
_LEARNERS = {'pbrl': 'PBRL', 'drlhf': 'DRLHF'}

RUNS = {
  'stackelberg': harness.Run('stackelberg'),
  'incentive_design': harness.Run('incentive_design'),
  'four_rooms': harness.Run('four_rooms'),
  'tax_design': harness.Run('tax_design'),
  'cartpole': harness.Run('rlhf'),
  'breakout': harness.Run(
    'rlhf', flags=('--env=Breakout-MinAtar', '--seeds=3'), presets=_RLHF
  ),
}

CLAIMS = (
  *(
    harness.Claim(
      f'Stackelberg games, {_WORDS[method]}: on 9 of 10 games the follower is '
      'at its optimum, and the leader, judged there, above independent policy '
      'gradients at the best rate of each game.',
      run='stackelberg',
      metric=f'{method}/wins',
      at_least=9,
      published='curves',
      presets=('quick', 'paper'),
    )
    for method in _WORDS
  ),
  *(
    harness.Claim(
      f'Stackelberg games, {_WORDS[method]}: the same, of the mean return.',
      run='stackelberg',
      metric=f'{method}/lead',
      at_least=0,
      published='curves',
    )
    for method in _WORDS
  ),
  *(
    harness.Claim(
      f'Incentive design: on 9 of 10 games above the meta-gradient of K = {k} '
      'at equal evaluations of the players, at an equilibrium.',
      run='incentive_design',
      metric=f'pbrl/wins_over_meta_gradient/k{k}',
      at_least=9,
      published='2.35 against 2.2, in a run by others',
      presets=('quick', 'paper'),
    )
    for k in (5, 20)
  ),
  *(
    harness.Claim(
      f'{name}: in {least} of {cells} cells the value penalty is not below the '
      'best of HPGD, adaptive model design and zero order, by intervals.',
      run=run,
      metric='value_penalty/cells_not_below',
      at_least=least,
      published='none of the penalty',
      presets=('quick', 'paper'),
    )
    for name, run, least, cells in (
      ('Four rooms', 'four_rooms', 5, 9),
      ('Tax design', 'tax_design', 2, 3),
    )
  ),
  harness.Claim(
    'Incentive design: PBRL above a payoff written by hand, which makes the '
    "designer's best pair of actions dominant, by the paired difference.",
    run='incentive_design',
    metric='pbrl/lead_over_control/by_hand',
    at_least=0,
    presets=('quick', 'paper'),
  ),
  harness.Claim(
    'Incentive design: the gap of the players falls to a hundredth.',
    run='incentive_design',
    metric='pbrl/gap_ratio',
    at_most=0.01,
    presets=('quick', 'paper'),
  ),
  *(
    harness.Claim(
      f'{name} can tell what preferences teach: an actor-critic is above the '
      f'control of a constant reward by {margin:g} with the true reward (areas '
      'under the curves, paired).',
      run=run,
      metric='oracle/area_lead_over_control/constant_reward',
      at_least=margin,
      presets=_RLHF,
      substituted=f'{name} in place of the Atari',
    )
    for name, (run, margin) in _ENVIRONMENTS.items()
  ),
  *(
    harness.Claim(
      f'{name} from preferences: {title} is above the control of a constant '
      'reward (areas under the curves, paired).',
      run=run,
      metric=f'{method}/area_lead_over_control/constant_reward',
      at_least=0,
      presets=_RLHF,
      substituted=f'{name} in place of the Atari',
    )
    for name, (run, _) in _ENVIRONMENTS.items()
    for method, title in _LEARNERS.items()
  ),
  *(
    harness.Claim(
      f'{name} from preferences: PBRL is above DRLHF, at equal labels and '
      'equal steps of all policies (areas under the curves, paired).',
      run=run,
      metric='pbrl/area_lead_over_drlhf',
      at_least=0,
      published='curves of the Atari, above',
      presets=_RLHF,
      substituted=f'{name} in place of the Atari',
    )
    for name, (run, _) in _ENVIRONMENTS.items()
  ),
  harness.Claim(
    'CartPole from preferences: PBRL returns nine tenths of what an '
    'actor-critic does on the true reward. So does a constant reward.',
    run='cartpole',
    metric='pbrl/true_return',
    at_least='oracle/true_return',
    factor=0.9,
    published='curves of the Atari, near',
    presets=_RLHF,
    substituted='CartPole in place of the Atari',
  ),
  harness.Claim(
    'CartPole from labels drawn by a coin: not learnt.',
    run='cartpole',
    metric='control/random_labels/true_return',
    at_most=100,
    presets=_RLHF,
    substituted='CartPole in place of the Atari',
  ),
)
