"""What Shen, Zhang, Hong and Chen claim, and how it is judged here."""

from experiments import harness

PAPER = harness.Paper(
  'Asynchronous advantage actor-critic, 2023',
  solvers=('a3c_td0', 'delayed'),
  headlines={
    'speedup/iid/n64': '64 workers: {} times sooner',
    'training_area_lead_over_one_worker': 'CartPole, 16 workers less one: {}',
  },
)

# Of runs too short or too few for the numbers of a whole one.
_WHOLE = ('quick', 'paper')
_WORKERS = {8: 6.5, 16: 12.0, 64: 45.0}

RUNS = {
  'synthetic': harness.Run('synthetic'),
  'cartpole': harness.Run('gymnax'),
  'cartpole_greedy': harness.Run('gymnax', mode='evaluate', presets=()),
  'cartpole_sampled': harness.Run(
    'gymnax', mode='evaluate', flags=('--policy=sampled',), presets=()
  ),
  'threads': harness.Run('atari', presets=('smoke',)),
  'atari': harness.Run('atari', extra='atari', presets=_WHOLE),
}

CLAIMS = (
  *(
    harness.Claim(
      f'Synthetic, i.i.d. samples: {number} workers arrive {least:g} times '
      'sooner than one, in samples of each.',
      run='synthetic',
      metric=f'speedup/iid/n{number}',
      at_least=least,
      presets=_WHOLE,
      published='a curve, near linear',
    )
    for number, least in _WORKERS.items()
  ),
  harness.Claim(
    'Synthetic, Markov samples: 4 workers arrive 3 times sooner.',
    run='synthetic',
    metric='speedup/markov/n4',
    at_least=3.0,
    presets=_WHOLE,
    published='a curve, near linear',
  ),
  harness.Claim(
    'Synthetic: the distance of the critic to its fixed point, over the last '
    'quarter and all runs, is at most a fifth of that at the start, for the '
    'worst of both samplings and all numbers of workers.',
    run='synthetic',
    metric='critic_error/worst',
    at_most=0.2,
    presets=_WHOLE,
    published='a curve',
  ),
  harness.Claim(
    'Synthetic: the delay, read off version numbers, is the number of workers '
    'minus 1 in each update after the first ones.',
    run='synthetic',
    metric='delay/off',
    at_most=0.0,
  ),
  harness.Claim(
    'Synthetic, control: with large constant steps one worker arrives.',
    run='synthetic',
    metric='control/large_step/n1_reached',
    at_least=1.0,
    presets=_WHOLE,
  ),
  harness.Claim(
    'Synthetic, control: and 64 workers do not, or only late.',
    run='synthetic',
    metric='control/large_step/n64',
    at_most=16.0,
    presets=_WHOLE,
  ),
  harness.Claim(
    'CartPole, 16 workers in round robin: the last 100 episodes of the '
    'training return 475 of 500 and more.',
    run='cartpole',
    metric='training_return',
    at_least=475,
    presets=_WHOLE,
  ),
  harness.Claim(
    'CartPole: no seed is below 450.',
    run='cartpole',
    metric='worst_training_return',
    at_least=450,
    presets=_WHOLE,
  ),
  harness.Claim(
    'CartPole: over the whole training, 16 workers whose parameters are 15 '
    'updates old return at most 25 of 500 less than one worker at equal '
    'updates, by the paired difference.',
    run='cartpole',
    metric='training_area_lead_over_one_worker',
    at_least=-25,
    published='curves',
    presets=_WHOLE,
  ),
  harness.Claim(
    'Round robin: every gradient is as many updates old as there are other '
    'workers, but for the first round.',
    run='cartpole',
    metric='delay/full',
    at_least=0.98,
  ),
  harness.Claim(
    'Threads that play a cart-pole: each other worker updates about once while '
    'one works.',
    run='threads',
    metric='delay/of_others',
    at_least=0.8,
    at_most=1.1,
  ),
  harness.Claim(
    'Threads that play Seaquest: each other worker updates about once while '
    'one works.',
    run='atari',
    metric='delay/of_others',
    at_least=0.8,
    at_most=1.1,
  ),
)
