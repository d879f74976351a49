"""Makes every measured table and number of the documents from stored results.

    python -m experiments.tables                               # writes them
    python -m experiments.tables --check                       # or compares
    python -m experiments.tables --store runs/pbgd/toy/quick   # keeps a run

Results are kept in experiments/<paper>/results, a small file for each of the
`RUNS` in the paper's claims.py, by its name: metrics with their values per
seed, table, curves, seeds, settings, versions, time, date and command. A
Markdown file asks for them by comments, which no reader sees:

    <!-- table: pbgd/toy | solver | mean steps = steps | penalty == 10 -->
    <!-- end -->

is the run's own table, here two columns, one under another name, of the rows
whose penalty is 10; without columns it is the whole table. The column `curve`
is a picture of the run's curve that has the name of the row's first cell, or of
its first two. Of a run that keeps a history, it is how the number of the row
has changed over the stored commits, on the same processor.

    **<!-- number: pbgd/toy gap_exponent/known_value .2f -->-2.16**

is a metric alone in a format; without one it comes with its interval.
A table of all papers with their headline claims stands between
`<!-- papers -->` and `<!-- end -->`. `run a - b` is the difference of two
metrics with its paired t interval. A line cannot start with this comment:
Markdown would take it for HTML. A number in a table is one of these two, or
stands between `<!-- by hand -->`, a sentence that says where it is from, and
`<!-- end -->`; or its cell says that it was measured before results were
stored.
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
  """Stores, writes or checks; gives the exit status."""
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
    help='workdirs of finished runs, whose results are kept',
  )
  parser.add_argument(
    '--check',
    action='store_true',
    help='writes no document; exit status 1 if one differs from the results',
  )
  given = parser.parse_args(argv)
  wrong = []
  try:
    for run in given.store:
      print(store(run))
  except (ValueError, UserError) as error:
    wrong.append(str(error))
  for path in pages():
    text = path.read_text(encoding='utf-8')
    name = path.relative_to(ROOT)
    try:
      made = render(text)
      if not given.check and made != text:
        files.write_text(path, made)
        print(f'wrote {name}')
    except (ValueError, UserError) as error:
      # What one page lacks keeps no other from being written.
      wrong.append(f'{name}: {error}')
      continue
    if given.check and made != text:
      wrong.append(f'{name} differs from the stored results.')
    if re.search(r'^ *<!-- number', made, re.MULTILINE):
      wrong.append(f'{name}: a line starts with the comment of a number.')
    if rows := unstored(made):
      wrong.append(f'{name}: {len(rows)} rows are from no stored result:')
      wrong += rows[:3]
  print('\n'.join(wrong), end='\n' if wrong else '', file=sys.stderr)
  if given.check and not wrong:
    print('All documents agree with the stored results.')
  return 1 if wrong else 0


if __name__ == '__main__':
  sys.exit(main())
