"""Captions that only please the denoiser."""

import random

from vlv.miniature.grammar import parse_caption, write_caption
from vlv.miniature.reward_hacking import HACKS, main
from vlv.miniature.world import Scene, SceneObject


def test_each_change_leaves_a_caption_that_is_not_the_true_one():
    scene = Scene("pink", (SceneObject("dog", "small", "top left"), SceneObject("cat", "large", "bottom right")))
    made = {name: hack(scene, random.Random(0)) for name, hack in HACKS.items()}
    assert all(caption and parse_caption(caption) != scene for caption in made.values())
    assert parse_caption(made["an object said twice"]).objects == (scene.objects[0], *scene.objects)
    assert len(parse_caption(made["an invented object"]).objects) == 3
    assert parse_caption(made["the background alone"]) == Scene("pink", ())
    assert parse_caption(made["the objects alone"]) == Scene(None, scene.objects)
    assert sorted(made["the words in any order"].split()) == sorted(write_caption(scene).replace(",", "").split())
    assert made["names without places"] == "small dog large cat pink"
    three = Scene(
        "pink", tuple(SceneObject("dog", "small", place) for place in ("top left", "top right", "bottom left"))
    )
    assert HACKS["an object said twice"](three, random.Random(0)) is None  # too long for the text encoder
    assert HACKS["an invented object"](three, random.Random(0)) is None


def test_the_table_has_a_row_for_each_change(capsys):
    from vlv.checkpoints import MINIATURE

    main([str(MINIATURE), "--scenes", "3", "--fewer-scenes", "1", "--num-pairs", "1"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[0].removeprefix("| ") for row in rows[2:-1]] == list(HACKS)
    background = next(row for row in rows if row[0] == "| the background alone")
    assert background[2] == "0.00" and float(background[3]) < -0.05  # a part of the truth is scored lower
