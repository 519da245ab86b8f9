"""lmms-eval finds VLV by its entry point, and evaluates the miniature on examples/lmms_eval."""

from importlib.metadata import entry_points

import pytest
import torch
from PIL import Image

from vlv import hub
from vlv.checkpoints import MINIATURE

NOT_INSTALLED = "lmms-eval is not installed: pip install '.[lmms]' (it needs torchvision)"
IMAGES = [f"examples/images/test-{number}.png" for number in (1, 2, 3)]


@pytest.fixture(scope="module")
def model():
    pytest.importorskip("lmms_eval", reason=NOT_INSTALLED)
    from vlv.evaluation.lmms import VLV

    model = VLV(str(MINIATURE), batch_size=2)
    model.task_dict = {"task": {"test": [{"image": name} for name in IMAGES]}}
    return model


def requests(kind: str, second: list) -> list:
    """A request for each of `IMAGES`, with words that no captioner was trained on."""
    from lmms_eval.api.instance import Instance

    def visual(doc: dict) -> list[Image.Image]:
        return [Image.open(doc["image"]).convert("RGB")]

    return [
        Instance(
            kind, ("Describe!", value, visual, number, "task", "test"), 0, {"task": "", "doc_id": 0, "repeats": 1}
        )
        for number, value in enumerate(second)
    ]


@pytest.fixture(scope="module")
def captions() -> list[str]:
    captioner, processor = hub.load_captioner(MINIATURE)
    ids = captioner.generate(**processor(images=IMAGES), max_new_tokens=64, do_sample=False)
    return processor.batch_decode(ids, skip_special_tokens=True)


@pytest.mark.slow
def test_lmms_eval_runs_a_task_file():
    pytest.importorskip("lmms_eval", reason=NOT_INSTALLED)
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    results = simple_evaluate(
        "vlv",
        f"pretrained={MINIATURE}",
        tasks=["vlv_captions"],
        task_manager=TaskManager(include_path="examples/lmms_eval", include_defaults=False),
        batch_size=4,
        device="cpu",
    )
    scores = results["results"]["vlv_captions"]
    assert scores["object_f1,none"] == scores["exact,none"] == 1.0
    assert [len(sample["filtered_resps"]) for sample in results["samples"]["vlv_captions"]] == [1] * 12


@pytest.mark.slow
def test_captions_are_those_of_the_model_up_to_a_stop_string(model, captions):
    greedy = {
        "max_new_tokens": 64,
        "temperature": 0,
        "do_sample": True,
        "until": ["\n\n"],
        "image_aspect_ratio": "pad",
    }
    assert model.generate_until(requests("generate_until", [greedy] * 3)) == captions
    stopped = model.generate_until(requests("generate_until", [greedy, greedy | {"until": [", "]}, greedy]))
    assert stopped == [captions[0], captions[1].split(", ")[0], captions[2]]


@pytest.mark.slow
def test_the_likelihood_of_a_text_is_its_loss(model, captions):
    captioner, processor = hub.load_captioner(MINIATURE)
    texts = [captions[0], "a small dog at the top right", captions[2]]
    found = model.loglikelihood(requests("loglikelihood", texts))
    for image, text, (loss, _) in zip(IMAGES, texts, found, strict=True):
        with torch.no_grad():
            expected = captioner(**processor(images=image, suffix=text, append_eos=False)).loss
        assert loss == pytest.approx(expected.item(), rel=1e-4)
    assert [is_greedy for _, is_greedy in found] == [True, False, True]
    assert model.loglikelihood(requests("loglikelihood", [lambda doc: texts[0]]))[0] == pytest.approx(found[0])


@pytest.mark.slow
def test_samples_and_arguments_that_do_not_fit_are_errors(model):
    from vlv.evaluation.lmms import VLV

    request = requests("generate_until", [{}])[0]
    request.arguments = (*request.arguments[:2], lambda doc: [], *request.arguments[3:])
    with pytest.raises(ValueError, match="sample 0 of task has nothing; VLV captions samples of one PIL image"):
        model.generate_until([request])
    for settings, message in (
        ({"batch_size": "auto"}, "batch_size is 'auto'; expected a whole number"),
        ({"dtype": "half"}, "dtype is 'half'; expected one of float32"),
        ({"prompt": "briefly", "task_prompt": True}, "prompt and task_prompt exclude each other"),
    ):
        with pytest.raises(ValueError, match=message):
            VLV(str(MINIATURE), **settings)


def test_the_entry_point_names_the_adapter():
    (entry,) = (entry for entry in entry_points(group="lmms_eval.models") if entry.name == "vlv")
    assert entry.value == "vlv.evaluation.lmms:MANIFEST"
