"""Another artist's drawings stand where the world's own do."""

import pytest

from vlv.checkpoints import MINIATURE
from vlv.miniature.data import evaluation_items
from vlv.miniature.paper import out_of_distribution as strangers
from vlv.miniature.scene_classifier import SceneClassifier
from vlv.miniature.scoring import score_scenes

font = pytest.mark.skipif(not strangers.FONT.is_file(), reason="apt install fonts-noto-color-emoji runs this test")


@font
def test_the_same_scenes_in_other_drawings():
    own, truth = evaluation_items("test", 60)
    other = strangers.pictures_in_another_style(truth)
    assert other.shape == own.shape and not (other == own).all(dim=(1, 2, 3)).any()
    read = score_scenes(SceneClassifier.load(MINIATURE / "scene_classifier.safetensors").predict_scenes(other), truth)
    assert read["background"] > 0.9  # the colours are the world's, the drawings are not
    assert read["exact"] < 0.9


@font
def test_edges_have_the_drawing_s_own_colours():
    heart = strangers.noto_artwork("heart")
    opaque = [pixel for pixel in heart.get_flattened_data() if pixel[3]]
    assert len(opaque) > 1000 and all(red > blue for red, _, blue, _ in opaque)


def test_a_missing_font_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(strangers, "FONT", tmp_path / "none.ttf")
    strangers.noto_artwork.cache_clear()
    with pytest.raises(FileNotFoundError, match="fonts-noto-color-emoji"):
        strangers.noto_artwork("heart")
