"""The command `distnorm`: small questions answered without a run."""

import argparse
from collections.abc import Sequence

import distnorm
from distnorm.launch import console


def main(arguments: Sequence[str] | None = None) -> None:
    """Answer `distnorm --version` and `distnorm decide`."""
    parser = argparse.ArgumentParser(prog="distnorm", description=distnorm.__doc__)
    parser.add_argument("--version", action="version", version=f"distnorm {distnorm.__version__}")
    commands = parser.add_subparsers(required=True)
    decide = commands.add_parser("decide", help="say which samples share statistics, and why")
    decide.add_argument("--device-batch", type=int, required=True, help="samples one device sees per forward")
    decide.add_argument("--ranks", dest="world_size", type=int, required=True, help="devices over all nodes")
    decide.add_argument("--ranks-per-node", type=int, help="devices of one node; all on one, if left out")
    decide.add_argument("--normalization-batch", type=int, default=32, help="samples that shall share statistics")
    decide.add_argument("--min-normalization-batch", type=int, default=16, help="the fewest worth batch statistics")
    decide.add_argument("--exact", action="store_true", help="hit the normalization batch exactly or refuse")
    try:
        print(distnorm.decide(**vars(parser.parse_args(arguments))))
    except distnorm.DistNormError as error:
        console.fail(error)


if __name__ == "__main__":
    main()
