"""The field's tools take a VLV as any vision-language model."""

import importlib.metadata

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model

from vlv import VLVForConditionalGeneration, VLVModel, VLVProcessor, hub
from vlv.checkpoints import MINIATURE

from ..builders import QUERY_DECODER_CONFIG, assert_close_to_scale, backbone_configs, vlv_config


def require(package: str, extra: str) -> None:
    """Skips a test where a package is not installed. Nothing is imported: TRL alone takes seconds."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed (pip install vlv[{extra}])")


@pytest.fixture
def miniature() -> tuple[VLVForConditionalGeneration, VLVProcessor]:
    return hub.load_captioner(MINIATURE)


@pytest.fixture
def inputs(processor, images) -> dict:
    """Two sequences with an image each, of different lengths."""
    return dict(processor(images=images[:2], text=["<image>a large", "<image>"]))


def chats(images, answered: bool) -> list[dict]:
    """Rows as TRL's trainers take them. Their prompts are of different lengths."""
    words = ["briefly", "only the objects", "as tags", "briefly"]
    answer = [{"role": "assistant", "content": "a small dog"}]
    rows = [{"images": [i], "prompt": [{"role": "user", "content": w}]} for i, w in zip(images, words, strict=False)]
    return [{**row, "completion": answer} for row in rows] if answered else rows


SETTINGS = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "bf16": False, "learning_rate": 1e-3}


@pytest.mark.slow
def test_trl_trains_on_answers(miniature, images, tmp_path):
    """The loss of its first step is that of this model's own labels."""
    require("trl", "trl")
    from trl import SFTConfig, SFTTrainer

    model, processor = miniature
    rows = chats(images[:4], answered=True)
    batch = processor(
        images=images[:4],
        text=[f"<image>{row['prompt'][0]['content']}" for row in rows],
        suffix=["a small dog"] * 4,
    )
    with torch.no_grad():
        expected = model(**batch).loss
    before = model.get_input_embeddings().weight.clone()
    sizes = {"per_device_train_batch_size": 4, "max_steps": 2, "logging_steps": 1, "max_length": None}
    config = SFTConfig(str(tmp_path), **SETTINGS, **sizes)
    trainer = SFTTrainer(model, config, train_dataset=Dataset.from_list(rows), processing_class=processor)
    trainer.train()
    losses = [step["loss"] for step in trainer.state.log_history if "loss" in step]
    assert losses[0] == pytest.approx(expected.item(), rel=1e-3) and losses[1] < losses[0]
    assert not torch.equal(model.get_input_embeddings().weight, before)


@pytest.mark.slow
def test_trl_rewards_captions(miniature, images, tmp_path):
    """Its completions are what this model writes, also where prompts differ in length."""
    require("trl", "trl")
    from trl import GRPOConfig, GRPOTrainer

    model, processor = miniature
    rows = chats(images[:2], answered=False)
    expected = [
        processor.decode(model.generate(**processor(images=image, text=row["prompt"][0]["content"]))[0], True)
        for image, row in zip(images, rows, strict=False)
    ]

    def completions(**sampling) -> set[str]:
        """What the model writes in one step of training."""
        written: list[str] = []

        def reward(completions, **kwargs) -> list[float]:
            written.extend(completion[0]["content"] for completion in completions)
            return [float(number) for number in range(len(completions))]

        sizes = {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 16, "max_steps": 1}
        config = GRPOConfig(str(tmp_path), **SETTINGS, **sizes, **sampling, beta=0.0)
        GRPOTrainer(model, reward, config, train_dataset=Dataset.from_list(rows), processing_class=processor).train()
        return set(written)

    assert completions(top_k=1) == set(expected)
    before = model.get_input_embeddings().weight.clone()
    assert len(completions(temperature=5.0)) == 4  # different rewards of different captions
    assert not torch.equal(model.get_input_embeddings().weight, before)


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_an_adapter_of_the_whole_model_is_saved_loaded_and_merged(captioner, inputs, task, tmp_path):
    torch.manual_seed(0)
    state = {name: weight.clone() for name, weight in captioner.state_dict().items()}
    layers = r"language_model\..*\.(q_proj|v_proj)"
    config = LoraConfig(r=2, target_modules=layers, init_lora_weights=False, task_type=task)
    plain = captioner.generate(**inputs, max_new_tokens=4)
    adapted = get_peft_model(captioner, config)
    written = adapted.generate(**inputs, max_new_tokens=4)
    assert not torch.equal(written, plain)
    adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None for name, p in adapted.named_parameters() if "lora_" in name)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.unload()
    captioner.load_state_dict(state)
    loaded = PeftModel.from_pretrained(captioner, str(tmp_path / "adapter"))
    assert torch.equal(loaded.generate(**inputs, max_new_tokens=4), written)
    merged = loaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    stored = VLVForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    assert stored.config.image_token_id == captioner.config.image_token_id
    assert torch.equal(stored.generate(**inputs, max_new_tokens=4), written)


def test_weights_on_disk_write_the_same(captioner, inputs, tmp_path):
    expected = captioner.generate(**inputs, max_new_tokens=3)
    captioner.save_pretrained(tmp_path / "model")
    parts = {"model": "cpu", "language_projection": "cpu", "language_model": "disk"}
    dispatched = VLVForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=parts, offload_folder=tmp_path / "offload"
    ).eval()
    assert all(p.device.type == "meta" for p in dispatched.language_model.parameters())
    assert torch.equal(dispatched.generate(**inputs, max_new_tokens=3), expected)


@pytest.mark.slow
def test_the_encoder_can_be_exported(tmp_path):
    """Of a vision backbone, of which a graph is made faster than of Florence-2."""
    parts = {"image_encoder_config": backbone_configs()["siglip"], "query_decoder_config": QUERY_DECODER_CONFIG}
    encoder = VLVModel(vlv_config(**parts, task_prompt_ids=[])).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.export.save(torch.export.export(encoder, (pixels,)), tmp_path / "encoder.pt2")
        exported = torch.export.load(tmp_path / "encoder.pt2").module()
        assert_close_to_scale(exported(pixels).conditioning, encoder(pixels).conditioning)


@pytest.mark.slow
def test_the_language_model_is_one_graph_with_a_static_cache(captioner, inputs):
    expected = captioner.generate(**inputs, max_new_tokens=6)
    forward, runs = captioner.language_model.forward, []

    def backend(graph: torch.fx.GraphModule, example_inputs: list):
        def run(*arguments):
            runs.append(graph)
            return graph.forward(*arguments)

        return run

    captioner.language_model.forward = torch.compile(forward, fullgraph=True, backend=backend)
    written = captioner.generate(**inputs, max_new_tokens=6, use_cache=True, cache_implementation="static")
    assert torch.equal(written, expected)
    new = written.shape[1] - inputs["input_ids"].shape[1]
    assert len(runs) == new > len(set(map(id, runs)))  # the prompt, and then a graph that is used again
