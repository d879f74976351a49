"""Works around a deadlock of jaxlib on the CPU.

jaxlib splits batched factorisations (`qr`, `solve`, `cholesky`, ... under
`vmap`, so in any run with several seeds) into tasks for XLA's own thread pool,
and blocks a thread of that pool until they are done. On a machine with two
cores, two factorisations at once block both threads, and the program hangs
without load or message. XLA runs them concurrently only with its
concurrency-optimised scheduler, which this module turns off. Newer versions of
jaxlib do not split them.

Small loops have another cost that no flag removes. If more than about eight
operations of a loop body are ready at once, XLA seems to move some to another
thread, which takes longer than operations of microseconds. One more operation
can trigger it: a step that also stacked two losses took 1.5 to 1.7 times the
CPU time. `PJRT_NPROC=1` in the environment gives XLA one thread. Set it for
small problems, or to run one process per core; large products then use one
core.
"""

import os
from collections.abc import MutableMapping

import jaxlib.version

FLAG = 'xla_cpu_enable_concurrency_optimized_scheduler'
# The first version without the deadlock. It may not know the flag, and XLA
# exits on an unknown flag.
FIXED_VERSION = (0, 11, 2)


def one_by_one(
  environment: MutableMapping[str, str] = os.environ,
  version: tuple[int, ...] = jaxlib.version.__version_info__,
) -> bool:
  """Makes XLA run operations in sequence; call it before XLA starts.

  Several cores still share the work of one operation.

  Args:
    environment: environment variables; the flag is added to `XLA_FLAGS`.
    version: version of jaxlib.

  Returns:
    Whether the flag was added: not for a fixed version, nor if `XLA_FLAGS`
    already has the flag.
  """
  xla_flags = environment.get('XLA_FLAGS', '')
  if version >= FIXED_VERSION or FLAG in xla_flags:
    return False
  environment['XLA_FLAGS'] = f'{xla_flags} --{FLAG}=false'.strip()
  return True
