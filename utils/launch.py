"""Start a training program on this machine: `python utils/launch.py step1/train.py [options]`.

One process per visible GPU through torchrun; one plain process on a single GPU, or on a CPU, also
with --device cpu.
NPROC_PER_NODE, NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT override, torchrun's own PET_*
variables stand above them, and under SLURM the nodes of the job are used.

When one of several processes dies, all are started again, PET_MAX_RESTARTS times (3), and go on
from the last checkpoint.  SIGTERM, SIGINT and SIGUSR1 are passed on to every process, which have
PET_SHUTDOWN_TIMEOUT seconds (300) to save and leave; the exit code is then 75.  A terminal that
closes ends nothing.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from utils.run.command_line import EXIT_CODE, PREEMPTED_EXIT_CODE

RESTARTS = "3"
DEFAULTS = {
    "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGQUIT,SIGUSR1",
    "PET_SHUTDOWN_TIMEOUT": "300",
}
# Machines that start again have lost each other within PET_SHUTDOWN_TIMEOUT; one that has not come
# by then has ended for good.
RESTARTED = {"PET_RDZV_CONF": "timeout=400"}
# The user's mistake, which a restart would repeat, and a request to stop.
FINAL = (EXIT_CODE, PREEMPTED_EXIT_CODE)


def torchrun_settings(environment: Mapping[str, str], gpus: int) -> dict[str, str]:
    """torchrun's options, as its PET_* environment variables, for one machine's share of a run."""
    nodes = environment.get("NNODES") or environment.get("SLURM_NNODES") or "1"
    settings = {"PET_NPROC_PER_NODE": environment.get("NPROC_PER_NODE") or str(gpus or 1)}
    if nodes == "1":
        settings["PET_STANDALONE"] = "1"
    else:
        settings["PET_NNODES"] = nodes
        rank = environment.get("NODE_RANK") or environment.get("SLURM_NODEID") or "0"
        settings["PET_NODE_RANK"] = rank
        host = environment.get("MASTER_ADDR") or _first_slurm_host(environment)
        settings["PET_MASTER_ADDR"] = host
        settings["PET_MASTER_PORT"] = environment.get("MASTER_PORT") or "29500"
    return settings | {k: value for k, value in environment.items() if k.startswith("PET_")}


def _first_slurm_host(environment: Mapping[str, str]) -> str:
    hosts = environment.get("SLURM_JOB_NODELIST")
    if hosts is None:
        sys.exit("error: a run on several machines needs MASTER_ADDR, the name of the first one")
    listing = subprocess.run(
        ["scontrol", "show", "hostnames", hosts], capture_output=True, text=True, check=True
    )
    return listing.stdout.split()[0]


def main() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what is started here inherits it
    script_and_options = sys.argv[1:]
    on_cpu = "--device cpu" in " ".join(script_and_options).replace("=", " ")
    settings = torchrun_settings(os.environ, 0 if on_cpu else torch.cuda.device_count())
    if settings["PET_NPROC_PER_NODE"] == "1" and "PET_NNODES" not in settings:
        os.execv(sys.executable, [sys.executable, *script_and_options])
    restarts = settings.pop("PET_MAX_RESTARTS", RESTARTS)
    if not restarts.isdecimal():
        sys.exit(f"error: PET_MAX_RESTARTS must be a whole number, not {restarts!r}")
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # it is for torchrun's processes, which save
    # torchrun's own restarts would also repeat what ended for good.
    os.environ.update(DEFAULTS | settings | {"PET_MAX_RESTARTS": "0"})
    for left in reversed(range(int(restarts) + 1)):
        code = run_once(script_and_options)
        if code == 0 or code in FINAL or left == 0:
            sys.exit(code)
        print(f"a process ended with code {code}: all start again, {left} more times", flush=True)
        os.environ.update(RESTARTED | settings)


def run_once(script_and_options: Sequence[str]) -> int:
    """Run all processes to their end; 0, or the exit code of the first one that failed."""
    # Imported late: torchrun reads the environment on import.
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    try:
        run(parse_args(script_and_options))
        return 0
    except SignalException:
        return PREEMPTED_EXIT_CODE
    except ChildFailedError as error:
        # The process has already said what was wrong; torchrun's traceback would bury it.
        return error.get_first_failure()[1].exitcode
    except DistError as error:
        sys.exit(f"error: not all machines came ({error}): look at what the others print")


if __name__ == "__main__":
    main()
