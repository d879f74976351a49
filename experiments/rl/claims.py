"""Claims on the policies that papers share; no paper made them."""

from experiments import harness

PAPER = None

RUNS = {'cartpole': harness.Run('train', presets=('smoke', 'quick'))}

CLAIMS = (
  harness.Claim(
    'CartPole: PPO returns at least 475 of 500 with the likeliest actions '
    'after at most 300,000 frames, with each of 5 seeds.',
    run='cartpole',
    metric='most_frames_to_solve/ppo',
    at_most=300_000,
    presets=('quick',),
  ),
  harness.Claim(
    'CartPole: over the whole run, PPO returns more than the actor-critic at '
    'equal frames.',
    run='cartpole',
    metric='greedy_area/ppo',
    at_least='greedy_area/actor_critic',
    presets=('quick',),
  ),
)
