"""Compiles a program for its devices, runs it, and measures its time."""

import itertools
import math
import time
from typing import Any

import jax

from experiments.harness.app import capacity, compile_time, memory
from experiments.harness.store import programs
from experiments.harness.train.context import Members, Shared
from experiments.harness.train.placement import Layout, Placement
from experiments.harness.train.program import Carry, Program

# Bytes of a carry from which a single member takes one step per dispatch: a
# compiled loop would hold all gradients at once, or copies of the weights. The
# cost of a dispatch, about 0.1 ms, is small compared with a step of that size.
LARGE = 2**28
# Seconds of compiling from which the memory of the compiler is returned.
SLOW = 1.0


class Compiled:
  """A program with its inputs.

  Args:
    program: the program.
    every: its members.
    shared: their shared data.
    placement: devices of the inputs.
    stream: batches from the host, or None.
  """

  def __init__(
    self,
    program: Program,
    every: Members,
    shared: Shared,
    placement: Placement,
    stream: Any = None,
  ):
    self._program, self._inputs = program, (every, shared)
    self._placement, self._stream, self._batches = placement, stream, None
    self._running = self._compiling = 0.0
    self.freezes = program.freezes
    self.shapes = jax.eval_shape(program.init, *self._inputs)
    self._carry = placement.carry(self.shapes)
    if self._carry is not None:
      self.shapes = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
        self.shapes,
        jax.tree.broadcast(self._carry, self.shapes),
      )
    size = sum(
      math.prod(x.shape) * x.dtype.itemsize
      for x in jax.tree.leaves(self.shapes)
    )
    capacity.require_memory(size, 'params and states of a run')
    large = not program.freezes and size >= LARGE
    self._step_by_step = stream is not None or large
    self.culprits = program.culprits(self.shapes)

  def init(self) -> Carry:
    """Returns the carry at step 0."""
    # The results of a compiled function share no buffers, so that the carry can
    # be donated.
    return self._run('init', *self._inputs)

  def identify(
    self, layout: Layout | None
  ) -> tuple[dict[str, str], dict[str, Any]]:
    """Returns digests of the program by part, and what else they depend on.

    Args:
      layout: placement of params; its mesh may shape the program.
    """
    devices = jax.device_count() if layout is None else dict(layout.mesh.shape)
    environment = programs.versions() | {
      'platform': jax.default_backend(),
      'devices': devices,
    }
    shapes = getattr(self._stream, 'batch_shapes', None)
    streamed = None if shapes is None else shapes()
    known = self._stream is None or shapes is not None
    digests = self._program.digests(
      self.shapes, *self._inputs, streamed, steps=known
    )
    return digests, environment

  def restore(self, restored: Any) -> Carry:
    """Restores the carry and the times of a checkpoint."""
    self._running = restored.extra['seconds']
    self._compiling = restored.extra['compile_seconds']
    return restored.tree

  def advance(
    self, carry: Carry, length: int
  ) -> tuple[Carry, dict[str, jax.Array]]:
    """Takes `length` steps, then measures; donates the carry."""
    if self._step_by_step:
      if self._batches is None and length:
        self._batches = self._read(int(carry.step))
      for _ in range(length):
        start = time.monotonic()
        batch = next(self._batches)
        self._running += time.monotonic() - start
        carry = self._run('step', carry, *self._inputs, batch)
      length = 0
    return self._run('chunk', carry, *self._inputs, length=length)

  def _read(self, step):
    if self._stream is None:
      return itertools.repeat(None)
    return self._stream.batches(step, self._placement.examples)

  def choose(self, carry: Carry, step: int, score: Any) -> Carry:
    """Updates `best` of the members whose score is the best so far."""
    best = self._run('choose', carry.best, carry.params, step, score)
    return carry._replace(best=best)

  def seconds(self) -> dict[str, float]:
    """Returns run time and compile time, over all attempts."""
    return {'seconds': self._running, 'compile_seconds': self._compiling}

  def _run(self, name, *args, **static):
    # The results of a dispatch have the shardings that the next one expects.
    carry, everywhere = self._carry, self._placement.everywhere
    shardings = carry
    if name == 'chunk':
      shardings = None if everywhere is None else (carry, everywhere)
    elif name == 'choose' and hasattr(carry, 'best'):
      shardings = carry.best
    jitted = self._program.jitted(name, shardings)
    compiling, start = compile_time.seconds(), time.monotonic()
    # Blocks: queued collectives of virtual devices abort.
    out = jax.block_until_ready(jitted(*args, **static))
    compiling = compile_time.seconds() - compiling
    self._compiling += compiling
    self._running += time.monotonic() - start - compiling
    if compiling > SLOW:
      memory.return_freed()
    return out
