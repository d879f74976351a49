"""Batched factorisations side by side do not stand still."""

import os
import subprocess
import sys

import pytest

from experiments.harness.app import thunks

# Of six at once on two threads, without the flag, each waits for the others in
# every one of eight runs.
PROGRAM = """
import jax
import jax.numpy as jnp
from experiments.harness.app import thunks
thunks.one_by_one()
solve = jax.vmap(lambda x: jnp.linalg.solve(x, x[:, 0]))
many = [jax.random.normal(jax.random.key(i), (2, 64, 64)) for i in range(6)]
program = jax.jit(lambda many: [solve(x) for x in many]).lower(many).compile()
for _ in range(300):
  found = jax.block_until_ready(program(many))
print(float(abs(many[0][0] @ found[0][0] - many[0][0][:, 0]).max()) < 1e-3)
"""


@pytest.mark.slow
def test_they_end():
  done = subprocess.run(
    [sys.executable, '-c', PROGRAM],
    env={k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.stdout == 'True\n', done.stderr


def test_adds_to_what_is_said():
  environment = {'XLA_FLAGS': '--xla_cpu_use_fusion_emitters=false'}
  assert thunks.one_by_one(environment, (0, 10, 2))
  assert environment['XLA_FLAGS'] == (
    f'--xla_cpu_use_fusion_emitters=false --{thunks.FLAG}=false'
  )
  assert not thunks.one_by_one(environment, (0, 10, 2))


def test_leaves_a_choice_and_newer_versions_alone():
  chosen = {'XLA_FLAGS': f'--{thunks.FLAG}=true'}
  assert not thunks.one_by_one(chosen, (0, 10, 2))
  assert chosen == {'XLA_FLAGS': f'--{thunks.FLAG}=true'}
  none = {}
  assert not thunks.one_by_one(none, thunks.FIXED_VERSION) and not none
  assert thunks.one_by_one(none, (0, 10, 0))
