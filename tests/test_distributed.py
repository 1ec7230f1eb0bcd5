"""Two processes (gloo, CPU) against one: gradients, BN statistics, validation, launching."""

import os
import signal
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.multiprocessing as mp
from compare import assert_same_run
from conftest import (
    CLASSES,
    FROM_SCRATCH,
    TINY,
    TRAIN,
    command_line,
    config_with,
    dist_env,
    launch,
    on_gpu,
    start,
)
from process import free_port, kill_a_child, wait_until
from torch import nn
from torch.nn.utils import parameters_to_vector

from models import build_model
from utils.checkpoint.checkpoint import NEWEST
from utils.checkpoint.manager import restore_mid_epoch
from utils.data.loader import EpochBatchSampler, val_batches
from utils.engine import evaluate, train_one_epoch
from utils.launch import torchrun_settings
from utils.optim import build_optimizer
from utils.run.command_line import PREEMPTED_EXIT_CODE, command
from utils.run.distributed import DistEnv, broadcast_buffers, distribute, init_distributed
from utils.run.errors import PeerLost, UserError, WorkerLost
from utils.run.state import TrainState

IMAGES, BATCH = 21, 8  # three steps; the last batch of 5 does not divide by two


def step2_network() -> nn.Module:
    torch.manual_seed(0)
    options = {"num_classes": 3, "width": 1 / 16, "small_images": True}
    return build_model("reactnet_a", latent_init="symmetric", **options).double()


def network_without_bn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 14**2, 3)).double()


def images_and_labels():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(IMAGES, 3, 16, 16, generator=generator, dtype=torch.float64)
    return images, torch.arange(IMAGES) % 3


def train_three_steps(dist: DistEnv, network, accumulate: int) -> dict:
    """Train and validate in this process among its peers; what it ended with."""
    images, labels = images_and_labels()

    def batches(keys):
        shares = [[index for _, index in batch] for batch in keys]
        return [(images[share], labels[share]) for share in shares]

    student, config = network(), config_with(weight_decay=5e-6, accumulate=accumulate)
    passes = []
    student.register_forward_hook(lambda *_: passes.append(student.training))
    trained = train_one_epoch(
        distribute(student, dist, sync_bn=False),
        None,
        batches(EpochBatchSampler(IMAGES, BATCH, 0, dist.rank, dist.world_size)),
        build_optimizer(student, config),
        config,
        TrainState(),
    )
    broadcast_buffers(student)
    validation = batches(val_batches(IMAGES, BATCH, dist.rank, dist.world_size))
    buffers = [b.double().flatten() for b in student.buffers()] or [torch.zeros(1)]
    return {
        "parameters": parameters_to_vector(student.parameters()).detach(),
        "buffers": torch.cat(buffers),
        "trained": trained,
        "validated": evaluate(student, validation).results(),
        "training_passes": sum(passes),
    }


JOBS = {
    "with_bn": (step2_network, 1),
    "without_bn": (network_without_bn, 1),
    "in_parts": (network_without_bn, 3),
}


def _peer(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    with init_distributed("cpu") as dist:
        results = {name: train_three_steps(dist, *job) for name, job in JOBS.items()}
    results["threads"] = {name.read_text() for name in Path("/proc/self/task").glob("*/comm")}
    torch.save(results, Path(folder) / f"{rank}.pt")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """For each job, what one process and both of two processes ended with."""
    folder = tmp_path_factory.mktemp("peers")
    mp.spawn(_peer, (str(folder), free_port()), nprocs=2)
    pair = [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]
    alone = {name: train_three_steps(dist_env(), *job) for name, job in JOBS.items()}
    return {name: (alone[name], pair[0][name], pair[1][name]) for name in JOBS} | {
        "threads": pair[0]["threads"]
    }


def largest_difference(left: dict, right: dict, key: str) -> float:
    return (left[key] - right[key]).abs().max().item()


def accuracies(results: dict) -> list[float]:
    return [results[split][key] for split in ("trained", "validated") for key in ("top1", "top5")]


@pytest.mark.parametrize("job", ["without_bn", "in_parts"])
def test_without_bn_two_processes_equal_one_also_in_an_uneven_batch(outcomes, job):
    alone, first, second = outcomes[job]
    assert torch.equal(first["parameters"], second["parameters"])
    for rank in (first, second):
        assert largest_difference(alone, rank, "parameters") < 1e-12
        assert accuracies(rank) == accuracies(alone)
        for split in ("trained", "validated"):
            assert rank[split]["images"] == IMAGES
            assert abs(rank[split]["loss"] - alone[split]["loss"]) < 1e-9


def test_all_processes_compute_a_batch_in_as_many_parts(outcomes):
    # Its last batch has shares of 3 and 2 images.
    _, first, second = outcomes["in_parts"]
    assert first["training_passes"] == second["training_passes"] == 3 + 3 + 2


def test_no_thread_of_the_process_group_outlives_it(outcomes):
    # It would abort the process at its end: "terminate called without an active exception".
    assert not any("gloo" in name for name in outcomes["threads"])


def test_sync_bn_on_a_cpu_is_refused():
    with pytest.raises(UserError, match="sync_bn needs GPUs"):
        distribute(network_without_bn(), dist_env(world_size=2), sync_bn=True)


@pytest.fixture
def group_of_one(device):
    """A process group of this process alone, as `init_distributed` makes it for several."""
    store = f"tcp://127.0.0.1:{free_port()}"
    backend = "cpu:gloo,cuda:nccl"
    torch.distributed.init_process_group(backend, init_method=store, rank=0, world_size=1)
    # It says two, so that networks are wrapped and converted as for several.
    yield DistEnv(0, 2, device)
    torch.distributed.destroy_process_group()


@on_gpu
@pytest.mark.parametrize("sync_bn", [False, True])
def test_over_nccl_a_group_of_one_process_trains_as_none(group_of_one, sync_bn, device):
    images, labels = (part.to(device) for part in images_and_labels())
    batches, config = [(images, labels)] * 2, config_with()
    trained = []
    for wrapped in (False, True):
        student = step2_network().to(device)
        model = distribute(student, group_of_one, sync_bn) if wrapped else student
        optimizer = build_optimizer(student, config)
        train_one_epoch(model, None, batches, optimizer, config, TrainState())
        broadcast_buffers(student)
        trained.append(student.state_dict())
    for name, value in trained[0].items():
        torch.testing.assert_close(value, trained[1][name], rtol=1e-9, atol=1e-12, msg=name)


@on_gpu
def test_sync_bn_of_two_processes_on_a_gpu_is_bn_of_the_whole_batch(device, tmp_path):
    mp.spawn(_sync_bn_peer, (str(tmp_path), free_port()), nprocs=2)
    bn, (images, _) = nn.BatchNorm2d(3).double().to(device), images_and_labels()
    expected = bn(images.to(device)).cpu()
    shares = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    torch.testing.assert_close(torch.cat([y for y, _ in shares]), expected)
    for _, mean in shares:
        torch.testing.assert_close(mean, bn.running_mean.cpu())


def _sync_bn_peer(rank: int, folder: str, port: int) -> None:
    """Over gloo: NCCL takes no two processes on one GPU."""
    store = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    device = torch.device("cuda", 0)
    bn = distribute(nn.BatchNorm2d(3).double().to(device), DistEnv(rank, 2, device), True)
    images, _ = images_and_labels()
    with torch.no_grad():
        y = bn(images.tensor_split(2)[rank].to(device))
    torch.save((y.cpu(), bn.module.running_mean.cpu()), Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_bn_statistics_are_per_process_by_default_and_rank_0s_are_kept(outcomes):
    alone, first, second = outcomes["with_bn"]
    assert largest_difference(alone, first, "buffers") > 1e-3
    for key in ("buffers", "parameters"):
        assert torch.equal(first[key], second[key])
    for split in ("top1", "loss", "images"):
        assert first["validated"][split] == second["validated"][split]


def options(**values) -> list[str]:
    return command_line({**TINY, **values})


def test_two_processes_stopped_and_then_one_killed_end_with_the_bits_of_an_unbroken_run(
    tmp_path, image_folder
):
    shared = {"data": image_folder, "epochs": 4, "checkpoint_minutes": 0, **FROM_SCRATCH}
    whole, folder = tmp_path / "whole", tmp_path / "broken"
    unbroken = launch("step2/run.sh", *options(save=whole, **shared))
    assert unbroken.returncode == 0, unbroken.stderr
    assert "2 process(es)" in unbroken.stdout and unbroken.stdout.count("finished: best") == 1

    with start("step2/run.sh", *options(save=folder, **shared)) as running:
        wait_until((folder / NEWEST).exists)
        for number in (signal.SIGHUP, signal.SIGUSR2, signal.SIGUSR1):  # the first two end nothing
            running.send_signal(number)
            time.sleep(0.1)
        out, err = running.communicate(timeout=300)
    assert running.returncode == PREEMPTED_EXIT_CODE, err
    assert "stopped on request" in out

    with start("step2/run.sh", *options(save=folder, **shared)) as running:
        while "goes on" not in running.stdout.readline():
            pass
        kill_a_child(running.pid, lambda children: children[-1])
        out, err = running.communicate(timeout=300)
    assert running.returncode == 0, err
    assert "a process ended with code -9: all start again" in out
    assert "Traceback" not in err
    assert_same_run(whole, folder)


@pytest.mark.parametrize(("processes", "expected"), [(2, [1, 2]), (3, [3, 0, 0])])
def test_each_process_restores_its_own_sums_and_another_number_gives_all_to_rank_0(
    processes, expected
):
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    peers = [
        {
            "sums": {"sums": torch.full((5,), float(seed)), "seconds": 3.0},
            "rng": {"torch": generator.get_state(), "cuda": None},
        }
        for seed, generator in enumerate(generators, start=1)
    ]
    for rank, sums in enumerate(expected):
        state = TrainState()
        restore_mid_epoch(state, {"iteration": 5, "processes": peers}, dist_env(rank, processes))
        assert state.iteration == 5
        assert state.meter.sums.tolist() == [sums] * 5
        if processes == len(peers):
            assert torch.equal(torch.get_rng_state(), peers[rank]["rng"]["torch"])


def test_run_script_fails_with_one_sentence_and_its_exit_code(tmp_path, image_folder):
    wrong = options(data=tmp_path / "nowhere", save=tmp_path / "out")
    single = launch("step1/run.sh", *wrong, processes=1)
    assert single.returncode == 2
    assert single.stderr.startswith("error: data folder") and single.stderr.count("\n") == 1
    # Of one mistake rank 0 dies while the other waits for it, the other both meet.
    indivisible = options(data=image_folder, save=tmp_path / "out", batch_size=9)
    for arguments, words in ((wrong, "data folder"), (indivisible, "batch_size 9 is the global")):
        several = launch("step1/run.sh", *arguments, processes=2)
        assert several.returncode == 2
        assert several.stderr.count("error: ") == several.stderr.count(f"error: {words}") == 1
        assert "Traceback" not in several.stderr
    assert not (tmp_path / "out").exists()


def test_a_mistake_that_one_process_alone_meets_is_the_one_that_is_told(tmp_path, own_images):
    ((_, damaged), *_), *_ = EpochBatchSampler(len(CLASSES) * TRAIN, BATCH, 0, 1, world_size=2)
    path = own_images / "train" / CLASSES[damaged // TRAIN] / f"{damaged % TRAIN}.png"
    path.write_bytes(b"")
    run = launch("step1/run.sh", *options(data=own_images, save=tmp_path / "out"), processes=2)
    assert run.returncode == 2, run.stderr
    assert (
        run.stderr.count("error: ") == run.stderr.count(f"error: cannot decode image {path}") == 1
    )


def test_a_process_that_lost_another_tells_it_after_all_who_know_why(monkeypatch):
    def seconds_before(error: Exception, rank: int) -> float:
        def fail() -> None:
            raise error

        sleep = Mock()
        monkeypatch.setattr("utils.run.command_line.time.sleep", sleep)
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(SystemExit):
            command(fail)()
        return sum(call.args[0] for call in sleep.call_args_list)

    causes = UserError("a mistake"), WorkerLost(EOFError())
    assert [seconds_before(cause, rank=0) for cause in causes] == [0, 0]
    others = [seconds_before(cause, rank=1) for cause in causes]
    assert 0 < max(others) < min(seconds_before(PeerLost(), rank) for rank in (0, 1))


def test_one_machine_runs_one_process_per_gpu_or_as_many_as_are_asked_for():
    assert torchrun_settings({}, gpus=8) == {"PET_NPROC_PER_NODE": "8", "PET_STANDALONE": "1"}
    given = {"NPROC_PER_NODE": "2"}
    assert torchrun_settings(given, gpus=0)["PET_NPROC_PER_NODE"] == "2"
    given["PET_NPROC_PER_NODE"] = "3"  # torchrun's own variables stand above all
    assert torchrun_settings(given, gpus=4)["PET_NPROC_PER_NODE"] == "3"


def test_several_machines_are_taken_from_the_usual_variables_or_slurm(tmp_path, monkeypatch):
    given = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "1234"}
    expected = {
        "PET_NPROC_PER_NODE": "4",
        "PET_NNODES": "2",
        "PET_NODE_RANK": "1",
        "PET_MASTER_ADDR": "node0",
        "PET_MASTER_PORT": "1234",
    }
    assert torchrun_settings(given, gpus=4) == expected

    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\nprintf 'node0\\nnode1\\n'\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    slurm = {"SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "node[0-1]"}
    assert torchrun_settings(slurm, gpus=4) == expected | {"PET_MASTER_PORT": "29500"}

    with pytest.raises(SystemExit, match="MASTER_ADDR"):
        torchrun_settings({"NNODES": "2"}, gpus=1)
