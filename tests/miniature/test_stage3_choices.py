"""Samples, pairs and rewards of stage 3 at equal passes of the denoiser."""

import shutil

import pytest

from vlv.checkpoints import MINIATURE
from vlv.files import read_json
from vlv.miniature.stage3 import start_folder
from vlv.miniature.stage3_choices import images_of_round, main

ENCODER = "checkpoints/vlv-miniature"


def test_a_round_has_the_images_that_the_passes_are_enough_for():
    assert images_of_round(12_000, "score", 1, 4) == 2000  # 4 samples, the greedy caption and no words
    assert images_of_round(12_000, "score", 4, 12) == 214
    assert images_of_round(12_000, "image", 1, 4) == 100  # 10 steps, with guidance


@pytest.mark.slow
def test_each_choice_is_trained_and_measured_once(tmp_path, capsys):
    shutil.copytree(MINIATURE, start_folder(tmp_path, ENCODER, 200, 0))
    command = [str(tmp_path), "--passes=160", "--rounds=1", "--round-steps=1", "--images=40", "--scenes=4"]
    command += ["--num-pairs", "1", "2", "--num-captions", "2", "--image-captions", "2", "--seeds", "0"]
    main([*command, "--reward_batch_size=16"])
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line[:1] == "|"]
    assert [row[:4] for row in rows[2:]] == [
        ["none", "", "", ""],
        ["score", "1", "2", "40"],
        ["score", "2", "2", "20"],
        ["image", "", "2", "2"],
    ]
    kept = read_json(tmp_path / "choices-160x1-score-K2-G2-seed-0.json")
    assert kept["settings"]["round_images"] == 20 and kept["passed_on"] == ["--reward_batch_size=16"]
    assert rows[4][4] == rows[4][8] == f"{kept['rounds'][1]['combo']['object_place_f1']:.3f}"
    main([*command, "--reward_batch_size=16"])
    again = capsys.readouterr().out
    assert again.startswith("| reward") and printed.endswith(again)
