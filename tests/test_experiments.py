"""Experiments: their files, the runner, the drawings, and what goes wrong with them."""

import json
import os
import signal
import time
from multiprocessing import Pipe, active_children
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import TINY, command_line, dist_env
from filelock import FileLock
from process import wait_until

import scripts.experiments.__main__ as runner
from scripts.experiments.measures import MEASURES, next_step
from scripts.experiments.plots import DRAWINGS, bar, mean_and_margin
from scripts.experiments.spec import (
    SCALES,
    Experiment,
    experiment_names,
    read_experiment,
    resolve_runs,
)
from scripts.experiments.table import read_table
from scripts.experiments.workers import Worker, train, train_on_all_gpus
from utils.checkpoint.checkpoint import BEST, NEWEST, read_checkpoint
from utils.run.errors import UserError

TABLES_AND_FIGURES = {*(f"table{n}" for n in range(1, 5)), *(f"fig{n}" for n in range(1, 9))}
EXPERIMENTS = TABLES_AND_FIGURES | {"table1_epochs", "fig34_layers", "beyond1", "precision", "scan"}


@pytest.fixture
def options(image_folder) -> list[str]:
    """The smallest runs, on the test's images."""
    return command_line({**TINY, "data": image_folder, "width": 1 / 16, "epochs": 1})


@pytest.fixture
def experiment(run_script, options, tmp_path):
    common = ("--quick", "--out", tmp_path, *options)
    return lambda names, *more: run_script("experiments.__main__", *names.split(), *common, *more)


def test_there_is_one_file_for_each_table_and_figure_and_all_can_be_measured_and_drawn():
    assert set(experiment_names()) == EXPERIMENTS > set(DRAWINGS)
    assert {read_experiment(name, "small").measure for name in experiment_names()} == set(MEASURES)


@pytest.mark.parametrize("scale", SCALES)
def test_every_experiment_resolves(scale, tmp_path):
    for name in EXPERIMENTS:
        experiment = read_experiment(name, scale)
        runs = resolve_runs(experiment, scale, range(2), tmp_path, [])
        once = sum(options.get("seeds") == 1 for options in experiment.runs.values())
        assert len({run.folder for run in runs}) == len(runs) == 2 * len(experiment.runs) - once
        best = {None: None}  # of the runs so far
        for run in runs:
            after = experiment.runs[run.name].get("after")
            assert run.config.init_from == best[after and (after, run.seed)]
            best[run.name, run.seed] = str(run.folder / BEST)


def test_experiments_share_a_run_of_the_same_settings_and_no_other(tmp_path):
    def digest(name, run, *options):
        runs = resolve_runs(read_experiment(name, "small"), "small", range(1), tmp_path, options)
        return next(r.digest for r in runs if r.name == run)

    adam = digest("fig2", "binary, Adam")
    assert adam == digest("fig7", "Adam one-step") == digest("table1", "one-step, 0")
    assert adam != digest("fig2", "binary, SGD")
    assert adam != digest("fig2", "binary, Adam", "--data", "/elsewhere")
    assert adam != digest("fig2", "binary, Adam", "--val_dir", "test")
    assert adam == digest("fig2", "binary, Adam", "--workers", "3")
    two_step = digest("table1", "two-step, low -> 0")
    assert two_step == digest("fig7", "Adam two-step") != digest("table1", "two-step, high -> 0")
    assert two_step == digest("table4", "activations first (BABW)")
    assert two_step != digest("table4", "activations first (BABW), taught")


def test_a_run_may_learn_from_another_last_longer_and_have_fewer_seeds(tmp_path):
    def resolved(out):
        experiment, seeds = read_experiment("table4", "quick"), range(100, 102)
        runs = resolve_runs(experiment, "quick", seeds, out, ["--epochs", "3"])
        return {(run.name, run.seed): run for run in runs}

    runs = resolved(tmp_path)
    teacher, taught = runs["teacher", 100], runs["weights first (BWBA), taught", 101]
    assert ("teacher", 101) not in runs
    assert taught.parents == [runs["weights first, step 1, taught", 101], teacher]
    assert taught.config.teacher == str(teacher.folder / BEST)
    assert runs["one-step, twice as long", 100].config.epochs == 6
    elsewhere = resolved(tmp_path / "elsewhere").values()
    assert [run.folder.name for run in elsewhere] == [run.folder.name for run in runs.values()]


def test_runs_of_a_seed_learn_from_the_teacher_of_that_seed(tmp_path):
    family = {"big": {"step": 1, "width": 1.0}, "taught": {"step": 2, "teacher": "big"}}
    experiment = Experiment(title="", measure="results", runs=family)
    runs = resolve_runs(experiment, "quick", range(2), tmp_path, [])
    assert [(*run.parents, None)[0] for run in runs] == [None, runs[0], None, runs[2]]


def test_a_runs_own_options_go_over_those_of_its_variants():
    runs = read_experiment("fig8", "imagenet").runs
    rates = [float(own["learning_rate"]) for own in runs.values() if own.get("optimizer") == "SGD"]
    assert rates == [2e-3, 5e-3, 1e-2, 5e-2, 1e-1, 2e-1]


def test_a_figure_of_checkpoints_end_to_end_and_again_without_training(experiment, tmp_path):
    result = experiment("fig4")
    assert result.code == 0, result.err
    rows = read_table(tmp_path / "fig4.csv")
    assert [row["source"] for row in rows] == 2 * 4 * ["measured"] + 2 * ["published"]
    assert all(float(row["cam"]) > 0 and float(row["update_cam"]) >= 0 for row in rows[:8])
    assert [row["sdam"] for row in rows[8:]] == ["0.006227", "0.005558"]
    assert (tmp_path / "fig4.png").read_bytes().startswith(b"\x89PNG")

    logs = {path: path.read_text() for path in tmp_path.glob("runs/*/log.txt")}
    assert len(logs) == 2
    assert experiment("fig4", "--jobs", 2, "--out", tmp_path / "two").code == 0
    for name in ("fig4.csv", "fig4.png"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / name).read_bytes()
    assert experiment("fig5 fig3 fig34_layers fig2", "--finished").code == 0
    lines = (tmp_path / "fig4.csv").read_text().replace("Adam,0,", "Adam,1,")  # no seed in common
    (tmp_path / "two" / "fig4.csv").write_text(lines)
    assert experiment("fig4", "--redraw", "--out", tmp_path / "two").code == 0
    pictures = {path.stem for path in tmp_path.glob("*.png")}
    assert pictures == {"fig2", "fig3", "fig34_layers", "fig4", "fig5"}
    binary = [row for row in read_table(tmp_path / "fig2.csv") if row["source"] == "measured"]
    assert [row["run"] for row in binary] == ["binary, Adam", "binary, SGD"]  # and nothing trained
    assert all(0 <= float(row["fixed_train_top1"]) <= 100 for row in binary)
    assert {path: path.read_text() for path in tmp_path.glob("runs/*/log.txt")} == logs


def test_the_next_step_is_that_of_the_run_in_its_memory_layout(options, tmp_path):
    runs = {
        f"fused {fused}": {"step": 2, "optimizer_options": {"fused": fused}} for fused in (0, 1)
    }
    experiment = Experiment(title="", measure="kernels", runs=runs)
    layout = ["--channels_last", "true", "--width", "0.125", "--epochs", "2"]
    steps = []
    for run in resolve_runs(experiment, "quick", [0], tmp_path, [*options, *layout]):
        train(run)
        before, after, _ = next_step(run, dist_env())
        steps.append({name: after[name] - before[name] for name in before})
    for name, plain in steps[0].items():
        assert plain.any()
        torch.testing.assert_close(steps[1][name], plain, rtol=1e-2, atol=1e-4)


def test_loading_processes_end_with_their_run(options, tmp_path):
    run, _ = with_folders(read_experiment("fig4", "quick"), [*options, "--workers", "1"], tmp_path)
    train(run)
    assert run.is_finished()
    wait_until(lambda: not active_children())  # under torch 2.11 they take a moment
    assert not active_children()


def test_a_mean_has_an_interval_from_three_seeds_on():
    two, three = np.array([1.0, 2.0]), np.array([1.0, 2.0, 3.0])
    assert (mean_and_margin(two), bar(two)) == ("1.50", 0)
    assert (mean_and_margin(three), round(bar(three), 2)) == ("2.00 ± 2.48", 2.48)


def test_of_two_nodes_sgd_stalls_in_y_and_adam_crosses(experiment, tmp_path):
    result = experiment("fig6")
    assert result.code == 0, result.err
    rows = read_table(tmp_path / "fig6.csv")
    assert all((row["x"], row["y"]) == ("0.1", "2.4") for row in rows if row["step"] == "0")
    last = [row for row in rows if row["step"] == "1000"]
    assert [row["run"] for row in last] == 5 * ["SGD", "Adam"]
    assert all((float(row["y"]) > 1) == (row["run"] == "SGD") for row in last)
    assert all(float(row["x"]) < -1 and abs(float(row["y"])) > 1 for row in last)
    assert (tmp_path / "fig6.png").exists()


def test_an_interrupted_grid_goes_on_and_a_changed_one_starts_anew(experiment, tmp_path):
    first = experiment("fig1")
    assert first.code == 0, first.err
    assert first.out.count("25 of 25 points") == 4
    table = tmp_path / "fig1.csv"
    rows, lines = read_table(table), table.read_text().splitlines(keepends=True)
    table.write_text("".join(lines[:8]))
    second = experiment("fig1")
    assert "real-valued, BN frozen: 18 of 25" in second.out
    assert "binary, BN frozen: 25 of 25" in second.out
    assert read_table(table) == rows

    centre = [row for row in rows if row["batch_norm"] == "frozen" and row["distance"] == "0"]
    assert all(row["rise"] == "0" for row in centre)
    for row, run in zip(centre, ("real-valued", "binary"), strict=True):
        history = read_checkpoint(next(tmp_path.glob(f"runs/{run}-*")) / NEWEST).content["history"]
        assert float(row["loss"]) == pytest.approx(history[-1]["val_loss"], rel=1e-4)


def test_unknown_experiment_scale_and_option_list_what_there_is(experiment):
    experiment("fig9").assert_one_sentence("unknown experiment 'fig9'", "fig1", "table4")
    experiment("fig2", "--scale", "huge").assert_one_sentence("small", "imagenet")
    experiment("fig2", "--momentum", "1").assert_one_sentence("--momentum", "--epochs")
    experiment("fig6", "--momentum", "1").assert_one_sentence("--momentum", "--epochs")
    experiment("fig8", "--learning_rate", "1").assert_one_sentence("--learning_rate", "'Adam 1'")


def test_a_run_that_stops_says_which_and_why(experiment, tmp_path):
    result = experiment("fig4", "--data", tmp_path / "nowhere")
    for run in ("SGD", "Adam"):  # the first does not stop the second
        result.assert_one_sentence(f"run '{run}', seed 0, stopped: data folder {tmp_path}/nowhere")
    assert not (tmp_path / "fig4.csv").exists()


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """Names of the runs whose training was started, each of which ends at once."""
    names = []

    class EndsAtOnce(Worker):
        def start(self, run, lock) -> None:
            names.append(run.name)
            self.run, self.lock, self.process = run, lock, Mock()
            self.connection, end = Pipe()
            if run.name != "bad":
                finish(run)
            end.send("bad stopped" if run.name == "bad" else "")

    monkeypatch.setattr(runner, "Worker", EndsAtOnce)
    monkeypatch.setattr(runner, "POLL_SECONDS", 0)
    return names


def finish(run, record="{}", epochs=None) -> None:
    (run.folder / "metrics.jsonl").write_text(f"{record}\n" * (epochs or run.config.epochs))


def with_folders(experiment, options, out) -> list:
    runs = resolve_runs(experiment, "quick", range(1), out, options)
    for run in runs:
        run.folder.mkdir()
    return runs


def test_a_run_that_another_command_trains_is_waited_for_after_all_others(
    options, tmp_path, monkeypatch, capsys, trained
):
    runs = with_folders(read_experiment("fig7", "quick"), options, tmp_path)
    shared = next(run for run in runs if run.name == "Adam step 1")
    lock = FileLock(shared.folder / runner.LOCK)
    lock.acquire()

    def end_there(_):
        if f"waiting for another command to train {shared.folder}" in capsys.readouterr().out:
            assert len(trained) == len(runs) - 2  # all but it and its child
            finish(shared)
            lock.release()

    monkeypatch.setattr(runner.time, "sleep", end_there)
    assert runner.train_missing(runs) == []
    assert shared.name not in trained and trained[-1] == "Adam two-step"
    assert all(run.is_finished() for run in runs)


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_run_that_stops_takes_only_its_descendants_along(options, tmp_path, trained, jobs):
    family = {
        "bad": {"step": 1},
        "good": {"step": 1, "label_smoothing": 0.1},
        "child": {"step": 2, "after": "bad"},
        "grandchild": {"step": 2, "after": "child", "label_smoothing": 0.1},
        "other": {"step": 2, "after": "good"},
    }
    experiment = Experiment(title="", measure="results", runs=family)
    runs = with_folders(experiment, options, tmp_path)
    problems = ["run 'bad', seed 0, stopped: bad stopped"]
    assert runner.train_missing(runs, jobs) == problems
    assert trained == ["bad", "good", "other"]
    assert runner.train_missing(runs, jobs) == problems
    assert trained[3:] == ["bad"]


@pytest.mark.parametrize("signals", [[signal.SIGKILL], [signal.SIGTERM]])
def test_a_worker_survives_a_lost_process_and_saves_a_run_that_is_to_stop(
    options, tmp_path, signals
):
    family = {"long": {"step": 1}, "short": {"step": 1, "label_smoothing": 0.1}}
    experiment = Experiment(title="", measure="results", runs=family)
    long, short = with_folders(experiment, [*options, "--epochs", "500"], tmp_path)
    worker = Worker(0, of=2)
    worker.start(long, FileLock(long.folder / runner.LOCK))
    while not long.records():
        time.sleep(0.01)
    os.kill(worker.process.pid, *signals)
    reason = "process ended with code -9" if signals == [signal.SIGKILL] else "after"
    assert reason in worker.result()
    done = len(long.records())
    worker.start(short, FileLock(short.folder / runner.LOCK))
    while not short.records():
        time.sleep(0.01)
    worker.interrupt()
    worker.close()
    assert not worker.process.is_alive()
    iterations = read_checkpoint(short.folder / NEWEST).content["unfinished"]["iteration"]
    assert len(long.records()) == done < 500 and iterations > 0


def test_a_run_that_several_processes_train_says_why_it_stopped(options, tmp_path, monkeypatch):
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    family = Experiment(title="", measure="results", runs={"odd": {"step": 1}})
    (run,) = with_folders(family, [*options, "--batch_size", "9"], tmp_path)
    with pytest.raises(RuntimeError, match=r"^batch_size 9 is the global batch"):
        train_on_all_gpus(run)


def test_progress_tells_the_hours_left_from_the_epochs_recorded(options, tmp_path):
    runs = with_folders(read_experiment("fig4", "quick"), [*options, "--epochs", "10"], tmp_path)
    speeds = {"train_images": 900, "train_images_per_second": 1, "val_images": 0}
    record = json.dumps(speeds | {"val_images_per_second": 1})
    assert "0 of 20 epochs, time left not known yet" in runner.progress(runs, 2)
    finish(runs[0], record, epochs=4)
    # 16 epochs of 900 s on 2 cores.
    assert runner.progress(runs, jobs=2) == "0 of 2 runs, 4 of 20 epochs, 2.0 h left"
    finish(runs[0], record)
    assert runner.progress(runs, jobs=1) == "1 of 2 runs, 10 of 20 epochs, 2.5 h left"


def test_a_table_that_is_missing_damaged_or_without_a_needed_column_is_one_sentence(
    experiment, tmp_path
):
    (tmp_path / "fig8.csv").write_text("source,run,top1\nmeasured,Adam 1,50\n")
    experiment("fig8", "--redraw").assert_one_sentence("no column 'optimizer'")
    experiment("fig5", "--redraw").assert_one_sentence("cannot read", "fig5.csv")
    damaged = "source,optimizer,learning_rate,top1\nmeasured,SGD,0.1,5O\n"
    (tmp_path / "fig8.csv").write_text(damaged)
    experiment("fig8", "--redraw").assert_one_sentence("fig8.csv is incomplete")
    (tmp_path / "fig7.csv").write_text("source,run\npublished,Adam one-step\n")
    experiment("fig7", "--redraw").assert_one_sentence("fig7.csv has no measured row")
    assert not list(tmp_path.glob("*.png"))


def test_an_unknown_key_of_an_experiment_file_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("scripts.experiments.spec.EXPERIMENTS", tmp_path)
    (tmp_path / "mine.yaml").write_text("title: t\nclaim: c\nmeasure: results\nrun: {}\n")
    with pytest.raises(UserError, match="experiment mine has the unknown key run"):
        read_experiment("mine", "small")
