"""Claims of Shen, Zhang, Hong and Chen, 2023, with their bounds."""

import functools

from experiments import harness

PAPER = harness.Paper(
  'Asynchronous advantage actor-critic, 2023',
  solvers=('a3c_td0', 'delayed'),
  headlines={
    'speedup/iid/workers=64': '64 workers: {} times sooner',
    'speedup/tuned/workers=16': 'CartPole, 16 workers: {} times sooner',
  },
)

# Presets that are long enough for these claims.
_FULL = ('quick', 'paper')
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
  'delay_sweep': harness.Run('delay_sweep'),
  'workers': harness.Run('workers_sweep'),
  'workers_breakout': harness.Run(
    'workers_sweep',
    # With 0.01, policies of one worker become constant.
    flags=('--env=Breakout-MinAtar', '--target=4', '--losses.entropy=0.05'),
    presets=_FULL,
  ),
  'workers_space_invaders': harness.Run(
    'workers_sweep',
    flags=('--env=SpaceInvaders-MinAtar', '--target=20'),
    presets=_FULL,
  ),
  'threads': harness.Run('atari', presets=('smoke',)),
  'atari': harness.Run('atari', extra='atari', presets=_FULL),
}

_synthetic = functools.partial(harness.Claim, run='synthetic', presets=_FULL)
_cartpole = functools.partial(harness.Claim, run='cartpole', presets=_FULL)
_sweep = functools.partial(harness.Claim, run='delay_sweep', presets=_FULL)
_NO_DELAY = 'final_return/fixed/delay=0'
_GAMES = {
  'workers': 'CartPole',
  'workers_breakout': 'Breakout of MinAtar',
  'workers_space_invaders': 'Space Invaders of MinAtar',
}


def _compare(run, game):
  """Claims on 1 and 16 workers in a game."""
  sweep = functools.partial(harness.Claim, run=run, presets=_FULL)
  one, many = 'tuned/workers=1', 'tuned/workers=16'
  return (
    sweep(
      f'{game}: one worker returns at least 5 times as much as random actions.',
      metric=f'return_at_equal_updates/{one}',
      at_least='random_return',
      factor=5.0,
    ),
    sweep(
      f'{game}: return at equal updates, n16 - n1, is at least -10 % of n1, by '
      'paired seeds.',
      metric=f'return_at_equal_updates/{many}',
      at_least=f'return_at_equal_updates/{one}',
      factor=0.9,
      published='curves',
    ),
    sweep(
      f'{game}: return at equal frames per worker, n16 - n1, is above 0, by '
      'paired seeds.',
      metric=f'return_at_equal_frames/{many}',
      at_least=f'return_at_equal_frames/{one}',
      published='curves',
    ),
    sweep(
      f'{game}: the speedup of 16 workers is at least 8.',
      metric=f'speedup/{many}',
      at_least=8.0,
      published='a curve, near linear',
    ),
    sweep(
      f'{game}, control: with the step of one worker, the mean return of 16 '
      'workers over the run is at most 0.8 of that of one, because delays act.',
      metric='mean_return/fixed/workers=16',
      at_most=f'mean_return/{one}',
      factor=0.8,
    ),
    sweep(
      f'{game}: by version numbers, delays are those of round robin.',
      metric='wrong_delays',
      at_most=0.0,
    ),
  )


CLAIMS = (
  *(
    _synthetic(
      f'Synthetic, i.i.d. samples, N = {number}: speedup of {bound:g} or more.',
      metric=f'speedup/iid/workers={number}',
      at_least=bound,
      published='a curve, near linear',
    )
    for number, bound in _WORKERS.items()
  ),
  _synthetic(
    'Synthetic, Markov samples: the speedup of 4 workers is at least 3.',
    metric='speedup/markov/workers=4',
    at_least=3.0,
    published='a curve, near linear',
  ),
  _synthetic(
    'Synthetic: over the last quarter, the mean distance of the critic to its '
    'fixed point is at most a fifth of the initial one, for the worst sampling '
    'and number of workers.',
    metric='worst_critic_error',
    at_most=0.2,
    published='a curve',
  ),
  harness.Claim(
    'Synthetic: after the first N - 1 updates, the delay by version numbers '
    'is N - 1 in each update of N workers.',
    run='synthetic',
    metric='largest_delay_error',
    at_most=0.0,
  ),
  _synthetic(
    'Synthetic, control: with large constant steps, one worker succeeds.',
    metric='updates/control/large_step/workers=1',
    at_most=60_000,
  ),
  _synthetic(
    'Synthetic, control: then the speedup of 64 workers is at most 16.',
    metric='speedup/control/large_step/workers=64',
    at_most=16.0,
  ),
  _cartpole(
    'CartPole, 16 workers in round robin: the last 100 training episodes '
    'return at least 475 of 500 on average.',
    metric='training_return/round_robin',
    at_least=475,
  ),
  _cartpole(
    'CartPole: this training return is at least 450 for each seed.',
    metric='worst_training_return/round_robin',
    at_least=450,
  ),
  *(claim for run, game in _GAMES.items() for claim in _compare(run, game)),
  harness.Claim(
    'Round robin: after the first round, each gradient of N workers has a '
    'delay of N - 1 updates.',
    run='cartpole',
    metric='full_delay_share/round_robin',
    at_least=0.98,
  ),
  _sweep(
    'Delay sweep: without delay, the last quarter of the run returns at least '
    '400 of 500.',
    metric=_NO_DELAY,
    at_least=400,
  ),
  _sweep(
    'Delay sweep, control: random actions return at most 50.',
    metric='random_return',
    at_most=50,
  ),
  *(
    _sweep(
      f'Delay sweep: return, delay 0 - delay {delay}, is at least 100 at the '
      'step that is best without delay.',
      metric=f'final_return/fixed/delay={delay}',
      at_most=_NO_DELAY,
      lead=100,
    )
    for delay in (16, 64)
  ),
  *(
    _sweep(
      f'Delay sweep: return, delay 0 - delay {delay}, is at most 50 with the '
      'step divided by 1 + delay.',
      metric=f'final_return/divided/delay={delay}',
      at_least=_NO_DELAY,
      lead=-50,
    )
    for delay in (16, 64)
  ),
  harness.Claim(
    'Delay sweep: after as many updates, each gradient has the delay of its '
    'cell.',
    run='delay_sweep',
    metric='largest_delay_error',
    at_most=0.0,
  ),
  *(
    harness.Claim(
      f'Threads that play {game}: each other worker updates about once per '
      'gradient.',
      run=run,
      metric='delay_per_other_worker',
      at_least=0.8,
      at_most=1.1,
    )
    for run, game in (('threads', 'CartPole'), ('atari', 'Seaquest'))
  ),
)
