"""Fills the tables and numbers of the documents from stored results.

    python -m experiments.tables                               # writes them
    python -m experiments.tables --check                       # compares them
    python -m experiments.tables --store runs/pbgd/toy/quick   # stores a run

experiments/<paper>/results has a small file for each of the paper's `RUNS`:
metrics with their values per seed, table, curves, seeds, settings, versions,
time, date and command. A Markdown file requests them by comments. A table:

    <!-- table: pbgd/toy | solver | mean steps = steps | penalty == 10 -->
    <!-- end -->

Here it has two columns of the run's table, the second under another title, and
the rows whose penalty is 10; without columns it is the full table. The column
`curve` draws the run's curve with the name of the row's first cell, or of its
first two. For a run with a history, it draws the number of the row over the
stored commits on the same processor. A number:

    **<!-- number: pbgd/toy gap_exponent/known_value .2f -->-2.16**

Without a format, it has its interval. `run a - b` is the difference of two
metrics with its paired t interval. A line must not start with this comment,
which Markdown would take for HTML. `<!-- papers -->` and `<!-- end -->` enclose
the table of papers with their headline claims.

Any other number in a table has to be enclosed by `<!-- by hand -->`, a sentence
with its source, and `<!-- end -->`; or its cell says that it was measured
before results were stored.
"""

import argparse
import re
import sys
from collections.abc import Sequence

from experiments.harness.app.errors import UserError
from experiments.harness.store import files
from experiments.harness.study.declared import ROOT
from experiments.harness.study.documents import pages, render, unstored
from experiments.harness.study.stored import store


def main(argv: Sequence[str] | None = None) -> int:
  """Stores, writes or checks; returns the exit status."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.tables',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    '--store',
    nargs='+',
    default=[],
    metavar='RUN',
    help='stores the results of finished runs, given by their workdirs',
  )
  parser.add_argument(
    '--check',
    action='store_true',
    help='only compares; exit status 1 if a document differs',
  )
  args = parser.parse_args(argv)
  for run in args.store:
    try:
      print(store(run))
    except (ValueError, UserError) as error:
      print(f'{run}: {error}', file=sys.stderr)
      return 1
  wrong = []
  for path in pages():
    text = path.read_text(encoding='utf-8')
    name = path.relative_to(ROOT)
    try:
      rendered = render(text)
      if not args.check and rendered != text:
        files.write_text(path, rendered)
        print(f'wrote {name}')
    except (ValueError, UserError) as error:
      # The other pages are still written.
      wrong.append(f'{name}: {error}')
      continue
    if args.check and rendered != text:
      wrong.append(f'{name} differs from the stored results.')
    if re.search(r'^ *<!-- number', rendered, re.MULTILINE):
      wrong.append(f'{name}: a line starts with the comment of a number.')
    if rows := unstored(rendered):
      wrong.append(f'{name}: {len(rows)} rows are from no stored result:')
      wrong += rows[:3]
  print('\n'.join(wrong), end='\n' if wrong else '', file=sys.stderr)
  if args.check and not wrong:
    print('All documents agree with the stored results.')
  return 1 if wrong else 0


if __name__ == '__main__':
  sys.exit(main())
