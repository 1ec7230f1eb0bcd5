"""Live measures of whole runs against a naive recount over the weights after every iteration."""

import itertools
import json

import pytest
import torch

from utils import live, measures
from utils.checkpoint.checkpoint import NEWEST, read_checkpoint


@pytest.fixture
def snapshots(monkeypatch):
    """The latent weights at the start of a run and after each of its iterations."""
    kept = []
    create, step = live.BinaryMetrics.__init__, live.BinaryMetrics.after_step

    def snapshot(self):
        kept.append({n: w.clone() for n, w in measures.latent_weights(self.model).items()})

    def create_and_keep(self, *arguments):
        create(self, *arguments)
        snapshot(self)

    def step_and_keep(self):
        step(self)
        snapshot(self)

    monkeypatch.setattr(live.BinaryMetrics, "__init__", create_and_keep)
    monkeypatch.setattr(live.BinaryMetrics, "after_step", step_and_keep)
    return kept


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def flipped(before, after, layers) -> tuple[int, int]:
    pairs = [(before[name].flatten().tolist(), after[name].flatten().tolist()) for name in layers]
    changed = sum((a < 0) != (b < 0) for x, y in pairs for a, b in zip(x, y, strict=True))
    return changed, sum(len(x) for x, _ in pairs)


@pytest.mark.parametrize("step", [1, 2])
def test_ff_and_c2i_agree_with_a_naive_recount(run_step, tmp_path, snapshots, step):
    options = {"init_from": "none", "latent_init": "symmetric", "schedule": "textbook"}
    assert run_step(step, learning_rate=0.01, **options).code == 0
    found = records(tmp_path / f"step{step}")
    assert len(snapshots) == 1 + 2 * 3  # the start, and 3 iterations in each of 2 epochs
    for epoch, record in enumerate(found):
        steps = snapshots[3 * epoch : 3 * epoch + 4]
        every = list(steps[0])
        for layers, told in [(every, record), *(([n], record["layers"][n]) for n in every)]:
            ratios = []
            for before, after in itertools.pairwise(steps):
                changed, total = flipped(before, after, layers)
                ratios.append(changed / total)
            assert told["ff_ratio"] == pytest.approx(sum(ratios) / 3, rel=1e-12)
            changed, total = flipped(snapshots[0], steps[-1], layers)
            assert told["c2i_ratio"] == pytest.approx(1 - changed / total, rel=1e-12)
    assert found[0]["ff_ratio"] > 0 and found[1]["c2i_ratio"] < 1


def test_a_continued_run_counts_c2i_from_the_first_start(run_step, tmp_path):
    options = {"init_from": "none", "latent_init": "symmetric", "learning_rate": 0.01}
    run_step(2, **options)
    newest = tmp_path / "step2" / NEWEST
    packed = read_checkpoint(newest).content["measures"]["initial_signs"]
    assert all(bits.dtype == torch.uint8 for bits in packed.values())
    # Two epochs more of the same run: settings must be the same, so the length is edited in.
    content = torch.load(newest, weights_only=True)
    content["config"]["epochs"] = 4
    torch.save(content, newest)
    run_step(2, epochs=4, **options)
    again = read_checkpoint(newest).content["measures"]["initial_signs"]
    assert all(torch.equal(packed[name], again[name]) for name in packed)
    assert len(records(tmp_path / "step2")) == 4


def test_records_hold_every_layer_and_saturation_on_the_fixed_batch(run_step, tmp_path):
    run_step(1)
    record = records(tmp_path / "step1")[-1]
    assert len(record["layers"]) == 31
    assert len(record["saturation"]) == 26  # two Signs in each of 13 blocks
    assert all(0 <= share <= 1 for share in record["saturation"].values())
    for name, layer in record["layers"].items():
        weight = read_checkpoint(tmp_path / "step1" / NEWEST).state[f"{name}.weight"]
        assert layer["smallest_cam"] == weight.abs().mean(dim=(1, 2, 3)).min().item()
        assert sum(layer["latent_histogram"]) == weight.numel()


@pytest.mark.parametrize(
    "options", [{"live_measures": "false"}, {"binary_activations": "false"}], ids=["off", "real"]
)
def test_nothing_is_measured_when_off_or_where_nothing_is_binary(run_step, tmp_path, options):
    assert run_step(1, **options).code == 0
    assert "ff_ratio" not in records(tmp_path / "step1")[0]


def test_curves_hold_measures_and_histograms(run_step, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_step(1)
    events = EventAccumulator(str(tmp_path / "step1" / "tensorboard"))
    events.Reload()
    scalars = events.Tags()["scalars"]
    assert {"ff_ratio", "c2i_ratio", "layers/feature.1.binary_3x3/sdam"} <= set(scalars)
    assert "layers/feature.1.binary_3x3/latent_histogram" in events.Tags()["histograms"]


def test_measuring_changes_no_weight(run_step, tmp_path):
    for name, on in (("on", "true"), ("off", "false")):
        run_step(1, live_measures=on, save=tmp_path / name)
    left, right = (read_checkpoint(tmp_path / name / NEWEST).state for name in ("on", "off"))
    assert all(torch.equal(left[key], right[key]) for key in left)
