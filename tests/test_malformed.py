"""What someone got wrong ends with one sentence, or is no matter; never with a traceback."""

import sys
from pathlib import Path

import pytest
from apart import leftovers, run_apart
from conftest import CLASSES, ROOT, TINY
from hypothesis import given, settings
from malformed import drawn, mistakes, options, wrong_folders

from scripts.check_data import main as check_data
from step1.train import main as step1
from step2.train import main as step2
from utils.run.command_line import one_sentence
from utils.run.config import parse_config
from utils.run.errors import UserError
from utils.data.shapes import draw_set

BASE = {**TINY, "epochs": 1, "data": "images", "save": "out", "init_from": "none"}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("right") / "images"
    draw_set(folder, CLASSES, {"train": 4, "val": 3}, "{}.jpg")
    return folder


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(mistake=mistakes(BASE))
def test_a_malformed_configuration_is_read_or_refused_in_one_sentence(tmp_path_factory, mistake):
    folder = tmp_path_factory.mktemp("mistake")
    arguments = mistake.write(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for step in ("step1", "step2"):
            try:
                parse_config(ROOT / step / "config.yaml", arguments)
            except UserError as error:
                assert one_sentence(error).isprintable()
            except SystemExit as exit:
                assert exit.code == 0 and "--help" in arguments


def test_a_run_with_a_malformed_configuration_ends_clearly(tmp_path, images):
    for number, mistake in enumerate(drawn(mistakes(BASE), 30, 0)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "images").symlink_to(images)
        ended = run_apart((step1, step2)[number % 2], mistake.write(folder), folder)
        assert not ended.complaint(), mistake
        assert not leftovers(folder / "out"), mistake


def test_a_malformed_folder_is_trained_on_or_told_and_checked_alike(tmp_path, images):
    for number, wrong in enumerate(drawn(wrong_folders(), 20, 0)):
        folder = tmp_path / str(number)
        folder.mkdir()
        wrong.write(images, folder / "images")
        trained = run_apart(step1, options(BASE), folder)
        checked = run_apart(check_data, ["images", "--workers", "1", "--classes"], folder)
        assert not trained.complaint(), wrong
        assert not checked.complaint(), wrong
        assert trained.code == checked.code, wrong
        assert not leftovers(folder / "out"), wrong


def test_faults_made_by_hypothesis_need_its_package(run_script, monkeypatch):
    monkeypatch.delitem(sys.modules, "tests.malformed", raising=False)
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    result = run_script("fault_injection", "--faults", "folder")
    result.assert_one_sentence("need the package hypothesis", "requirements-test.txt")
