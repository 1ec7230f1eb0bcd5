"""Configuration: types, ranges, unknown names, where relative paths count from."""

from pathlib import Path

import pytest
from conftest import ROOT, STEP1, STEP2

from utils.run.config import as_yaml, from_saved, parse_config
from utils.run.errors import UserError


def test_steps_hold_the_released_recipe():
    step1, step2 = parse_config(STEP1, []), parse_config(STEP2, [])
    for config in (step1, step2):
        assert (config.model, config.width, config.teacher) == ("reactnet_a", 1.0, "resnet34")
        assert (config.batch_size, config.epochs, config.learning_rate) == (256, 256, 1.25e-3)
        assert (config.image_size, config.val_resize, config.crop_scale) == (224, 256, 0.08)
        assert (config.schedule, config.lighting, config.decay_group) == ("released",) * 3
        assert (config.activation_ste, config.latent_init) == (None, "positive")
        assert config.binary_activations and not config.sync_bn
    assert (step1.binary_weights, step1.weight_decay, step1.init_from) == (False, 5e-6, None)
    assert (step2.binary_weights, step2.weight_decay) == (True, 0)
    assert step2.init_from == str(ROOT / "step1" / "out" / "model_best.pth.tar")
    assert (step1.save, step2.save) == (str(ROOT / "step1/out"), str(ROOT / "step2/out"))


def test_command_line_overrides_the_given_file_which_overrides_the_step(tmp_path):
    (tmp_path / "mine.yaml").write_text("epochs: 3\nweight_decay: 5e-6\n")
    config = parse_config(STEP2, ["--config", str(tmp_path / "mine.yaml"), "--epochs", "4"])
    assert (config.epochs, config.weight_decay, config.batch_size) == (4, 5e-6, 256)


def test_relative_paths_count_from_the_file_or_from_the_command(tmp_path, monkeypatch):
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "mine.yaml").write_text("data: ../images\nteacher: teacher.pth.tar\n")
    monkeypatch.chdir(tmp_path)
    config = parse_config(STEP1, ["--config", "configs/mine.yaml", "--save", "runs/a"])
    assert config.data == str(tmp_path / "images")
    assert config.teacher == str(folder / "teacher.pth.tar")
    assert config.save == str(tmp_path / "runs" / "a")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("data", "shapes", "shapes"),
        ("teacher", "resnet18", "resnet18"),
        ("teacher", "none", None),
        ("init_from", "none", None),
        ("sync_bn", "true", True),
        ("weight_decay", "-1e-4", -1e-4),
        ("optimizer_options", "{betas: [0, 0.9], eps: 1e-5}", {"betas": [0, 0.9], "eps": 1e-5}),
        ("save", "2021", str(Path.cwd() / "2021")),
    ],
)
def test_text_on_the_command_line_is_read_as_the_type_of_its_field(name, text, value):
    assert getattr(parse_config(STEP2, [f"--{name}", text]), name) == value


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--momentum", "0.9"], ["--momentum", "--learning_rate"]),
        (["--epoch", "3"], ["--epoch', perhaps epochs:", "--epochs"]),
        (["--epochs"], ["epochs", "expected one argument"]),
        (["--epochs", "2.5"], ["epochs must be a whole number", "2.5"]),
        (["--epochs", "0"], ["epochs must be at least 1"]),
        (["--epochs", "true"], ["epochs must be a whole number"]),
        (["--learning_rate", "fast"], ["learning_rate must be a finite number", "fast"]),
        (["--learning_rate", "nan"], ["learning_rate must be a finite number"]),
        (["--weight_decay", "inf"], ["weight_decay must be a finite number"]),
        (["--binary_weights", "2"], ["binary_weights must be true or false"]),
        (["--crop_scale", "1.5"], ["crop_scale must be at most 1"]),
        (["--label_smoothing", "1"], ["label_smoothing must be below 1"]),
        (["--schedule", "linear"], ["schedule must be one of released, textbook"]),
        (["--label_smoothing", "0.1"], ["label_smoothing acts on labels"]),
        (["--image_size", "288"], ["val_resize 256 is smaller than the image_size 288"]),
        (["--keep_epochs", "3"], ["keep_epochs must be a list", "3"]),
        (["--keep_epochs", "[0, -1]"], ["keep_epochs must be whole numbers from 0"]),
        (["--seed", "9223372036854775808"], ["seed must be at most"]),
        (["--optimizer_options", "0.9"], ["optimizer_options must be a mapping"]),
        (["--config", "missing.yaml"], ["cannot read configuration", "missing.yaml"]),
    ],
)
def test_wrong_option_is_one_sentence_with_its_name(arguments, words):
    assert_refused(arguments, words)


def assert_refused(arguments, words):
    with pytest.raises(UserError) as caught:
        parse_config(STEP1, arguments)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epoch: 3", ["unknown option 'epoch'", "epochs"]),
        ("epochs: three", ["epochs must be a whole number"]),
        ("learning_rate:", ["learning_rate must be a finite number"]),
        ("- epochs", ["must hold one `name: value` per line"]),
        ("", ["must hold one `name: value` per line"]),
        ("1: 2", ["must hold one `name: value` per line"]),
        ("epochs: [3", ["is not YAML"]),
        ("epochs: 3\nepochs: 4", ["is not YAML", "'epochs' stands twice"]),
        ("epochs: 2001-99-99", ["is not YAML", "month must be in 1..12"]),
    ],
)
def test_wrong_yaml_is_one_sentence(tmp_path, text, words):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    assert_refused(["--config", str(path)], words)


def test_recipe_without_a_required_field_names_it(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(STEP1.read_text().replace("epochs: 256", ""))
    with pytest.raises(UserError, match="lacks epochs"):
        parse_config(path, [])


def test_resolved_configuration_reads_back_as_itself(tmp_path):
    config = parse_config(STEP2, ["--weight_decay", "5e-6", "--data", "shapes"])
    path = tmp_path / "config.yaml"
    path.write_text(as_yaml(config))
    assert parse_config(path, []) == config


def test_only_settings_that_change_the_result_forbid_a_continuation():
    config = parse_config(STEP1, [])
    other = parse_config(STEP1, ["--data", "elsewhere", "--workers", "1", "--epochs", "3"])
    assert config.differences(vars(other)) == ["epochs 256 (there 3)"]
    # Another place may hold the same; another built-in set, or a start from nothing, does not.
    first = parse_config(STEP2, ["--data", "shapes", "--init_from", "a.pth"])
    moved = parse_config(STEP2, ["--data", "shapes", "--init_from", "b.pth"])
    other = parse_config(STEP2, ["--data", "cifar10", "--init_from", "none"])
    assert first.differences(vars(moved)) == []
    named = [difference.split()[0] for difference in first.differences(vars(other))]
    assert named == ["data", "init_from"]


def test_saved_configuration_is_checked_like_any_other():
    with pytest.raises(UserError, match="carries no configuration"):
        from_saved(None, "file")
    with pytest.raises(UserError, match="unknown option"):
        from_saved({"epoch": 3}, "file")
