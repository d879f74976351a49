"""What Shen, Zhang, Hong and Chen claim, and how it is judged here."""

import functools

from experiments import harness

PAPER = harness.Paper(
  'Asynchronous advantage actor-critic, 2023',
  solvers=('a3c_td0', 'delayed'),
  headlines={
    'speedup/iid/workers=64': '64 workers: {} times sooner',
    'training_area/round_robin': 'CartPole, 16 workers: area {}, as one',
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
    'gymnax',
    mode='evaluate',
    flags=('--evaluation.policy=sampled',),
    presets=(),
  ),
  'threads': harness.Run('atari', presets=('smoke',)),
  'atari': harness.Run('atari', extra='atari', presets=_WHOLE),
}

_synthetic = functools.partial(harness.Claim, run='synthetic', presets=_WHOLE)
_cartpole = functools.partial(harness.Claim, run='cartpole', presets=_WHOLE)

CLAIMS = (
  *(
    _synthetic(
      f'Synthetic, i.i.d. samples: {number} workers arrive {least:g} times '
      'sooner than one, in samples of each.',
      metric=f'speedup/iid/workers={number}',
      at_least=least,
      published='a curve, near linear',
    )
    for number, least in _WORKERS.items()
  ),
  _synthetic(
    'Synthetic, Markov samples: 4 workers arrive 3 times sooner.',
    metric='speedup/markov/workers=4',
    at_least=3.0,
    published='a curve, near linear',
  ),
  _synthetic(
    'Synthetic: the distance of the critic to its fixed point, over the last '
    'quarter and all runs, is at most a fifth of that at the start, for the '
    'worst of both samplings and all numbers of workers.',
    metric='worst_critic_error',
    at_most=0.2,
    published='a curve',
  ),
  harness.Claim(
    'Synthetic: the delay, read off version numbers, is the number of workers '
    'minus 1 in each update after the first ones.',
    run='synthetic',
    metric='largest_delay_error',
    at_most=0.0,
  ),
  _synthetic(
    'Synthetic, control: with large constant steps one worker arrives.',
    metric='updates/control/large_step/workers=1',
    at_most=60_000,
  ),
  _synthetic(
    'Synthetic, control: and 64 workers do not, or only late.',
    metric='speedup/control/large_step/workers=64',
    at_most=16.0,
  ),
  _cartpole(
    'CartPole, 16 workers in round robin: the last 100 episodes of the '
    'training return 475 of 500 and more.',
    metric='training_return/round_robin',
    at_least=475,
  ),
  _cartpole(
    'CartPole: no seed is below 450.',
    metric='worst_training_return/round_robin',
    at_least=450,
  ),
  _cartpole(
    'CartPole: over the whole training, 16 workers whose parameters are 15 '
    'updates old return at most 25 of 500 less than one worker at equal '
    'updates, by the paired difference.',
    metric='training_area/round_robin',
    at_least='training_area/one_worker',
    lead=-25,
    published='curves',
  ),
  harness.Claim(
    'Round robin: every gradient is as many updates old as there are other '
    'workers, but for the first round.',
    run='cartpole',
    metric='full_delay_share/round_robin',
    at_least=0.98,
  ),
  *(
    harness.Claim(
      f'Threads that play {game}: each other worker updates about once while '
      'one works.',
      run=run,
      metric='delay_per_other_worker',
      at_least=0.8,
      at_most=1.1,
    )
    for run, game in (('threads', 'a cart-pole'), ('atari', 'Seaquest'))
  ),
)
