"""The one exception for a user's mistake, and how a program ends on it."""

import functools
import os
import sys
import time
from collections.abc import Callable

EXIT_CODE = 2
_OTHER_RANKS_WAIT_SECONDS = 3.0


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one sentence saying what to do."""


def one_sentence(error: InputError) -> str:
    """The message alone, also where a DataLoader worker wrapped it in its traceback."""
    return str(error).strip().rsplit(f"{InputError.__name__}: ", 1)[-1]


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Make `main` end with `error: ...` on stderr and exit code 2 on an `InputError`."""

    @functools.wraps(main)
    def run() -> None:
        try:
            main()
        except InputError as error:
            # Every rank meets the same mistake; rank 0 says it, then torchrun stops the others.
            if os.environ.get("RANK", "0") != "0":
                time.sleep(_OTHER_RANKS_WAIT_SECONDS)
            print(f"error: {one_sentence(error)}", file=sys.stderr, flush=True)
            sys.exit(EXIT_CODE)
        except KeyboardInterrupt:
            sys.exit("interrupted")

    return run
