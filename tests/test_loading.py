"""Loading checkpoints of every layout, and what is said of those that fit no network."""

import re
from dataclasses import asdict
from functools import partial

import golden
import pytest
import torch
from conftest import STEP2, narrow, tiny

from models import MODELS
from models.checkpoints import inference_content, load_network
from models.export.fold import fold_scales
from utils.checkpoint.checkpoint import read_checkpoint, write_checkpoint, write_released
from utils.run.config import parse_config
from utils.run.errors import UserError

NETWORKS = sorted(MODELS)
large = partial(tiny, small_images=False)


def released(state: dict) -> dict:
    keys = {f"module.{key}": value for key, value in state.items()}
    top1 = torch.tensor(70.5, dtype=torch.float64)
    return {"epoch": 255, "state_dict": keys, "best_top1_acc": top1, "optimizer": {}}


def flat(state: dict) -> dict:
    """The older layout: binary kernels `...weights`, (N, 1)."""
    return {
        f"{key}s" if "binary" in key else key: value.reshape(-1, 1) if "binary" in key else value
        for key, value in state.items()
    }


def own(name: str, state: dict) -> dict:
    config = parse_config(STEP2, ["--model", name, "--width", str(narrow(name, 1 / 16))])
    return {"state_dict": state, "epoch": 1, "config": asdict(config)}


LAYOUTS = {
    "this repo's layout": own,
    "released layout": lambda _, state: released(state),
    "released layout with flat kernels": lambda _, state: released(flat(state)),
    "state dict alone": lambda _, state: state,
    "state dict alone with flat kernels": lambda _, state: flat(state),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_layout_of_every_network_gives_the_predictions_it_came_from(name, layout, tmp_path):
    model = large(name).eval()
    path = tmp_path / "checkpoint.pth.tar"
    write_checkpoint(path, LAYOUTS[layout](name, model.state_dict()))
    is_known = "flat" in layout or "repo" in layout
    loaded = load_network(path, **({} if is_known else {"binary_weights": True}))
    assert (loaded.name, loaded.num_classes) == (name, 3)
    assert loaded.options["width"] == narrow(name, 1 / 16)
    assert loaded.checkpoint.layout == layout
    for word in (name, layout, "latent weights", "3 classes"):
        assert word in str(loaded)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded.model(images), model(images))


@pytest.mark.parametrize("case", ["reactnet_a_step2", "reactnet_r18_step2", "bireal_r18_step2"])
def test_a_file_of_the_released_layout_predicts_as_the_released_code(case, tmp_path):
    """Built from the layout file alone: keys, shapes and order are the released ones."""
    numbers, layout = golden.read(case), golden.read_layout(case)
    state = {
        key: golden.fill_value(key, torch.Size(shape), numbers["salt"] + j)
        for j, (key, shape) in enumerate(layout.items())
    }
    path = tmp_path / "released.pth.tar"
    write_checkpoint(path, released(state))
    loaded = load_network(path, binary_weights=True)
    assert loaded.name == case.removesuffix("_step2")
    model = loaded.model.double()
    model.load_state_dict(state)
    with torch.no_grad():
        logits = model(golden.images(numbers))
    assert abs(logits.norm().item() / numbers["eval_logits_norm"] - 1) < 1e-8


def test_a_file_of_bcdnet_predicts_with_the_mean_of_its_two_heads(tmp_path):
    model = large("bcdnet_a").eval()
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    state["module.fc_dist.weight"] = -model.fc.weight.detach()
    state["module.fc_dist.bias"] = model.fc.bias.detach() + 2
    path = tmp_path / "bcdnet.pth.tar"
    torch.save({"model": state, "last_iter": 1, "optimizer": {}}, path)
    loaded = load_network(path, binary_weights=True)
    assert loaded.name == "bcdnet_a" and "two heads, averaged" in str(loaded)
    logits = loaded.model(torch.randn(2, 3, 64, 64))
    torch.testing.assert_close(logits, (model.fc.bias + 1).expand(2, 3))


def test_exact_weights_are_recognized(tmp_path):
    model = fold_scales(large("reactnet_r18"))
    path = tmp_path / "exact.pth.tar"
    write_checkpoint(path, released(model.state_dict()))
    loaded = load_network(path)
    assert loaded.options["binary_weights"] and loaded.has_exact_weights
    assert "exact +-1 weights" in str(loaded)


def test_gpu_tensors_load_without_a_gpu(tmp_path, monkeypatch):
    model = large("bireal_r18")
    path = tmp_path / "gpu.pth.tar"
    # A storage tagged as CUDA's is what a file written on a GPU holds.
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    torch.save(released(model.state_dict()), path)
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(path, weights_only=True)
    loaded = load_network(path, binary_weights=True)
    assert torch.equal(loaded.model.fc.weight, model.fc.weight)


def test_a_file_that_does_not_tell_step_1_from_step_2_is_not_guessed(tmp_path):
    path = tmp_path / "file"
    write_checkpoint(path, released(large("reactnet_a").state_dict()))
    with pytest.raises(UserError, match="pass --binary_weights false if its weights are real"):
        load_network(path)
    real = load_network(path, binary_weights=False)
    assert "real weights" in str(real)


def test_a_file_that_tells_is_not_overruled(tmp_path):
    path = tmp_path / "file"
    write_checkpoint(path, own("reactnet_a", large("reactnet_a").state_dict()))
    with pytest.raises(UserError, match="was trained with binary_weights True, not False"):
        load_network(path, binary_weights=False)


def test_flat_kernels_which_only_step_2_has_are_not_overruled(tmp_path):
    path = tmp_path / "file"
    write_checkpoint(path, released(flat(large("reactnet_a").state_dict())))
    with pytest.raises(UserError, match="was trained with binary_weights True, not False"):
        load_network(path, binary_weights=False)
    loaded = load_network(path, binary_activations=False)
    assert not loaded.options["binary_activations"]


def test_another_architecture_names_the_closest_and_what_does_not_fit(tmp_path):
    from torchvision.models import resnet18

    path = tmp_path / "resnet18.pth"
    torch.save(resnet18().state_dict(), path)
    with pytest.raises(UserError) as caught:
        load_network(path)
    sentence = str(caught.value)
    assert "closest is bireal_r18" in sentence and "\n" not in sentence
    assert re.search(r"lacks \d+ \(layer1.0.binary_conv.weight", sentence)
    assert "has 71 left over (layer1.0.conv1.weight" in sentence


def test_released_layout_round_trip_is_bit_identical(tmp_path):
    state = large("reactnet_a").state_dict()
    first, back = tmp_path / "own", tmp_path / "released"
    write_checkpoint(first, own("reactnet_a", state) | {"best_top1_acc": 70.123456789})
    write_released(read_checkpoint(first), back)
    raw = torch.load(back, weights_only=True)
    assert set(raw) == {"epoch", "state_dict", "best_top1_acc", "optimizer"}
    assert list(raw["state_dict"]) == [f"module.{key}" for key in state]
    again = read_checkpoint(back)
    assert all(torch.equal(again.state[key], state[key]) for key in state)
    assert (again.epoch, again.top1) == (1, 70.123456789)


@pytest.mark.parametrize("network", [None, {"model": "reactnet_a"}, {"model": 3, "width": "x"}])
def test_a_converted_file_that_tells_its_network_wrongly_is_one_sentence(tmp_path, network):
    path = tmp_path / "file"
    write_checkpoint(path, {"state_dict": large("reactnet_a").state_dict(), "network": network})
    with pytest.raises(UserError, match="does not tell its network"):
        load_network(path)


def test_a_converted_file_tells_its_network_even_where_the_source_could_not(tmp_path):
    source, converted = tmp_path / "source", tmp_path / "converted"
    write_checkpoint(source, released(large("reactnet_r18", small_images=True).state_dict()))
    loaded = load_network(source, binary_weights=True, small_images=True)
    state = fold_scales(loaded.model).state_dict()
    write_checkpoint(converted, {"state_dict": state, **inference_content(loaded)})
    again = load_network(converted)
    assert again.options["small_images"] and again.checkpoint.epoch == 255
