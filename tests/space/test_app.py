"""The Space as the Hub starts it, and the functions of its tabs, without a browser."""

import copy
import os
import re
import shutil
import time
from pathlib import Path
from urllib.request import urlopen

import gradio as gr
import numpy as np
import pytest
import torch
import yaml

from vlv import hub
from vlv.checkpoints import MINIATURE
from vlv.hub.card_text import describe_limits, read_card
from vlv.miniature.instructions import AS_JSON, INSTRUCTIONS
from vlv.pipelines import ConfidenceMarker, generate_captions
from vlv.space.app import EXAMPLES, Demo, build

from ..builders import assert_close_to_scale
from ..interpreter import PythonProcess

KNOWS = (
    "It knows sixteen objects (OpenMoji artwork) on eight backgrounds, at 64 x 64 pixels, and no photographs. It "
    "describes every other image as a scene of its own world."
)
SPACE = Path(__file__).parents[2] / "space"
PHOTO = next((Path(__file__).parents[2] / "examples" / "photos").glob("*.jpg"))


@pytest.mark.slow
def test_the_space_starts_from_its_variables(tmp_path):
    log = tmp_path / "log"
    environment = os.environ | {
        "MODEL_ID": str(MINIATURE),
        "OMP_NUM_THREADS": "1",
        "GRADIO_ANALYTICS_ENABLED": "False",
    }
    log.touch()
    code = "import runpy; runpy.run_path('app.py', run_name='__main__')"
    server = PythonProcess(code, [], stdout=log, stderr=log, cwd=SPACE, env=environment)
    try:
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
        assert b"VLV" in urlopen(found.group()).read()
    finally:
        server.kill_group()


def test_its_front_matter_names_files_that_exist():
    front = yaml.safe_load((SPACE / "README.md").read_text().split("---")[1])
    assert front["sdk"] == "gradio" and (SPACE / front["app_file"]).is_file()


@pytest.mark.parametrize("decoding", ["greedy", "beams", "sampling"])
def test_captions_grow_word_by_word(demo, decoding):
    steps = list(demo.caption(EXAMPLES[0], 40, decoding, 1.0, 2))
    assert steps[-1] and (len(steps) == 1 if decoding == "beams" else len(steps) > 5)
    assert all(steps[-1].startswith(step) for step in steps)


@pytest.mark.parametrize(("decoding", "settings"), [("greedy", {}), ("beams", {"num_beams": 4})])
def test_the_last_caption_is_that_of_the_model(demo, decoding, settings):
    pixel_values = demo.processor(images=EXAMPLES[1]).pixel_values
    expected = generate_captions(
        demo.captioner, demo.processor, pixel_values=pixel_values, max_new_tokens=40, **settings
    )
    assert list(demo.caption(EXAMPLES[1], 40, decoding, 1.0, 4))[-1] == expected[0]


def test_a_caption_that_explains_the_image_hardly_better_than_no_words_is_marked(demo, tmp_path):
    marking = copy.copy(demo)
    marking.marker = ConfidenceMarker(demo.pipeline, 0.08)
    shutil.copy(PHOTO, tmp_path / "photo.jpg")
    marks = {}
    for path in (EXAMPLES[0], str(tmp_path / "photo.jpg")):
        steps = list(marking.caption_and_mark(path, 40, "greedy", 1.0, 2))
        assert not any(mark for _, mark in steps[:-1])  # the score comes when the caption is complete
        assert steps[-1][0] == list(demo.caption(path, 40, "greedy", 1.0, 2))[-1]
        marks[path] = steps[-1][1]
    of_scene, of_photo = marks.values()
    assert of_scene.startswith("Score 0.") and "better than no words" in of_scene
    assert "Low confidence" in of_photo and "is below 0.08" in of_photo
    (click,) = [own for own in build(marking).fns.values() if own.api_name == "caption"]
    assert len(click.outputs) == 2
    (click,) = [own for own in build(demo).fns.values() if own.api_name == "caption"]
    assert len(click.outputs) == 1


def test_a_model_without_a_diffusion_model_cannot_mark_captions(tmp_path):
    with pytest.raises(ValueError, match="cannot mark captions: scores need its captioner and its diffusion model"):
        Demo(
            str(shutil.copytree(MINIATURE, tmp_path / "m", ignore=shutil.ignore_patterns("model_index.json"))),
            min_score=0.1,
        )


@pytest.mark.parametrize("decoding", ["greedy", "beams"])
def test_a_caption_follows_an_instruction(demo, decoding):
    steps = list(demo.caption(EXAMPLES[1], 64, decoding, 1.0, 2, AS_JSON.text))
    assert AS_JSON.parse(steps[-1]) is not None
    assert all(steps[-1].startswith(step) for step in steps)
    assert AS_JSON.parse(list(demo.caption(EXAMPLES[1], 64, decoding, 1.0, 2, ""))[-1]) is None


def test_only_the_instructions_that_the_model_knows_are_offered(demo):
    def choices(page):
        fields = [block for block in page.blocks.values() if isinstance(block, gr.Dropdown) and block.visible]
        return [value for field in fields for _, value in field.choices]

    assert choices(build(demo)) == ["", *(instruction.text for instruction in INSTRUCTIONS)]
    with pytest.raises(gr.Error, match="Instruction must be empty or 'briefly' or "):
        next(demo.caption(EXAMPLES[0], 8, "greedy", 1.0, 2, "sing"))
    without = copy.copy(demo)
    without.instructions = []
    assert choices(build(without)) == []
    with pytest.raises(gr.Error, match=r"Instruction must be empty\."):
        next(without.caption(EXAMPLES[0], 8, "greedy", 1.0, 2, "briefly"))


def test_images_come_with_progress_and_follow_the_seed(demo):
    reported = []

    def progress(at, **settings):
        reported.append(at)

    original, first = demo.reconstruct(EXAMPLES[0], 1, 3, 2.0, progress=progress)
    assert reported == [(1, 3), (2, 3), (3, 3)] and original.size == first.size == (64, 64)
    assert demo.reconstruct(EXAMPLES[0], 1, 3, 2.0, progress=progress)[1].tobytes() == first.tobytes()
    assert demo.reconstruct(EXAMPLES[0], 2, 3, 2.0, progress=progress)[1].tobytes() != first.tobytes()


def test_words_stand_beside_the_image_and_some_embeddings_are_kept(demo):
    def generate(*words):
        return demo.reconstruct(EXAMPLES[0], 1, 2, 2.0, *words, progress=lambda *a, **k: None)[1].tobytes()

    whole = generate()
    assert generate("", demo.num_query_tokens) == whole
    assert len({whole, generate("a large sun"), generate("a large sun", 0), generate("", 4)}) == 4
    with pytest.raises(gr.Error, match="These words and embeddings cannot be used: image_tokens is 0"):
        generate("", 0)
    with pytest.raises(gr.Error, match="Embeddings kept must be a whole number from 0 to 24; got 25"):
        generate("a sun", 25)


def test_composing_refuses_numbers_that_do_not_fit(demo):
    def progress(at, **settings):
        pass

    first_alone = demo.compose(EXAMPLES[0], EXAMPLES[1], demo.num_query_tokens, 0, 1, 3, 2.0, progress)
    reconstruction = demo.reconstruct(EXAMPLES[0], 1, 3, 2.0, progress=progress)[1]
    difference = np.asarray(first_alone).astype(int) - np.asarray(reconstruction)
    assert np.abs(difference).max() <= 1  # grey levels: two images are encoded in one batch, one alone
    with pytest.raises(gr.Error, match="text encoder has places"):
        demo.compose(EXAMPLES[0], EXAMPLES[1], 0, 0, 1, 3, 2.0, progress)
    with pytest.raises(gr.Error, match="Choose the second image first"):
        demo.compose(EXAMPLES[0], None, 1, 1, 1, 3, 2.0, progress)


def test_a_file_that_is_not_an_image_is_named_without_its_folder(demo, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("words")
    with pytest.raises(gr.Error, match=r"cannot be read as an image: notes\.txt is ") as refused:
        demo.load(str(path))
    assert str(tmp_path) not in str(refused.value)


@pytest.mark.slow
def test_it_runs_in_half_precision():
    half = Demo(str(MINIATURE), dtype=torch.bfloat16)
    assert half.captioner.dtype == half.pipeline.unet.dtype == torch.bfloat16
    assert list(half.caption(EXAMPLES[0], 40, "greedy", 1.0, 2))[-1]
    assert half.reconstruct(EXAMPLES[0], 1, 2, 2.0, progress=lambda *a, **k: None)[1].size == (64, 64)


@pytest.mark.slow
def test_a_stage_1_model_has_no_caption_tab(tmp_path):
    encoder, image_processor = hub.load_encoder(MINIATURE)
    folder = hub.export(tmp_path / "s", encoder=encoder, image_processor=image_processor, diffusion_model=MINIATURE)
    page = build(Demo(str(folder)))
    tabs = [block.label for block in page.blocks.values() if isinstance(block, gr.Tab)]
    assert tabs == ["Reconstruct", "Compose"]
    texts = " ".join(block.value for block in page.blocks.values() if isinstance(block, gr.Markdown))
    assert "The page reconstructs images from them." in texts


@pytest.mark.slow
def test_a_captioner_without_a_diffusion_model_has_only_the_caption_tab(tmp_path):
    captioner, processor = hub.load_captioner(MINIATURE)
    folder = hub.export(tmp_path / "s", captioner=captioner, processor=processor)
    demo = Demo(str(folder))
    tabs = [block.label for block in build(demo).blocks.values() if isinstance(block, gr.Tab)]
    assert tabs == ["Caption"]
    assert list(demo.caption(EXAMPLES[0], 40, "greedy", 1.0, 2))[-1]


def test_of_two_encoders_the_page_reconstructs_from_that_of_stage_1(converted, golden):
    demo = Demo(str(converted))
    with torch.no_grad():
        reconstructed_from = demo.pipeline.encoder(pixel_values=golden["pixel_values"]).conditioning
        captioned_from = demo.captioner.model(pixel_values=golden["pixel_values"]).conditioning
    assert_close_to_scale(reconstructed_from, golden["text_encoder"], 5e-5)
    assert_close_to_scale(captioned_from, golden["stage2/text_encoder"], 5e-5)


def test_an_encoder_without_other_models_is_refused(tmp_path):
    encoder, image_processor = hub.load_encoder(MINIATURE)
    folder = hub.export(tmp_path / "s", encoder=encoder, image_processor=image_processor)
    with pytest.raises(ValueError, match=r"holds only an encoder.*--diffusion-model"):
        Demo(str(folder))


def test_about_is_the_model_card_without_its_front_matter(demo):
    about = demo.about()
    assert about.lstrip().startswith("# vlv-miniature") and "## Limits" in about


def shown_without_a_click(page, tab: str) -> str:
    """The texts in a tab of the page that no folded panel hides."""
    texts = []
    for block in page.blocks.values():
        parents = []
        while (parents[-1] if parents else block).parent is not None:
            parents.append((parents[-1] if parents else block).parent)
        in_tab = any(isinstance(parent, gr.Tab) and parent.label == tab for parent in parents)
        if isinstance(block, gr.Markdown) and in_tab and not any(isinstance(p, gr.Accordion) for p in parents):
            texts.append(block.value)
    return "\n".join(texts)


@pytest.mark.parametrize("tab", ["Caption", "Reconstruct", "Compose"])
def test_each_tab_says_what_the_model_knows(demo, tab):
    assert KNOWS in shown_without_a_click(build(demo), tab)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("card", "said"),
    [
        (
            "---\nlicense: mit\n---\n# m\n\nA model. **It knows\nbirds.** More.",
            "It knows birds. Captions can be wrong.",
        ),
        ("# m\n\n<!-- note -->\n\nA **bold** model.\n\n**It knows birds.**", "The model card, below, says"),
        ("---\n[\n---\n# m\n\nA model.", "The model card, below, says"),
        (None, "no model card that says what it was trained on"),
    ],
    ids=["bold sentence", "bold elsewhere", "front matter is not YAML", "no card"],
)
def test_the_sentence_is_the_bold_one_of_the_card_s_first_paragraph(card, said, demo, tmp_path):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    other = copy.copy(demo)
    other.card = read_card(tmp_path)
    text = shown_without_a_click(build(other), "Caption")
    assert said in text and "Captions can be wrong" in text
    assert "license" not in other.about()


def test_a_card_that_vlv_push_wrote_gives_the_general_sentence(demo, tmp_path):
    without_card = shutil.copytree(MINIATURE, tmp_path / "m", ignore=shutil.ignore_patterns("README.md"))
    other = copy.copy(demo)
    other.card = read_card(hub.write_repository(without_card, tmp_path / "out", repo="org/m"))
    assert describe_limits(other.card, "Captions").startswith("**Captions can be wrong.** The model card, below, says")
