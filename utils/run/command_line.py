"""Command-line programs: parsing, tables, and one sentence and exit code for each kind of end."""

import argparse
import functools
import os
import re
import sys
import time
from collections.abc import Callable, Sequence

from utils.run.errors import (
    NonFiniteError,
    OutOfMemory,
    PeerLost,
    Preempted,
    UserError,
    WorkerLost,
    is_out_of_memory,
)

EXIT_CODE = 2
PREEMPTED_EXIT_CODE = 75  # EX_TEMPFAIL: the same command goes on
_TURN_SECONDS = 10.0


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Make `main` end with `error: ...` on stderr and an exit code, and without a traceback.

    A user's mistake, a value that is not finite and too little memory end with code 2; a preempted
    run with 75 and one that lost a peer or a worker with 1, both of which can go on.
    """

    @functools.wraps(main)
    def run() -> None:
        try:
            main()
            sys.stdout.flush()
        except (UserError, NonFiniteError, OutOfMemory, PeerLost, WorkerLost) as error:
            if "RANK" in os.environ:  # of torchrun, which stops all ranks when the first one ends
                # Rank 0 tells what all meet; what one alone meets that one, not those that lose it.
                turn = 2 if isinstance(error, PeerLost) else min(int(os.environ["RANK"]), 1)
                time.sleep(turn * _TURN_SECONDS)
            print(f"error: {one_sentence(error)}", file=sys.stderr, flush=True)
            sys.exit(1 if isinstance(error, PeerLost | WorkerLost) else EXIT_CODE)
        except BrokenPipeError:  # of `| head`: what is left to print has no reader
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except (MemoryError, OSError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            print("error: out of memory: choose smaller images or a smaller batch", file=sys.stderr)
            sys.exit(EXIT_CODE)
        except Preempted:
            sys.exit(PREEMPTED_EXIT_CODE)
        except KeyboardInterrupt:
            sys.exit("interrupted")

    return run


def one_sentence(error: Exception) -> str:
    """The message alone, also where a DataLoader worker wrapped it in its traceback."""
    return printable(str(error).strip().rsplit(f"{UserError.__name__}: ", 1)[-1])


def printable(text: str) -> str:
    """`text` on one line that can be encoded: file names may hold any bytes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns also line up in a terminal, numbers to the right.

    The first row is the header.
    """
    columns = []
    for cells in zip(*rows, strict=True):
        column = [cell.replace("|", r"\|") for cell in cells]
        width = max(map(len, column))
        has_numbers = any(re.match(r"-?\d", cell) for cell in column[1:])
        rule = "-" * (width - 1) + ":" if has_numbers else "-" * width
        justify = str.rjust if has_numbers else str.ljust
        columns.append([justify(cell, width) for cell in (column[0], rule, *column[1:])])
    return "\n".join(f"| {' | '.join(row)} |" for row in zip(*columns, strict=True))


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `UserError`; the description keeps its lines."""

    def __init__(self, description: str):
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        # argparse of Python 3.11 takes -1e-4 for an option: its pattern knows no exponents.
        self._negative_number_matcher = re.compile(r"-\.?\d")

    def error(self, message: str):
        raise UserError(f"{message}; --help lists the options")


def boolean(text: str) -> bool:
    """Argument type of `true` and `false`."""
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"true or false, not {text!r}")
    return text == "true"


def positive(text: str) -> int:
    """Argument type of whole numbers above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"a whole number above 0, not {text!r}")
    return int(text)


def add_network_options(parser: Parser) -> None:
    """Options of the network that a file does not always tell."""
    parser.add_argument(
        "--binary_weights",
        type=boolean,
        help="true for step 2, false for step 1, where the file does not tell",
    )
    parser.add_argument("--small_images", type=boolean, help="where the file does not tell")
