"""Options have one name each, and old names give the new one."""

import re
from types import SimpleNamespace

import pytest
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, EDMEulerScheduler

from vlv.cli.main import RENAMED_OPTIONS, build_parser, main
from vlv.cli.models import use_default_scheduler
from vlv.cli.parsers import common
from vlv.pipelines import diffusion_score
from vlv.pipelines.schedulers import OWN


@pytest.mark.parametrize("given", [["--decoder", "sd"], ["--decoder=sd"]])
def test_a_renamed_option_gives_its_new_name(given, capsys):
    assert main(["push", "model", "org/name", *given]) == 2
    assert "`vlv push --decoder` is now called --diffusion-model" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "old", "new"), [(*key, new) for key, new in RENAMED_OPTIONS.items()])
def test_the_new_name_of_a_renamed_option_exists(command, old, new, capsys):
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    options = capsys.readouterr().out.split()
    assert exit.value.code == 0 and new in options and old not in options


@pytest.mark.parametrize(
    "arguments",
    [
        ["caption", "image.png", "--out", "captions.json"],
        ["encode", "image.png", "--batch", "2"],
        ["reconstruct", "image.png", "--num-inference", "2"],
        ["push", "model", "org/name", "--diffusion", "sd"],
        ["info", "model", "--rev", "main"],
        ["convert", "--florence", "folder", "--output", "folder", "--stage", "file"],
        ["demo", "--mod", "folder"],
        ["evaluate", "miniature", "--scene", "2"],
    ],
)
def test_an_abbreviated_option_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        build_parser().parse_args(arguments)
    assert exit.value.code == 2 and f"unrecognized arguments: {arguments[-2]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["caption", "photos", "--promt", "x"],
            "unrecognized arguments: --promt x; did you mean --prompt?; see vlv caption --help",
        ),
        (
            ["data", "inspect", "photos", "--output", "o", "--tumbnails=2"],
            "unrecognized arguments: --tumbnails=2; did you mean --thumbnails?; see vlv data inspect --help",
        ),
        (["caption", "photos", "--zzz"], "unrecognized arguments: --zzz; see vlv caption --help"),
        (
            ["caption", "photos", "--batch-size", "0"],
            "argument --batch-size: must be at least 1, not 0; see vlv caption --help",
        ),
    ],
)
def test_a_wrong_option_is_answered_in_one_line(arguments, said, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and error.endswith(f" error: {said}\n")


def test_options_are_spelt_with_dashes_or_underscores():
    parser = build_parser()
    given = ["caption", "--image_root=c_d", "--batch_size", "2", "--output", "e_f.json", "--", "a_b", "--image_root"]
    options = parser.parse_args(given)
    assert (options.image_root, options.batch_size, options.output) == ("c_d", 2, "e_f.json")
    assert options.paths == ["a_b", "--image_root"]
    _, settings = parser.parse_known_args(["estimate", "recipe.yaml", "--batch_size", "2"])
    assert settings == ["--batch_size", "2"]


def test_the_package_lists_all_commands(capsys):
    import vlv.cli

    with pytest.raises(SystemExit):
        main(["--help"])
    commands = re.findall(r"^    (\w+)", capsys.readouterr().out, re.MULTILINE)
    assert " ".join(vlv.cli.__doc__.split("`")[1].split()) == f"vlv {' | '.join(commands)}"


def test_the_default_of_num_pairs_is_that_of_the_scorer():
    assert common.NUM_PAIRS == diffusion_score.NUM_PAIRS


@pytest.mark.parametrize("command", [["reconstruct", "image.png"], ["demo"]])
def test_an_unknown_scheduler_is_refused_with_the_names_that_there_are(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main([*command, "--scheduler", "dpm"])
    assert exit.value.code == 2
    assert re.search(r"--scheduler: invalid choice: 'dpm' \(choose from '?ddpm'?, ", capsys.readouterr().err)


def test_a_model_whose_scheduler_has_no_beta_schedule_keeps_it_by_default(capsys):
    own = EDMEulerScheduler()
    pipeline = SimpleNamespace(scheduler=own)
    assert use_default_scheduler(pipeline) == OWN and pipeline.scheduler is own
    assert "dpm++ does not fit the model: sampling by its own EDMEulerScheduler" in capsys.readouterr().err
    pipeline = SimpleNamespace(scheduler=DDPMScheduler())
    assert use_default_scheduler(pipeline) == "dpm++"
    assert type(pipeline.scheduler) is DPMSolverMultistepScheduler and not capsys.readouterr().err
