"""Files that earlier versions of this repo wrote are still read, evaluated and continued.

`old_files` holds a run of the version before the packages `utils/data`, `checkpoint` and `run`,
stopped by SIGTERM in its second epoch, and a packed file of it.
"""

import shutil
from pathlib import Path

import torch
from compare import position
from conftest import FROM_SCRATCH, STEP2

from models.checkpoints import load_network
from utils.checkpoint.checkpoint import NEWEST, read_checkpoint
from utils.run.config import parse_config
from utils.run.logging import read_records

OLD = Path(__file__).parent / "old_files"


def test_an_old_checkpoint_within_an_epoch_is_continued(run_step, tmp_path):
    folder = tmp_path / "step2"
    shutil.copytree(OLD, folder)
    assert position(folder / NEWEST) == (0, 2)
    (first,) = read_records(OLD)
    result = run_step(2, model="bireal_r18", epochs=3, **FROM_SCRATCH)
    assert result.code == 0, result.err
    assert "weights start from epoch 0 and 2 iterations of this run" in result.out
    assert position(folder / NEWEST) == (2, 0)
    records = read_records(folder)
    assert records[0] == first
    assert [record["epoch"] for record in records] == [0, 1, 2]
    assert [record["train_images"] for record in records] == [24] * 3


def test_old_records_and_the_old_resolved_configuration_are_read():
    content = read_checkpoint(OLD / NEWEST).content
    assert read_records(OLD) == content["history"]
    config = parse_config(STEP2, ["--config", str(OLD / "config.yaml")])
    assert (config.model, config.width, config.batch_size) == ("bireal_r18", 1 / 32, 8)
    assert not config.differences(content["config"])


def test_an_old_packed_file_is_evaluated(run_script, image_folder):
    loaded = load_network(OLD / "packed.safetensors")
    assert loaded.has_exact_weights and loaded.name == "bireal_r18" and loaded.num_classes == 3
    assert loaded.model(torch.zeros(1, 3, 16, 16)).isfinite().all()
    arguments = ("--data", image_folder, "--workers", "0")
    result = run_script("evaluate", OLD / "packed.safetensors", *arguments)
    assert result.code == 0, result.err
    (first,) = read_records(OLD)
    assert f"{first['val_top1']:.2f}" in result.out
