"""A user's mistake ends with one sentence, or does not matter; never with a traceback."""

from pathlib import Path

import pytest
from conftest import CLASSES, STEP1, STEP2, TINY, command_line
from hypothesis import Phase, given, settings
from process import leftovers, run_in_process
from strategies import mistakes, unfit, wrong_folders

from scripts.check_data import main as check_data
from step1.train import main as step1
from step2.train import main as step2
from utils.data.shapes import draw_set
from utils.run.command_line import one_sentence
from utils.run.config import parse_config
from utils.run.errors import UserError

BASE = {**TINY, "epochs": 1, "data": "images", "save": "out", "init_from": "none"}
REPEATABLE = settings(deadline=None, derandomize=True, database=None, phases=[Phase.generate])


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("right") / "images"
    draw_set(folder, CLASSES, {"train": 4, "val": 3}, "{}.jpg")
    return folder


@settings(REPEATABLE, max_examples=300)
@given(mistake=mistakes(BASE))
def test_a_malformed_configuration_is_read_or_refused_in_one_sentence(tmp_path_factory, mistake):
    folder = tmp_path_factory.mktemp("mistake")
    arguments = mistake.write(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for recipe in (STEP1, STEP2):
            try:
                parse_config(recipe, arguments)
            except UserError as error:
                assert one_sentence(error).isprintable()
            except SystemExit as exit:
                assert exit.code == 0 and "--help" in arguments


@settings(REPEATABLE, max_examples=30)
@given(mistake=unfit(BASE))
def test_a_run_with_a_malformed_configuration_ends_clearly(tmp_path_factory, images, mistake):
    folder = tmp_path_factory.mktemp("mistake")
    (folder / "images").symlink_to(images)
    step = step1 if len(mistake.content) % 2 else step2
    result = run_in_process(step, mistake.write(folder), folder)
    assert not result.problem()
    assert not leftovers(folder / "out")


@settings(REPEATABLE, max_examples=20)
@given(wrong=wrong_folders())
def test_a_malformed_folder_is_trained_on_or_refused_and_checked_alike(
    tmp_path_factory, images, wrong
):
    folder = tmp_path_factory.mktemp("wrong")
    wrong.write(images, folder / "images")
    trained = run_in_process(step1, command_line(BASE), folder)
    checked = run_in_process(check_data, ["images", "--workers", "1", "--classes"], folder)
    assert not trained.problem()
    assert not checked.problem()
    assert trained.code == checked.code
    assert not leftovers(folder / "out")
