"""What is claimed of asynchronous actor-critic with networks."""

from experiments import harness

CLAIMS = (
  harness.Claim(
    'CartPole, 16 workers in round robin: the last 100 episodes of the '
    'training return 475 of 500 and more.',
    binary='gymnax',
    metric='mean_return',
    at_least=475,
    presets=('quick', 'paper'),
  ),
  harness.Claim(
    'CartPole: no seed is below 450.',
    binary='gymnax',
    metric='worst_return',
    at_least=450,
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
