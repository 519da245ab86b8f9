"""The order of `--help`: VLV's own settings in groups, then those of `TrainingArguments` that have an effect here."""

import argparse
from collections.abc import Collection

GROUPS = {
    "models": (
        *("model", "image_encoder", "language_model", "gguf_file", "replace_language_model", "load_in_4bit"),
        *("diffusion_model", "t5_text_encoder"),
    ),
    "data": (
        *("images", "pairs", "split", "image_column", "image_root", "on_bad_image", "max_bad_share", "streaming"),
        *("caption_column", "prompt_column", "caption_lines", "on_bad_caption", "max_caption_tokens", "append_eos"),
        *("pad_to_max_length", "encoder_image_size", "pre_crop_size", "diffusion_image_size", "random_crop"),
        "horizontal_flip",
    ),
    "rounds of captions": (
        *("method", "rounds", "round_images", "round_steps", "num_captions", "temperature", "top_p"),
        *("sample_batch_size", "buffer_rounds", "pairs_share", "kl_weight", "clip_range"),
    ),
    "rewards": (
        *("reward_num_pairs", "reward_min_timestep", "reward_max_timestep", "reward_batch_size", "cache_rewards"),
        *("length_penalty", "fluency_floor"),
    ),
    "what is trained": (
        *("trainable", "unfreeze", "lora_rank", "encoder_lora_rank", "num_query_tokens", "attend_all_queries"),
        *("query_decoder_layers", "query_decoder_width", "query_decoder_heads", "query_decoder_dropout"),
        "ema_decay",
    ),
    "objective": (
        *("loss", "snr_gamma", "timestep_sampling", "min_timestep", "max_timestep", "embedding_dropout"),
        *("query_noise", "tail_drop", "noise_by_sample"),
    ),
    "steps and optimiser": (
        *("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
        *("learning_rate", "lr_scheduler_type", "warmup_steps", "adam_beta2", "weight_decay", "seed"),
    ),
    "evaluation and logging": (
        *("eval_images", "eval_pairs", "eval_share", "eval_steps", "per_device_eval_batch_size"),
        *("validation_steps", "num_validation_images", "logging_steps", "report_to", "disable_tqdm"),
        "stop_loss_factor",
    ),
    "the run": (
        *("output_dir", "export_decoder", "merge_lora_checkpoints", "save_only_trainable", "save_steps"),
        *("save_total_limit", "accept_changes", "overwrite_output_dir", "dry_run"),
    ),
    "precision, memory and speed": (
        *("bf16", "vae_dtype", "gradient_checkpointing", "encoder_activation_checkpointing"),
        *("language_model_activation_checkpointing", "diffusion_gradient_checkpointing", "channels_last"),
        *("compile_blocks", "shard_diffusion_model", "cache_moments", "cache_vision_features"),
        *("cache_conditioning", "conditioning_dtype", "packing", "dataloader_num_workers"),
    ),
}
"""Settings of all stages by the title of their group, in the order of `--help`."""
OTHER_OWN = "other settings of VLV"
INHERITED = "further settings, of transformers' TrainingArguments"

WITHOUT_EFFECT = {
    *("do_train", "do_eval", "do_predict", "local_rank"),  # of scripts that ask for them
    *("prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"),
    *("include_for_metrics", "batch_eval_metrics", "label_names"),  # of evaluations that collect predictions
    *("bf16_full_eval", "fp16_full_eval"),  # of evaluations outside a training
    *("include_num_input_tokens_seen", "length_column_name", "logging_nan_inf_filter", "skip_memory_metrics"),
    *("label_smoothing_factor", "remove_unused_columns"),  # have one allowed value
}
"""Settings of `TrainingArguments` that do nothing in these trainings. They are accepted, and `--help` lacks them."""


def arrange(parser: argparse.ArgumentParser, own: Collection[str]) -> None:
    """Sorts the options of a parser into groups.

    Args:
        own: Names of VLV's settings; those without a group come after the groups.
    """
    inherited = parser._optionals
    grouped = {name for names in GROUPS.values() for name in names}
    wanted = {**GROUPS, OTHER_OWN: [a.dest for a in inherited._group_actions if a.dest in set(own) - grouped]}
    sorted_groups = []
    for title, names in wanted.items():
        places = {name: place for place, name in enumerate(names)}
        actions = [a for a in inherited._group_actions if a.dest in places and a.dest not in WITHOUT_EFFECT]
        if actions:
            group = parser.add_argument_group(title)
            group._group_actions.extend(sorted(actions, key=lambda action: places[action.dest]))
            sorted_groups.append(group)
            inherited._group_actions[:] = [a for a in inherited._group_actions if a not in actions]
    for action in inherited._group_actions:
        if action.dest in WITHOUT_EFFECT:
            action.help = argparse.SUPPRESS
    inherited.title = INHERITED
    parser._action_groups[:] = [*sorted_groups, inherited]
