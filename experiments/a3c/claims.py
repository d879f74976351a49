"""What Shen, Zhang, Hong and Chen claim, and how it is judged here."""

from experiments import harness

# Of runs too short or too few for the numbers of a whole one.
_WHOLE = ('quick', 'paper')
_WORKERS = {8: 6.5, 16: 12.0, 64: 45.0}

CLAIMS = (
  *(
    harness.Claim(
      f'Synthetic, i.i.d. samples: {number} workers arrive {least:g} times '
      'sooner than one, in samples of each.',
      binary='synthetic',
      metric=f'speedup/iid/n{number}',
      at_least=least,
      presets=_WHOLE,
      published='a curve, near linear',
    )
    for number, least in _WORKERS.items()
  ),
  harness.Claim(
    'Synthetic, Markov samples: 4 workers arrive 3 times sooner.',
    binary='synthetic',
    metric='speedup/markov/n4',
    at_least=3.0,
    presets=_WHOLE,
    published='a curve, near linear',
  ),
  harness.Claim(
    'Synthetic: the distance of the critic to its fixed point, over the last '
    'quarter and all runs, is at most a fifth of that at the start, for the '
    'worst of both samplings and all numbers of workers.',
    binary='synthetic',
    metric='critic_error/worst',
    at_most=0.2,
    presets=_WHOLE,
    published='a curve',
  ),
  harness.Claim(
    'Synthetic: the delay, read off version numbers, is the number of workers '
    'minus 1 in each update after the first ones.',
    binary='synthetic',
    metric='delay/off',
    at_most=0.0,
  ),
  harness.Claim(
    'Synthetic, control: with large constant steps one worker arrives.',
    binary='synthetic',
    metric='control/large_step/n1_reached',
    at_least=1.0,
    presets=_WHOLE,
  ),
  harness.Claim(
    'Synthetic, control: and 64 workers do not, or only late.',
    binary='synthetic',
    metric='control/large_step/n64',
    at_most=16.0,
    presets=_WHOLE,
  ),
  harness.Claim(
    'CartPole, 16 workers in round robin: the last 100 episodes of the '
    'training return 475 of 500 and more.',
    binary='gymnax',
    metric='training_return',
    at_least=475,
    presets=('quick', 'paper'),
  ),
  harness.Claim(
    'CartPole: no seed is below 450.',
    binary='gymnax',
    metric='worst_training_return',
    at_least=450,
    presets=('quick', 'paper'),
  ),
  harness.Claim(
    'CartPole: over the whole training, 16 workers whose parameters are 15 '
    'updates old return at most 25 of 500 less than one worker at equal '
    'updates, by the paired difference.',
    binary='gymnax',
    metric='training_area_lead_over_one_worker',
    at_least=-25,
    published='curves',
    presets=('quick', 'paper'),
  ),
  harness.Claim(
    'Round robin: every gradient is as many updates old as there are other '
    'workers, but for the first round.',
    binary='gymnax',
    metric='delay/full',
    at_least=0.98,
  ),
  harness.Claim(
    'Threads that play a cart-pole: each other worker updates about once while '
    'one works.',
    binary='atari',
    metric='delay/of_others',
    at_least=0.8,
    at_most=1.1,
    presets=('smoke',),
  ),
  harness.Claim(
    'Threads that play Seaquest: each other worker updates about once while '
    'one works.',
    binary='atari',
    metric='delay/of_others',
    at_least=0.8,
    at_most=1.1,
    presets=('quick', 'paper'),
    extra='atari',
  ),
)
