"""Scenes are rendered with another artist's artwork."""

import pytest

from vlv.checkpoints import MINIATURE
from vlv.miniature.data import evaluation_items
from vlv.miniature.evaluation import SCENE_CLASSIFIER_FILE
from vlv.miniature.paper import out_of_distribution
from vlv.miniature.scene_classifier import SceneClassifier
from vlv.miniature.scoring import score_scenes

needs_font = pytest.mark.skipif(
    not out_of_distribution.FONT.is_file(), reason="apt install fonts-noto-color-emoji runs this test"
)


@needs_font
def test_the_same_scenes_are_rendered_with_other_artwork():
    openmoji, truth = evaluation_items("test", 60)
    noto = out_of_distribution.render_in_noto(truth)
    assert noto.shape == openmoji.shape and not (noto == openmoji).all(dim=(1, 2, 3)).any()
    scores = score_scenes(SceneClassifier.load(MINIATURE / SCENE_CLASSIFIER_FILE).predict_scenes(noto), truth)
    assert scores["background"] > 0.9  # backgrounds are the miniature's
    assert scores["exact"] < 0.9  # objects are not


@needs_font
def test_edges_have_the_colours_of_the_artwork():
    heart = out_of_distribution.noto_artwork("heart")
    opaque = [pixel for pixel in heart.get_flattened_data() if pixel[3]]
    assert len(opaque) > 1000 and all(red > blue for red, _, blue, _ in opaque)


def test_a_missing_font_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(out_of_distribution, "FONT", tmp_path / "none.ttf")
    out_of_distribution.noto_artwork.cache_clear()
    with pytest.raises(FileNotFoundError, match="fonts-noto-color-emoji"):
        out_of_distribution.noto_artwork("heart")


def test_the_old_option_names_the_new_one(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["out_of_distribution", "--output", "outputs", "--pictures", "8"])
    with pytest.raises(SystemExit):
        out_of_distribution.main()
    assert "--pictures is called --images now" in capsys.readouterr().err
