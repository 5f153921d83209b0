"""`python -m mrl_rag` is `mrl-rag`."""

import sys

from mrl_rag.cli import main

if __name__ == "__main__":
    sys.exit(main())
