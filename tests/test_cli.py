"""The command line from end to end, with tiny settings."""

import io
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastmaml
from fastmaml.cli import main, train
from fastmaml.training import load_checkpoint

TINY = ["--meta-batch", "2", "--threads", "1"]
CLASSES = {"images_background": 964, "images_evaluation": 659}


@pytest.fixture(scope="module")
def omniglot(tmp_path_factory):
    """As many characters as the real data set has, two noisy drawings of each, zipped."""
    root = tmp_path_factory.mktemp("data")
    (root / "omniglot-py").mkdir()
    random = np.random.default_rng(0)
    for part, classes in CLASSES.items():
        with zipfile.ZipFile(root / "omniglot-py" / f"{part}.zip", "w") as archive:
            for character in range(classes):
                for drawing in range(2):
                    file = io.BytesIO()
                    Image.fromarray(random.random((105, 105)) > 0.2).save(file, "png")
                    name = f"{part}/Made/character{character:04d}/{drawing}.png"
                    archive.writestr(name, file.getvalue())
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def workplace(tmp_path, cache, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTMAML_CACHE", str(cache))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def accuracies(text):
    return re.findall(r"(\d+\.\d+) % ± (\d+\.\d+)", text)


def test_the_module_is_the_command():
    command = [sys.executable, "-m", "fastmaml", "info"]
    folder = Path(fastmaml.__file__).parents[1]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert re.search(rf"^fastmaml +{re.escape(fastmaml.__version__)}$", run.stdout, re.MULTILINE)


def test_info_tells_what_is_in_use(capsys, monkeypatch):
    monkeypatch.delenv("FASTMAML_BACKEND", raising=False)
    assert main(["info"]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[:6])
    assert rows["torch"] == torch.__version__
    assert rows["backend"].startswith("cpu")
    assert rows["threads"].startswith(f"{torch.get_num_threads()} of ")
    monkeypatch.setenv("FASTMAML_BACKEND", "reference")
    main(["info"])
    output = capsys.readouterr().out
    assert re.search(r"^backend +reference$", output, re.MULTILINE)
    isa = fastmaml._core.info()["isa"]
    assert re.search(rf"^core isa +{isa}$", output, re.MULTILINE)


def test_demo_repeats_its_figures_and_draws_a_picture(tmp_path, capsys):
    command = ["demo", "--iterations", "3", "--tasks", "4", "--threads", "1", "--seed", "3"]
    assert main([*command, "--out", "one.png"]) == 0
    first = capsys.readouterr().out
    assert main([*command, "--out", "two.png"]) == 0
    second = capsys.readouterr().out
    assert len(accuracies(first)) == 2
    assert accuracies(first) == accuracies(second)
    assert "held-out classes, 4 tasks" in first
    assert "Georgian" in first
    with Image.open("one.png") as one, Image.open("two.png") as two:
        assert one.width > 1000
        assert one.height > 600
        pixels = np.asarray(one.convert("RGB"))
        assert np.array_equal(pixels, np.asarray(two.convert("RGB")))
    for colour in ((26, 152, 80), (215, 48, 39)):  # right and wrong answers are both framed
        assert (pixels == colour).all(axis=-1).sum() > 500


def test_train_resume_and_evaluate_omniglot(omniglot, capsys):
    command = ["train", "omniglot", "--data", str(omniglot), *TINY, "--test-tasks", "4"]
    assert main([*command, "--iterations", "4", "--checkpoint", "straight.pt"]) == 0
    straight = capsys.readouterr().out
    assert "on 423 held-out classes, 4 tasks" in straight
    assert len(accuracies(straight)) == 2

    assert main([*command, "--iterations", "2"]) == 0
    assert load_checkpoint("omniglot-5way-1shot.pt").iteration == 2
    assert main([*command, "--iterations", "4", "--resume"]) == 0
    resumed = capsys.readouterr().out
    assert accuracies(resumed)[-2:] == accuracies(straight)
    one, two = load_checkpoint("straight.pt"), load_checkpoint("omniglot-5way-1shot.pt")
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, b)

    assert main(["evaluate", "straight.pt", "--tasks", "4", "--data", str(omniglot)]) == 0
    assert accuracies(capsys.readouterr().out) == accuracies(straight)


def test_the_options_reach_the_recipe(omniglot):
    options = "--ways 3 --queries 1 --inner-lr 0.1 --steps 2 --test-steps 4 --lr 0.01 --seed 7"
    flags = ["--first-order", "--no-rotations", "--model", "fc", "--validate-every", "1"]
    flags += ["--algorithm", "anil", "--train-shots", "1", "--inner-batch", "3", "--anneal", "9"]
    flags += ["--inner-optimizer", "adam", "--optimizer", "sgd", "--device", "cpu"]
    command = ["train", "omniglot", "--data", str(omniglot), *TINY, *options.split(), *flags]
    assert main([*command, "--iterations", "1", "--test-tasks", "2"]) == 0
    trainer = load_checkpoint("omniglot-3way-1shot.pt")
    assert vars(trainer.recipe) == {
        "dataset": "omniglot",
        "ways": 3,
        "shots": 1,
        "queries": 1,
        "inner_lr": 0.1,
        "steps": 2,
        "test_steps": 4,
        "meta_batch": 2,
        "lr": 0.01,
        "first_order": True,
        "rotations": False,
        "model": "fc",
        "algorithm": "anil",
        "seed": 7,
        "train_shots": 1,
        "inner_batch": 3,
        "inner_optimizer": "adam",
        "optimizer": "sgd",
        "anneal": 9,
    }
    assert trainer.history[0]["iteration"] == 1


def test_interrupted_training_says_how_to_go_on(omniglot, capsys, monkeypatch):
    monkeypatch.setattr(train, "train", lambda *_, **__: 2)
    command = ["train", "omniglot", "--data", str(omniglot), *TINY]
    assert main(command) == 130
    assert "the same command with --resume goes on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--iterations", "2"], r"run\.pt exists; add --resume .* or name another file"),
        (["--resume", "--inner-lr", "0.5"], r"inner_lr must be 0\.4, as in checkpoint .* got 0\.5"),
    ],
)
def test_an_old_checkpoint_is_not_overwritten(omniglot, capsys, options, message):
    command = ["train", "omniglot", "--data", str(omniglot), *TINY, "--checkpoint", "run.pt"]
    main([*command, "--iterations", "1", "--test-tasks", "1"])
    capsys.readouterr()
    assert main([*command, *options]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert load_checkpoint("run.pt").iteration == 1


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train", "omniglot"], "data must name the folder that holds omniglot-py, got none"),
        (["train", "omniglot", "--data", "nowhere"], "images_background.zip"),
        (["train", "glyphs", "--shots", "20"], "has 20 images, fewer than the 21 that"),
        (
            ["train", "glyphs", "--ways", "190"],
            "validation classes: ways must be at most",
        ),
        (["train", "glyphs", "--inner-batch", "7"], "inner_batch must divide the 5 support"),
        (["train", "glyphs", "--checkpoint", "."], "is a folder; name a file in it"),
        (["demo", "--out", "/dev/null/demo.png"], "/dev/null/demo.png cannot be written"),
        (["evaluate", "none.pt"], "none.pt does not exist"),
    ],
)
def test_mistakes_get_one_line(capsys, command, message):
    assert main(command) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("fastmaml: ")
    assert error.count("\n") == 1
    assert not list(Path().glob("*.pt"))


def test_an_instruction_set_that_is_not_there_gets_one_line():
    run = subprocess.run(
        [sys.executable, "-m", "fastmaml", "info"],
        env={**os.environ, "FASTMAML_ISA": "sse9"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert run.stderr.startswith("fastmaml: FASTMAML_ISA must name an instruction set")
    assert run.stderr.count("\n") == 1


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"fastmaml {fastmaml.__version__}\n"


@pytest.mark.parametrize(
    "options",
    [["--ways", "0"], ["--lr", "-1"], ["--model", "vit"], ["--validate-every", "-1"], []],
)
def test_argparse_refuses_bad_values(options):
    command = ["train", "omniglot", *options] if options else []
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == 2


def test_a_device_that_is_not_there(capsys):
    with pytest.raises(SystemExit):
        main(["train", "glyphs", "--device", "gpu"])
    assert "argument --device: must be cpu or cuda, got gpu" in capsys.readouterr().err
