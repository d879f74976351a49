"""Experiments: binaries that resume, and report beside what is published."""

import os
import signal
import sys

from experiments import thunks

# XLA reads its flags once, when it is first used: gymnax does so when it is
# imported.
thunks.one_by_one()

# As it is while Python looks for the module that `python -m` names: a SIGTERM
# while that is imported, which takes seconds, means "try again later" too.
if sys.argv[:1] == ['-m']:
  signal.signal(signal.SIGTERM, lambda *_: os._exit(os.EX_TEMPFAIL))
