"""Claims of Xiao, Shen, Yin and Chen, 2023, with their bounds."""

from experiments import harness

PAPER = harness.Paper(
  'Alternating projected SGD, equality constraints, 2023',
  solvers=('aipod', 'e_aipod'),
  headlines={
    'projections_ratio/e_aipod/p0.3/t2': "{} of AiPOD's projections",
    'rounds_to_87_ratio': "federated: {} of FedNest's rounds",
  },
)

_LAZY = 'e_aipod/p0.3'


RUNS = {
  'synthetic': harness.Run('synthetic'),
  'federated': harness.Run('federated'),
  'regimes': harness.Run('regimes'),
  'loss_tuning': harness.Run('federated', preset='loss_tuning', presets=()),
  'fashion': harness.Run(
    'federated',
    preset='reduced',
    flags=(
      *('--taking_part=0', '--lower_steps=20,60', '--goal=75'),
      *('--grid.lower_rates=0.02,0.05', '--fednest.rounds=1'),
    ),
    data='fashion',
    presets=(),
  ),
}

_FEDERATED = tuple(
  harness.Claim(
    f'Federated hyper-representation, {data}: E-AiPOD reaches {goal} % in '
    f'fewer communication rounds than the best FedNest, {steps}.',
    run='federated',
    metric=f'rounds_to_{goal}_ratio{end}',
    at_most=at_most,
    presets=(preset,),
    published=published,
  )
  for goal, data, at_most, preset, published in (
    (90, 'MNIST', 0.9, 'paper', 'a curve'),
    (87, 'packaged digits', 0.8, 'quick', '-'),
  )
  for end, steps in (
    ('', 'one upper step each'),
    ('/local_upper', 'which takes ten local upper steps'),
  )
)

CLAIMS = (
  harness.Claim(
    'Synthetic: with p = 0.3 and two upper steps, E-AiPOD needs a fraction of '
    "AiPOD's projections to the same stationarity.",
    run='synthetic',
    metric=f'projections_ratio/{_LAZY}/t2',
    at_most=0.3,
    published='a curve',
  ),
  harness.Claim(
    'Synthetic: E-AiPOD takes about as many upper steps as AiPOD.',
    run='synthetic',
    metric=f'upper_steps_ratio/{_LAZY}/t2',
    at_most=1.3,
    published='a curve',
  ),
  harness.Claim(
    'Synthetic: with one upper step, lazy lower projections halve them.',
    run='synthetic',
    metric=f'projections_ratio/{_LAZY}/t1',
    at_most=0.5,
    published='a curve',
  ),
  harness.Claim(
    'Synthetic: fewer projections also than AiPOD with twice the step size.',
    run='synthetic',
    metric=f'projections_ratio_equal_step/{_LAZY}/t2',
    at_most=0.55,
    published='a curve',
  ),
  harness.Claim(
    'Synthetic: without the control variate, at most 3 of 10 seeds reach it.',
    run='synthetic',
    metric='seeds_reaching/no_control_variate',
    at_most=3,
    presets=('quick', 'paper'),
  ),
  *_FEDERATED,
  harness.Claim(
    'Federated, linear classifier: in a regime that tuning seeds fix, E-AiPOD '
    'needs fewer communication rounds than FedNest.',
    run='regimes',
    metric='rounds_ratio/regime',
    at_most=1,
    presets=('quick', 'paper'),
  ),
  harness.Claim(
    'Federated, linear classifier: in the same regime, fewer rounds than the '
    'best of FedNest, local SGD and LFedNest.',
    run='regimes',
    metric='rival_ratio/regime',
    at_most=1,
    presets=('quick', 'paper'),
  ),
)
