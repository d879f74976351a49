"""Reinforcement learning: environments, networks, evaluation, policies.

`environments` are those of gymnax, compiled; `games` are stepped in Python and
`stepped` keeps their runs. `multi_task` shares one network among the tasks of
`minatar` or `mt10`. `evaluation` plays whole episodes, `policies` are kept in
files, and `drawing` shows them.
"""
