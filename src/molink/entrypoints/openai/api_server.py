"""`python -m molink.entrypoints.openai.api_server`: the same as `molink.entrypoints.api_server`.

Today's server answers `/generate` and `/v1` together.
"""

import sys

from molink.cli.originals import run

if __name__ == "__main__":
    run(sys.argv[1:])
