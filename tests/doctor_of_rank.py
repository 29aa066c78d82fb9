"""`distnorm doctor` as a task that gives each rank another seed, as a launcher's own numbering may."""

import os
import sys

from distnorm import cli

if __name__ == "__main__":
    cli.main(["doctor", *sys.argv[1:], f"seed={os.environ['SLURM_PROCID']}"])
