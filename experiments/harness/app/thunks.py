"""Keeps programs on the processor from a deadlock of jaxlib's.

Batched factorisations (`qr`, `solve`, `cholesky`, ... under `vmap`, so of any
run with several seeds) are cut into tasks for the pool of threads that XLA
itself runs on, and wait there for them. Two at once take both threads of a
machine with two cores, and the tasks never begin: the program stands still, at
no load, without a word. XLA puts them side by side only where it schedules for
concurrency. Newer versions of jaxlib do not cut them.

The processor time of small loops has a second cause, which no flag removes.
Where more than some eight operations of a program or loop body are ready at
once, XLA seems to hand some of them to another thread. For operations of
microseconds that costs more than they do, and whether it happens depends on one
operation more or less: a step that also stacks two losses or counts evaluations
took 1.5 to 1.7 times the processor time of the same step without them. With
`PJRT_NPROC=1` in the environment XLA has one thread, and a loop costs what its
steps cost. Set it for small problems, and where each core runs a process of its
own; large products then use one core.
"""

import os
from collections.abc import MutableMapping

import jaxlib.version

FLAG = 'xla_cpu_enable_concurrency_optimized_scheduler'
# From here on, batches are not cut; the flag may then be unknown, which ends
# the process.
MENDED = (0, 11, 2)


def one_by_one(
  environment: MutableMapping[str, str] = os.environ,
  version: tuple[int, ...] = jaxlib.version.__version_info__,
) -> bool:
  """Lets XLA run one operation after another, from its first program on.

  Where several cores share the work of one operation, they still do.

  Args:
    environment: in which XLA, when it is first used, finds its flags.
    version: of jaxlib.

  Returns:
    Whether it does: not where the environment already says so or otherwise.
  """
  said = environment.get('XLA_FLAGS', '')
  if version >= MENDED or FLAG in said:
    return False
  environment['XLA_FLAGS'] = f'{said} --{FLAG}=false'.strip()
  return True
