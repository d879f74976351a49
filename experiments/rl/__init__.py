"""Reinforcement learning: environments, networks, evaluation, policies.

`environments` wraps compiled environments of gymnax. `games` are stepped in
Python, and `stepped` stores their runs. `multi_task` shares one network among
the games of `minatar`. `evaluation` plays whole episodes, `policies` stores
policies in files, and `drawing` draws states. `train` runs `ppo` and the
actor-critic; `claims` declares its run.
"""
