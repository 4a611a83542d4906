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
from fastmaml.training import Recipe, load_checkpoint
from fastmaml.training.recipe import ALGORITHMS

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


@pytest.mark.parametrize("module", ["fastmaml", "fastmaml.cli"])
def test_the_module_is_the_command(module):
    command = [sys.executable, "-m", module, "info"]
    folder = Path(fastmaml.__file__).parents[1]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert re.search(rf"^fastmaml +{re.escape(fastmaml.__version__)}$", run.stdout, re.MULTILINE)


def test_a_result_is_printed_in_whatever_encoding_there_is(monkeypatch):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii"))
    command = "train glyphs --model fc --meta-batch 1 --iterations 1 --test-tasks 2 --test-steps 1"
    assert main(command.split()) == 0
    sys.stdout.flush()
    assert re.search(rb" % \? \d+\.\d\d\n", printed.getvalue())


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
    core = fastmaml._core.info()
    isa, compiled = core["isa"], "compiled in" if core["cuda"] else "not compiled in"
    assert re.search(rf"^core isa +{isa}$", output, re.MULTILINE)
    assert re.search(rf"^core cuda +{compiled}$", output, re.MULTILINE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can run it")
def test_info_says_that_a_backend_cannot_run_here(capsys, monkeypatch):
    monkeypatch.setenv("FASTMAML_BACKEND", "gpu")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    main(["info"])
    assert "gpu, as FASTMAML_BACKEND says, which cannot run here" in capsys.readouterr().out


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
    assert load_checkpoint("omniglot-maml-5way-1shot.pt").iteration == 2
    assert main([*command, "--iterations", "4", "--resume"]) == 0
    resumed = capsys.readouterr().out
    assert accuracies(resumed)[-2:] == accuracies(straight)
    one, two = load_checkpoint("straight.pt"), load_checkpoint("omniglot-maml-5way-1shot.pt")
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
    trainer = load_checkpoint("omniglot-anil-first-order-3way-1shot.pt")
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
        (["--resume", "--inner-lr", "0.5"], r"--inner-lr must be 0\.4, as in run\.pt, got 0\.5"),
        (
            ["--resume", "--no-rotations"],
            r"--no-rotations must not be given, as run\.pt ",
        ),
        (["--resume", "--first-order"], r"--first-order must not be given, as run\.pt "),
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
        (["train", "omniglot"], "--data must name the folder that holds omniglot-py, got none"),
        (["train", "glyphs", "--data", "nowhere"], "--data nowhere must be left out with glyphs"),
        (["train", "glyphs", "--download"], "--download must be left out with glyphs"),
        (["train", "glyphs", "--checkpoint", "no/a.pt"], "got no/a.pt; make no first"),
        (["demo", "--out", "picture.foo"], "--out must end in .png, got picture.foo"),
        (["demo", "--out", "no/picture.png"], "got no/picture.png; make no first"),
        (["train", "omniglot", "--data", "nowhere"], "images_background.zip"),
        (["train", "glyphs", "--shots", "20"], "has 20 images, fewer than the 21 that"),
        (
            ["train", "glyphs", "--ways", "190"],
            "validation classes: --ways must be at most",
        ),
        (
            ["train", "glyphs", "--inner-batch", "7"],
            "fastmaml: --inner-batch must divide the 5 support",
        ),
        (
            ["train", "glyphs", "--algorithm", "meta-sgd", "--inner-optimizer", "adam"],
            "fastmaml: --inner-optimizer must be 'sgd' with meta-sgd",
        ),
        (["train", "glyphs", "--checkpoint", "."], "is a folder; name a file in it"),
        (["demo", "--out", "/dev/null/demo.png"], "got /dev/null/demo.png; make /dev/null first"),
        (["evaluate", "none.pt"], "none.pt does not exist"),
    ],
)
def test_mistakes_get_one_line(capsys, command, message):
    assert main(command) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("fastmaml: ")
    assert error.count("\n") == 1
    assert not list(Path().iterdir())


def test_a_link_to_nowhere_is_told_at_once(capsys):
    Path("run.pt").symlink_to("gone/run.pt")
    assert main(["train", "glyphs", "--checkpoint", "run.pt"]) == 1
    assert "gone/run.pt; make " in capsys.readouterr().err


def test_one_test_task_gives_no_interval(capsys):
    command = "train glyphs --model fc --meta-batch 1 --iterations 1 --test-tasks 1 --test-steps 1"
    assert main(command.split()) == 0
    printed = capsys.readouterr().out
    assert "held-out classes, 1 task:\n" in printed
    assert "±" not in printed
    assert "confidence" not in printed


def test_algorithms_have_checkpoints_of_their_own():
    names = {
        str(train.default_checkpoint(Recipe(algorithm=algorithm, first_order=first_order)))
        for algorithm in ALGORITHMS
        for first_order in (False, True)
    }
    assert len(names) == 2 * len(ALGORITHMS)
    assert "omniglot-meta-sgd-first-order-5way-1shot.pt" in names


def test_the_folder_itself_is_not_its_parent(omniglot, capsys):
    for command in (["train", "omniglot", "--data"], ["data", "omniglot", "--download", "--root"]):
        assert main([*command, str(omniglot / "omniglot-py")]) == 1
        error = capsys.readouterr().err
        assert f"must be {omniglot}, which holds omniglot-py, got {omniglot}/omniglot-py" in error


def test_a_run_that_is_long_enough_is_only_tested(omniglot, capsys):
    command = ["train", "omniglot", "--data", str(omniglot), *TINY, "--checkpoint", "run.pt"]
    command += ["--test-tasks", "2", "--resume", "--iterations"]
    main([*command, "2"])
    capsys.readouterr()
    written = Path("run.pt").stat().st_mtime_ns
    assert main([*command, "1"]) == 0
    printed = capsys.readouterr().out
    assert "nothing to train: run.pt has 2 iterations, --iterations asks for 1 in all" in printed
    assert len(accuracies(printed)) == 2
    assert Path("run.pt").stat().st_mtime_ns == written


def test_stopped_at_once_says_what_there_is(omniglot, capsys, monkeypatch):
    def interrupted(trainer, *_, save, **__):
        trainer.iteration += 1
        if trainer.iteration == 2:
            save()
        raise KeyboardInterrupt

    command = ["train", "omniglot", "--data", str(omniglot), *TINY, "--checkpoint", "run.pt"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "train", interrupted)
        assert main(command) == 130
    assert "fastmaml: stopped at once; run.pt was not written\n" in capsys.readouterr().err
    main([*command, "--iterations", "1", "--test-tasks", "1"])
    monkeypatch.setattr(train, "train", interrupted)
    assert main([*command, "--resume"]) == 130
    assert "fastmaml: stopped at once; run.pt has 2 iterations\n" in capsys.readouterr().err


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
    ("options", "message"),
    [
        (["--ways", "0"], "argument --ways: must be a whole number of 1 or more, got 0"),
        (["--ways", "5.5"], "argument --ways: must be a whole number of 1 or more, got 5.5"),
        (["--seed", "-1"], "argument --seed: must be a whole number of 0 or more, got -1"),
        (["--seed", f"{2**64}"], f"argument --seed: must be a whole number up to {2**64 - 1}, got"),
        (["--threads", "9" * 12], f"argument --threads: must be a whole number up to {2**31 - 1}"),
        (["--lr", "-1"], "argument --lr: must be a number above 0, got -1"),
        (["--lr", "inf"], "argument --lr: must be a number above 0, got inf"),
        (["--inner-lr", "fast"], "argument --inner-lr: must be a number above 0, got fast"),
        (["--model", "vit"], "argument --model: invalid choice"),
        (["--validate-every", "-1"], "must be a whole number of 0 or more, got -1"),
        ([], "required: VERB"),
    ],
)
def test_argparse_refuses_bad_values(options, message, capsys):
    command = ["train", "omniglot", *options] if options else []
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_help_tells_numbers_from_rates(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    printed = capsys.readouterr().out
    assert "--lr RATE" in printed
    assert "--ways N " in printed


def test_a_device_that_is_not_there(capsys):
    with pytest.raises(SystemExit):
        main(["train", "glyphs", "--device", "gpu"])
    assert "argument --device: must be cpu or cuda, got gpu" in capsys.readouterr().err
