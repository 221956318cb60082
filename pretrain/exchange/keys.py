"""Keys of ``config.json`` that every class of ``transformers`` shares, and other spellings of keys. Torch-free.

A key is one of four kinds: read by the architecture (its ``defaults``); in :data:`FIXED`, where the class computes
something else for another value and we do not; in :data:`HARMLESS`; or not known to the class, which is told.
Source: ``PreTrainedConfig``, the masks and the caches of ``transformers`` 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FIXED: Mapping[str, tuple[Any, ...]] = {
    # Without it the mask is bidirectional; null counts as false there.
    "is_causal": (True,),
    "sliding_window": (None,),
    "attention_chunk_size": (None,),
    "kv_sharing_modes": (None,),
    # Settings of single layers.
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}, []),
    "add_cross_attention": (None, False),
    "is_encoder_decoder": (None, False),
    # Names under which the settings of a composite model are looked for instead of the file's own.
    "text_config": (None,),
    "text_encoder": (None,),
    "decoder": (None,),
    "generator": (None,),
    # Attributes that the classes look up with the rest: other names, modules and files of weights.
    "attribute_map": (None,),
    "default_rope_type": ("default",),
    "default_theta": (10000.0,),
    "number_of_conv_states": (1,),
    "fusion_config": (None,),
    "transformers_weights": (None,),
}
"""Keys that any class would read, with the values that our models compute."""

PLAIN_WEIGHTS = ("quantization_config", "compression_config")
"""Keys that say that the weights are not plain numbers."""

HARMLESS = frozenset(
    [
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "_commit_hash",
        "_experts_implementation",
        "_experts_implementation_internal",
        "_from_auto",
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "auto_map",
        "base_model_ep_plan",
        "base_model_fsdp_plan",
        "base_model_pp_plan",
        "base_model_tp_plan",
        "bos_token_id",
        "chunk_size_feed_forward",
        "cross_attention_hidden_size",
        "custom_pipelines",
        "decoder_start_token_id",
        "distributed_config",
        "dtype",
        "eos_token_id",
        "experts_implementation",
        "finetuning_task",
        "gradient_checkpointing",
        "id2label",
        "is_decoder",
        "label2id",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "prefix",
        "problem_type",
        "return_dict",
        "sep_token_id",
        "task_specific_params",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tie_last_hidden_states",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "use_bfloat16",
        "use_cache",
        "assistant_confidence_threshold",
        "assistant_lookbehind",
        "bad_words_ids",
        "begin_suppress_tokens",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "encoder_repetition_penalty",
        "epsilon_cutoff",
        "eta_cutoff",
        "exponential_decay_length_penalty",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "length_penalty",
        "max_length",
        "min_length",
        "no_repeat_ngram_size",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_scores",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict_in_generate",
        "suppress_tokens",
        "target_lookbehind",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
    ]
)
"""Keys that say nothing about the logits: metadata, the types of weights, what a call returns, how text is drawn."""

LEGACY_LAYER_TYPES = {"mamba": "linear_attention", "attention": "full_attention"}
"""Older names of kinds of layers, and those of today."""

_SPECIAL_FLOATS = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}


def decoded(value: Any) -> Any:
    """A JSON value in which floats that JSON lacks are numbers; transformers 5 writes ``{"__float__": "Infinity"}``.

    Other tags stay as they are, which is no number.
    """
    if isinstance(value, dict):
        tag = value.get("__float__")
        if len(value) == 1 and isinstance(tag, str) and tag in _SPECIAL_FLOATS:
            return _SPECIAL_FLOATS[tag]
        return {key: decoded(item) for key, item in value.items()}
    return [decoded(item) for item in value] if isinstance(value, list) else value


def spelled_once(
    values: Mapping[str, Any], aliases: Mapping[str, str], defaults: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The settings under the names of ``defaults``, and a fault for each key whose spellings disagree.

    ``aliases``: key by other spelling. null counts as left out where it is the default.
    """
    result = {key: value for key, value in values.items() if key not in aliases}
    faults = []
    for key in dict.fromkeys(aliases.values()):
        names = [key, *(other for other, meant in aliases.items() if meant == key)]
        given = {name: values[name] for name in names if name in values}
        given = {name: value for name, value in given.items() if value is not None or defaults[key] is not None}
        if not given:
            continue
        first, *others = given.values()
        if any(current_names(other) != current_names(first) for other in others):
            shown = ", ".join(f"{name} = {value!r}" for name, value in given.items())
            faults.append(f"config.json: {shown}: two spellings of one setting, expected the same value; remove one")
        result[key] = first
    return result, faults


def current_names(kinds: Any) -> Any:
    """A list of kinds of layers under the names of today; anything else as it is."""
    if not isinstance(kinds, list):
        return kinds
    return [LEGACY_LAYER_TYPES.get(kind, kind) if isinstance(kind, str) else kind for kind in kinds]
