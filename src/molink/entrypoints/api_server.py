"""`python -m molink.entrypoints.api_server`: the command of MoLink's earlier versions."""

import sys

from molink.cli.originals import run

if __name__ == "__main__":
    run(sys.argv[1:])
