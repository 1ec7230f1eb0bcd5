"""The commands for a checkpoint in hand: evaluate, inspect, convert, count, summarize."""

import csv
import hashlib
import json
import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import CLASSES, ROOT, VAL, launch, narrow, write_images

from scripts import convert
from scripts.evaluate import intervals
from utils import engine
from utils.checkpoint.checkpoint import BEST, NEWEST, read_checkpoint, write_released

COUNT = len(CLASSES) * VAL
SUFFIXES = {"exact": ".pth.tar", "packed": ".safetensors", "onnx": ".onnx", "openvino": ".xml"}


@pytest.fixture
def trained(run_step, tmp_path) -> Path:
    """A binary checkpoint, trained for two epochs."""
    assert run_step(2, init_from="none", latent_init="symmetric", learning_rate=1e-2).code == 0
    return tmp_path / "step2" / BEST


@pytest.fixture
def evaluate(run_script, image_folder):
    def run(file, *options, data=image_folder):
        return run_script("evaluate", file, "--data", data, "--workers", 0, *options)

    return run


@pytest.fixture
def results(evaluate):
    """What `evaluate --json` prints, as a dict."""

    def run(file, *options, **data):
        result = evaluate(file, "--json", *options, **data)
        assert result.code == 0, result.err
        return json.loads(result.out)

    return run


@pytest.fixture
def converted(run_script, tmp_path):
    """A file converted to a form."""

    def run(source, form):
        path = tmp_path / f"{form}{SUFFIXES[form]}"
        result = run_script("convert", source, "--to", form, "--output", path)
        assert result.code == 0, result.err
        assert "predictions equal" in result.out and f"wrote {path}" in result.out
        return path

    return run


def test_evaluation_repeats_the_validation_of_training(trained, results):
    result = results(trained)
    best = max(read_checkpoint(trained).content["history"], key=lambda r: r["val_top1"])
    assert (result["top1"], result["top5"]) == (best["val_top1"], best["val_top5"])
    assert result["loss"] == pytest.approx(best["val_loss"], rel=1e-6)
    assert result["images"] == COUNT
    for name in ("top1", "top5", "loss"):
        low, high = result[f"{name}_interval"]
        assert low <= result[name] <= high
    assert "reactnet_a" in result["network"] and "latent weights" in result["network"]
    assert results(trained, "--val_per_class", 1)["images"] == len(CLASSES)


@pytest.mark.parametrize("name", ["reactnet_a", "real_to_binary_r18", "meliusnet29", "bcdnet_a"])
def test_every_form_of_a_network_from_both_steps_predicts_as_its_checkpoint(
    run_step, converted, results, tmp_path, name
):
    for package in ("openvino", "onnxruntime"):
        pytest.importorskip(package)
    network = {"model": name, "width": narrow(name, 1 / 32), "epochs": 1}
    step1, step2 = (tmp_path / step / BEST for step in ("step1", "step2"))
    assert run_step(1, **network).code == 0
    assert run_step(2, **network, init_from=step1).code == 0
    source = step2
    for form in SUFFIXES:
        written = converted(source, form)
        compared = results(step2, "--against", written, "--precision", "float64")
        # The engines compute in float32, where a near-tie may go to the other class.
        assert compared["same_class"] >= COUNT - (form in ("onnx", "openvino"))
        assert compared["logit_difference"] < 1e-5
        after = results(written)
        assert after["images"] == COUNT
        assert "exact +-1 weights" in after["network"] or after["network"] == str(written)
        if form == "packed":
            source = written  # of which the engines' forms are made
    assert source.stat().st_size < step2.stat().st_size / 3
    exact, packed = (read_checkpoint(path).state for path in (tmp_path / "exact.pth.tar", source))
    assert all(torch.equal(packed[key], value) for key, value in exact.items())


def test_an_openvino_network_has_no_settings_of_a_checkpoint(trained, evaluate, converted):
    pytest.importorskip("openvino")
    path = converted(trained, "openvino")
    released = "--save_released", path.with_name("released")
    for options in (("--precision", "bfloat16"), ("--compile",), ("--channels_last",), released):
        evaluate(path, *options).assert_one_sentence("computes in float32", "leave --precision")
    compared = evaluate(trained, "--against", path, "--precision", "float64")
    assert f"same class for {COUNT} of {COUNT} images" in compared.out
    path.with_suffix(".bin").write_bytes(b"")
    evaluate(path).assert_one_sentence("damaged")


def test_every_form_classifies_by_class_names(trained, converted, run_script, image_folder):
    pytest.importorskip("openvino")
    packed, graph = converted(trained, "packed"), converted(trained, "openvino")
    pictures = [image_folder / "val" / name / "0.png" for name in CLASSES]
    for file in (trained, packed, graph):
        result = run_script("classify", file, *pictures, "--classes", image_folder / "train")
        assert result.code == 0, result.err
        lines = result.out.splitlines()
        assert len(lines) == len(pictures) * (1 + len(CLASSES))
        assert lines[0].startswith(f"{pictures[0]}: ") and lines[0].endswith(" ms")
        percents = [float(line.split()[0]) for line in lines[1 : 1 + len(CLASSES)]]
        assert percents == sorted(percents, reverse=True)
        assert sum(percents) == pytest.approx(100, 0.01)
        assert {line.split()[-1] for line in lines[1 : 1 + len(CLASSES)]} == set(CLASSES)
    assert "class 2" in run_script("classify", packed, pictures[0]).out


def test_classification_refuses_what_it_cannot_read(trained, run_script, image_folder, tmp_path):
    picture = image_folder / "val" / CLASSES[0] / "0.png"
    text = tmp_path / "text.png"
    text.write_text("no image")
    run_script("classify", trained, text).assert_one_sentence("cannot decode image", "text.png")
    missing = run_script("classify", trained, tmp_path / "cat.png")
    missing.assert_one_sentence("cannot read image", "cat.png: No such file")
    run_script("classify", trained, tmp_path / "none.png").assert_one_sentence("none.png")
    wrong = ("classify", trained, picture, "--classes", tmp_path)
    run_script(*wrong).assert_one_sentence("has 3 classes and", "train/")
    nowhere = ("classify", trained, picture, "--classes", tmp_path / "none")
    run_script(*nowhere).assert_one_sentence("cannot list", "No such file")


def test_networks_that_predict_differently_are_compared(trained, evaluate, results, tmp_path):
    content = read_checkpoint(trained).content
    content["state_dict"]["fc.bias"] = torch.tensor([100.0, 0.0, 0.0])
    torch.save(content, tmp_path / "other.pth.tar")
    assert results(trained, "--against", trained)["same_class"] == COUNT
    result = results(trained, "--against", tmp_path / "other.pth.tar")
    assert result["same_class"] < COUNT
    assert result["logit_difference"] == pytest.approx(100 / 3, rel=0.1)
    evaluate(trained, "--against", tmp_path / "none").assert_one_sentence("does not exist")


def test_evaluation_computes_in_the_precision_and_layout_asked_for_and_compiled(
    trained, results, image_folder, monkeypatch
):
    models, original = [], engine.evaluate

    def evaluate(model, batches, *options):
        models.append(model)
        return original(model, batches, *options)

    monkeypatch.setattr(engine, "evaluate", evaluate)
    # Traced as ever, without the minutes of generating code.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    float32, bfloat16 = results(trained), results(trained, "--precision", "bfloat16")
    by_name = ("--classes", image_folder / "train", "--against", trained)
    fast = results(trained, "--precision", "bfloat16", "--compile", "--channels_last", *by_name)
    assert fast["same_class"] == COUNT and fast["logit_difference"] == 0
    assert fast["loss"] == pytest.approx(bfloat16["loss"], rel=1e-6) != float32["loss"]
    eager, _, compiled = models
    assert hasattr(compiled, "_orig_mod") and not hasattr(eager, "_orig_mod")
    kernel = compiled.feature[0].conv1.weight
    assert kernel.is_contiguous(memory_format=torch.channels_last) and not kernel.is_contiguous()


@pytest.mark.parametrize(("precision", "allowed"), [("float32", False), ("tf32", True)])
def test_evaluation_in_float32_uses_no_tf32(trained, evaluate, precision, allowed):
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = not allowed
    assert evaluate(trained, "--precision", precision).code == 0
    assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == allowed


def test_intervals_are_wilsons_and_the_normal_one():
    bounds = intervals({"images": 10, "top1": 80.0, "top5": 100.0, "loss": 2.0}, loss_deviation=0.5)
    assert bounds["top1_interval"] == pytest.approx([49.02, 94.33], abs=0.005)
    assert bounds["top5_interval"] == pytest.approx([72.25, 100], abs=0.005)
    half = 1.96 * 0.5 / math.sqrt(10)
    assert bounds["loss_interval"] == pytest.approx([2 - half, 2 + half], abs=1e-5)


def test_expected_accuracy_is_checked_against_the_interval(trained, evaluate, results):
    low, high = results(trained)["top1_interval"]
    assert evaluate(trained, "--expect", (low + high) / 2).code == 0
    evaluate(trained, "--expect", high + 1).assert_one_sentence("is outside of", f"{high:.2f}")


def test_file_saved_in_the_released_layout_evaluates_the_same(trained, evaluate, results, tmp_path):
    path = tmp_path / "released.pth.tar"
    before = results(trained, "--save_released", path)
    sizes = ("--image_size", 16, "--val_resize", 16, "--small_images", "true")
    after = results(path, "--binary_weights", "true", *sizes)
    assert before["loss"] == after["loss"]
    assert "released layout" in after["network"]
    evaluate(trained, "--save_released", path).assert_one_sentence("exists and is kept", "--force")
    assert evaluate(trained, "--save_released", path, "--force").code == 0


def test_last_line_of_an_evaluation_names_file_result_and_command(trained, evaluate, results):
    digest = hashlib.sha256(trained.read_bytes()).hexdigest()
    line = evaluate(trained).out.splitlines()[-1]
    top1 = f"top-1 {results(trained)['top1']:.2f} %"
    assert line.startswith(f"report: sha256 {digest}, {top1}, {COUNT} images, python ")
    assert f" {trained} --data " in line


def test_on_a_part_of_the_classes_only_their_logits_count(trained, results, image_folder, tmp_path):
    part = write_images(tmp_path / "part", ("star", "bars"))
    content = read_checkpoint(trained).content
    for name in ("fc.weight", "fc.bias"):
        head = content["state_dict"][name]
        content["state_dict"][name] = head[[CLASSES.index("bars"), CLASSES.index("star")]]
    small = tmp_path / "small.pth.tar"
    torch.save(content, small)
    by_name = ("--classes", image_folder / "train", "--against", trained)
    result, expected = results(trained, *by_name, data=part), results(small, data=part)
    assert result["images"] == result["same_class"] == 2 * VAL
    for name in ("top1", "top5", "loss"):
        assert result[name] == pytest.approx(expected[name])


def test_classes_that_the_network_lacks_are_named(trained, evaluate, image_folder, tmp_path):
    other = write_images(tmp_path / "other", ("bars", "ring", "cross"))
    train = image_folder / "train"
    result = evaluate(trained, "--classes", train, data=other)
    result.assert_one_sentence("2 of the data's 3 classes", "cross, ring", str(train))
    result = evaluate(trained, "--classes", tmp_path / "other", data=other)
    result.assert_one_sentence("has 3 classes and", "2 folders", "train/")


def test_evaluation_refuses_what_it_cannot_answer(trained, evaluate, tmp_path, run_script):
    two = write_images(tmp_path / "two", ("bars", "disc"))
    evaluate(trained, data=two).assert_one_sentence("has 3 classes and the data 2", "--classes")
    evaluate(tmp_path / "missing").assert_one_sentence("does not exist")
    evaluate(trained, data=tmp_path / "none").assert_one_sentence("does not exist", "--data")
    evaluate(trained, "--momentum", 1).assert_one_sentence("--momentum")
    evaluate(trained, "--binary_weights", "maybe").assert_one_sentence("true or false")
    evaluate(trained, "--binary_weights", "false").assert_one_sentence("was trained with")
    half = tmp_path / "half"
    half.write_bytes(trained.read_bytes()[: trained.stat().st_size // 2])
    evaluate(half).assert_one_sentence("damaged or truncated")
    run_script("inspect_checkpoint", half).assert_one_sentence("damaged or truncated")


def test_too_little_memory_is_one_sentence(trained, evaluate, monkeypatch):
    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 9 GiB")

    monkeypatch.setattr(engine, "evaluate", too_large)
    evaluate(trained).assert_one_sentence("out of memory", "smaller batch")


def test_training_from_exact_weights_warns_that_their_signs_hardly_flip(
    trained, converted, run_step, tmp_path
):
    packed = converted(trained, "packed")
    warning = "warning: all latent weights are -1 or +1"
    for path, warns in ((trained, False), (packed, True)):
        result = run_step(2, init_from=path, save=tmp_path / str(warns), epochs=1)
        assert result.code == 0 and (warning in result.out) is warns, result.err


def test_inspection_shows_network_layout_and_every_binary_layer(trained, converted, run_script):
    exact = converted(trained, "exact")
    checkpoint = read_checkpoint(trained)
    for file, is_exact in ((trained, "no"), (exact, "yes")):
        title, _, _, *rows = run_script("inspect_checkpoint", file).out.splitlines()
        assert title.startswith("reactnet_a") and "this repo's layout" in title
        assert len(rows) == 31
        for row in rows:
            layer, shape, positive, scales, exactly, _ = (c.strip() for c in row.split("|")[1:-1])
            weight = checkpoint.state[f"{layer}.weight"].double()
            assert shape == "x".join(map(str, weight.shape)) and exactly == is_exact
            assert positive == f"{100 * (weight >= 0).double().mean():.2f}"
            expected = weight.abs().flatten(1).mean(1) if file == trained else torch.ones(1)
            assert scales == f"{expected.min():.3g} to {expected.max():.3g}"
    assert checkpoint.digest in run_script("inspect_checkpoint", trained).out


def test_inspection_of_real_weights_says_so(run_step, run_script, tmp_path):
    run_step(1, epochs=1)
    newest = tmp_path / "step1" / NEWEST
    result = run_script("inspect_checkpoint", newest)
    assert result.code == 0 and "no layer is binary" in result.out
    # The released layout does not tell step 1 from step 2; inspecting does not need to know.
    released = tmp_path / "released.pth.tar"
    write_released(read_checkpoint(newest), released)
    assert "feature.1.binary_3x3" in run_script("inspect_checkpoint", released).out


def test_conversion_refuses_what_would_lose_something(trained, run_script, run_step, tmp_path):
    output = tmp_path / "output.pth.tar"
    output.write_text("mine")
    convert = ("convert", trained, "--to", "exact", "--output", output)
    run_script(*convert).assert_one_sentence("exists and is kept", "--force")
    assert output.read_text() == "mine"
    assert run_script(*convert, "--force").code == 0

    for form in ("packed", "onnx", "openvino"):
        named = ("convert", trained, "--to", form, "--output", tmp_path / "network.bin")
        run_script(*named).assert_one_sentence(f"named *{SUFFIXES[form]}")
    disguised = ("convert", trained, "--to", "exact", "--output", tmp_path / "network.onnx")
    run_script(*disguised).assert_one_sentence("for --to exact is named *.pth.tar")
    (tmp_path / "network.bin").write_text("mine")
    beside = ("convert", trained, "--to", "openvino", "--output", tmp_path / "network.xml")
    run_script(*beside).assert_one_sentence("network.bin exists and is kept")
    unused = ("convert", trained, "--to", "exact", "--output", tmp_path / "e", "--dtype", "float16")
    run_script(*unused).assert_one_sentence("--dtype is not for --to exact")
    run_script(*beside, "--force", "--batch", 0).assert_one_sentence("a whole number above 0")
    nowhere = ("convert", trained, "--to", "exact", "--output", tmp_path / "none" / "x")
    run_script(*nowhere).assert_one_sentence("cannot write")
    run_step(1, epochs=1)
    real = ("convert", tmp_path / "step1" / NEWEST, "--to", "exact", "--output", tmp_path / "r")
    run_script(*real).assert_one_sentence("real weights")
    assert not (tmp_path / "r").exists()


def test_a_conversion_that_predicts_otherwise_is_refused_and_replaces_no_file(
    trained, run_script, tmp_path, monkeypatch
):
    fold = convert.fold_scales

    def scaled(model):
        model = fold(model)
        model.fc.weight.data *= 1.1  # which leaves most predictions as they are
        return model

    monkeypatch.setattr(convert, "fold_scales", scaled)
    output = tmp_path / "output.safetensors"
    to_packed = ("--to", "packed", "--dtype", "float16", "--output", output)
    output.write_text("the one before")
    failed = run_script("convert", trained, *to_packed, "--force")
    failed.assert_one_sentence("predicts differently and is not kept")
    assert output.read_text() == "the one before" and not list(tmp_path.glob(".output*"))


def test_counts_are_printed_as_text_csv_and_json(run_script):
    text = run_script("count_ops", "reactnet_a").out
    assert re.search(r"\| total +\| 29,343,592 \|", text.splitlines()[-1])
    as_csv = run_script("count_ops", "reactnet_a", "--format", "csv").out
    *layers, whole = csv.DictReader(as_csv.splitlines())
    assert whole["ops"] == "87126016" and len(layers) > 31
    rows = json.loads(run_script("count_ops", "reactnet_a", "--format", "json").out)
    assert rows[-1]["bops"] == sum(row["bops"] for row in rows[:-1]) == 4_816_896_000
    run_script("count_ops", "resnet50").assert_one_sentence("unknown model", "reactnet_a", "bireal")


def test_a_reader_that_has_seen_enough_is_no_error():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, ROOT / "scripts" / "count_ops.py", "bireal_r18"]
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (result.returncode, result.stderr) == (1, "")


def test_summary_is_a_table_and_a_picture(trained, run_script, tmp_path):
    picture = tmp_path / "curves.png"
    result = run_script("summarize", "--picture", picture, f"step 2={trained.parent}")
    assert result.code == 0, result.err
    assert "step 2" in result.out and picture.read_bytes().startswith(b"\x89PNG")
    run_script("summarize", "--picture", picture, "folder").assert_one_sentence("NAME=RUN_FOLDER")
    no_run = run_script("summarize", "--picture", picture, f"a={tmp_path}")
    no_run.assert_one_sentence("is not the folder of a run")


def test_two_processes_evaluate_as_one(trained, results, image_folder):
    alone = results(trained, "--batch_size", 4)
    options = ("--data", image_folder, "--json", "--batch_size", 4)
    run = launch("scripts/evaluate.py", trained, *options)
    assert run.returncode == 0, run.stderr
    together = json.loads(run.stdout)
    for name in ("top1", "top5", "images"):
        assert together[name] == alone[name]
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-6)
