"""`python -m tilewright`: the command, for systems where its script is not on the path."""

import sys

from tilewright.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
