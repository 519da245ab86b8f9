"""Writes a small language model and its tokenizer as a GGUF file, with the library of llama.cpp."""

from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

END = "<|endoftext|>"
TENSORS = {
    "embed_tokens": "token_embd",
    "layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def build_model() -> Qwen2ForCausalLM:
    torch.manual_seed(2)
    config = Qwen2Config(
        vocab_size=len(vocabulary()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        rope_theta=10000.0,
        eos_token_id=0,
        bos_token_id=None,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # otherwise they have the value that weights missing from a file have
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def vocabulary() -> list[str]:
    """EOS, the 256 bytes, and three merged words."""
    return [END, *bytes_to_unicode().values(), "do", "dog", "Ġa"]


def write_gguf(path: Path, model: Qwen2ForCausalLM, architecture: str = "qwen2", leave_out: str = "") -> Path:
    """Writes a model with tied embeddings, without the tensor `leave_out`; it has no padding token."""
    from gguf import GGUFWriter, TokenType

    config, words = model.config, vocabulary()
    writer = GGUFWriter(str(path), architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([TokenType.CONTROL, *[TokenType.NORMAL] * (len(words) - 1)])
    writer.add_token_merges(["d o", "do g", "Ġ a"])
    writer.add_eos_token_id(0)
    for name, tensor in model.model.state_dict().items():
        for old, new in TENSORS.items():
            name = name.replace(f"{old}.", f"{new}.")
        if name == leave_out:
            continue
        writer.add_tensor("output_norm.weight" if name == "norm.weight" else name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
