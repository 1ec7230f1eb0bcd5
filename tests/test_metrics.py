"""Metrics of binary networks: against values counted by hand, then recounted over whole runs."""

import itertools

import pytest
import torch
from compare import difference
from conftest import FROM_SCRATCH, ITERATIONS
from torch import nn

from models import MODELS, build_model
from utils import metrics
from utils.binarize import Sign
from utils.checkpoint.checkpoint import NEWEST, read_checkpoint
from utils.metrics import BinaryMetrics
from utils.run.errors import UserError
from utils.run.logging import read_records


def layers(*rows):
    return {f"layer{i}": torch.tensor(row) for i, row in enumerate(rows)}


def test_flip_flop_ratio_counts_changed_signs_over_all_layers():
    before = metrics.signs(layers([0.5, -0.5, 0.0, -0.0], [1.0, -1.0]))
    after = metrics.signs(layers([-0.5, -0.1, -1e-9, 3.0], [1.0, 1.0]))
    assert metrics.ff_ratio(before, before) == 0
    assert metrics.ff_ratio(before, after) == 3 / 6  # +- 0 count as +1


def test_c2i_is_one_for_unchanged_signs_and_zero_for_all_flipped():
    first = metrics.signs(layers([1.0, -1.0, 1.0, -1.0]))
    last = metrics.signs(layers([1.0, -1.0, -1.0, -1.0]))
    opposite = {name: ~sign for name, sign in first.items()}
    assert metrics.c2i_ratio(first, last) == 0.75
    assert (metrics.c2i_ratio(first, first), metrics.c2i_ratio(first, opposite)) == (1, 0)


def test_cam_and_sdam_of_a_hand_made_kernel():
    weight = torch.tensor([[1.0, -3.0], [0.0, 4.0], [-5.0, 5.0]]).reshape(3, 2, 1, 1)
    assert metrics.channel_absolute_mean(weight).tolist() == [2, 2, 5]
    assert metrics.sdam(weight) == pytest.approx(2**0.5)


def test_saturation_leaves_the_bound_out():
    assert metrics.saturation(torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.0001])) == pytest.approx(2 / 5)


def test_histogram_counts_every_weight_once_and_outliers_at_the_ends():
    weight = torch.tensor([-9.0, -0.9, -0.1, 0.1, 0.1, 9.0])
    assert metrics.histogram(weight, bins=4, limit=1.0).tolist() == [2, 1, 2, 1]


@pytest.mark.parametrize("binary_weights", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_latent_weights_are_those_of_the_binary_layers_in_both_steps(name, binary_weights):
    with torch.device("meta"):
        model = build_model(name, binary_weights=binary_weights)
    weights = metrics.latent_weights(model)
    expected = {"reactnet_a": (31, 28_253_184), "bcdnet_a": (55, 43_981_824)}
    expected |= {"meliusnet29": (48, 10_321_920)}
    counts = len(weights), sum(w.numel() for w in weights.values())
    assert counts == expected.get(name, (16, 10_985_472))


def test_saturation_is_measured_where_each_sign_looks():
    model = nn.Sequential(nn.Identity(), Sign(), nn.BatchNorm2d(1), Sign())
    model[2].bias.data.fill_(5.0)
    images = torch.tensor([-2.0, -0.5, 0.5, 0.7]).reshape(1, 1, 2, 2)
    model.train()
    assert metrics.at_signs(model, images, metrics.saturation) == {"1": 0.25, "3": 1.0}
    assert model.training and not model[1]._forward_pre_hooks
    assert model[2].num_batches_tracked == 0


def test_networks_without_binary_layers_say_so():
    with pytest.raises(UserError, match="no layers with latent weights"):
        metrics.latent_weights(nn.Linear(2, 2))
    with pytest.raises(UserError, match="no binary activations"):
        metrics.at_signs(nn.Conv2d(3, 1, 1), torch.zeros(1, 3, 2, 2), metrics.saturation)


# Whole runs, against a naive recount over the weights after every iteration


@pytest.fixture
def snapshots(monkeypatch):
    """The latent weights at the start of a run and after each of its iterations."""
    weights = []
    start, step = BinaryMetrics.set_initial_signs, BinaryMetrics.on_step_end

    def snapshot(metrics_of_run):
        latent = metrics.latent_weights(metrics_of_run.model)
        weights.append({name: weight.clone() for name, weight in latent.items()})

    def set_initial_signs(self):
        start(self)
        weights.clear()
        snapshot(self)

    def on_step_end(self, state):
        step(self, state)
        snapshot(self)

    monkeypatch.setattr(BinaryMetrics, "set_initial_signs", set_initial_signs)
    monkeypatch.setattr(BinaryMetrics, "on_step_end", on_step_end)
    return weights


def flipped(before, after, layers) -> float:
    pairs = [(before[name].flatten().tolist(), after[name].flatten().tolist()) for name in layers]
    changed = [(a < 0) != (b < 0) for x, y in pairs for a, b in zip(x, y, strict=True)]
    return sum(changed) / len(changed)


@pytest.mark.parametrize("step", [1, 2])
def test_ff_and_c2i_agree_with_a_naive_recount(run_step, tmp_path, snapshots, step):
    assert run_step(step, schedule="textbook", **FROM_SCRATCH).code == 0
    records = read_records(tmp_path / f"step{step}")
    assert len(snapshots) == 1 + 2 * ITERATIONS  # the start, and the iterations of 2 epochs
    for epoch, record in enumerate(records):
        steps = snapshots[ITERATIONS * epoch : ITERATIONS * (epoch + 1) + 1]
        every = list(steps[0])
        for layers, result in [(every, record), *(([n], record["layers"][n]) for n in every)]:
            ratios = [flipped(*pair, layers) for pair in itertools.pairwise(steps)]
            assert result["ff_ratio"] == pytest.approx(sum(ratios) / ITERATIONS, rel=1e-12)
            unchanged = 1 - flipped(snapshots[0], steps[-1], layers)
            assert result["c2i_ratio"] == pytest.approx(unchanged, rel=1e-12)
    assert records[0]["ff_ratio"] > 0 and records[1]["c2i_ratio"] < 1


def test_records_hold_every_layer_and_saturation_on_the_fixed_batch(run_step, tmp_path):
    run_step(1)
    record = read_records(tmp_path / "step1")[-1]
    state = read_checkpoint(tmp_path / "step1" / NEWEST).state
    assert len(record["layers"]) == 31
    assert len(record["saturation"]) == 26  # two Signs in each of 13 blocks
    assert all(0 <= share <= 1 for share in record["saturation"].values())
    for name, layer in record["layers"].items():
        weight = state[f"{name}.weight"]
        assert layer["smallest_cam"] == weight.abs().mean(dim=(1, 2, 3)).min().item()
        assert sum(layer["latent_histogram"]) == weight.numel()


def test_measuring_changes_no_weight_and_is_left_out_if_asked_or_nothing_is_binary(
    run_step, tmp_path
):
    for name in ("true", "false"):
        run_step(1, live_measures=name, save=tmp_path / name)
    run_step(1, binary_activations="false", save=tmp_path / "real")
    for name in ("false", "real"):
        assert "ff_ratio" not in read_records(tmp_path / name)[0]
    left, right = (read_checkpoint(tmp_path / name / NEWEST).state for name in ("true", "false"))
    assert not difference(left, right)
