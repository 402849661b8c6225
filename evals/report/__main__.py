"""`python -m evals.report OUT`."""

import sys

from evals.report.sections import main

if __name__ == "__main__":
    sys.exit(main())
