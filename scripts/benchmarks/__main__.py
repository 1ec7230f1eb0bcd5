"""What this code costs: both sides in turn in one process, medians of interleaved rounds.

    python -m scripts.benchmarks measures      a training step with and without the live measures
    python -m scripts.benchmarks step          a training step, ours against the reference
    python -m scripts.benchmarks evaluation    a forward pass, ours against the reference
    python -m scripts.benchmarks loader        loading images, ours against the released transforms
    python -m scripts.benchmarks workers       loading batches with 0, 1, 2, ... workers
    python -m scripts.benchmarks speed         the last four by options and batch: a page of results
    python -m scripts.benchmarks inference     binary, float32 and int8 engines: a page of results

Each has options of its own: python -m scripts.benchmarks step --help
"""

import sys
from importlib import import_module

from utils.run.command_line import Parser, command

BENCHMARKS = {
    "measures": "training",
    "step": "training",
    "evaluation": "training",
    "loader": "loading",
    "workers": "loading",
    "speed": "report",
    "inference": "inference",
}


@command
def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("what", choices=BENCHMARKS)
    what = parser.parse_args(sys.argv[1:2]).what
    # Not at the top: each new process that a benchmark starts imports this file again.
    benchmark = import_module(f"scripts.benchmarks.{BENCHMARKS[what]}")
    parser = Parser(benchmark.__doc__)
    parser.prog = f"python -m scripts.benchmarks {what}"
    benchmark.add_options(parser)
    benchmark.run(what, parser.parse_args(sys.argv[2:]))


if __name__ == "__main__":
    main()
