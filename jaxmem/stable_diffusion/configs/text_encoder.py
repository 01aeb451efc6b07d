"""Settings of a CLIP text encoder: ``text_encoder/config.json``."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from jaxmem.stable_diffusion.settings import (
    Reading,
    SettingsReader,
    is_flag,
    is_none_or,
    is_number,
    is_whole,
)

# What transformers writes about training, generation and files; none of it reaches the last hidden state. A value of
# another type than transformers writes means something that is not known here.
_NUMBERS = "attention_dropout dropout initializer_factor initializer_range"
_WHOLE_NUMBERS = "bos_token_id eos_token_id pad_token_id projection_dim chunk_size_feed_forward"
_FLAGS = "output_attentions output_hidden_states return_dict is_encoder_decoder torchscript use_bfloat16 use_cache"
_WITHOUT_MEANING = (
    "transformers_version id2label label2id problem_type bad_words_ids diversity_penalty do_sample"
    " early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task forced_bos_token_id"
    " forced_eos_token_id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams"
    " num_return_sequences prefix remove_invalid_values repetition_penalty return_dict_in_generate sep_token_id"
    " task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k"
    " top_p typical_p begin_suppress_tokens suppress_tokens cross_attention_hidden_size decoder_start_token_id"
    " output_scores"
)


@dataclass(frozen=True)
class TextEncoderConfig:
    """The architecture of a CLIP text encoder; the defaults are ViT-L/14, Stable Diffusion 1.x's."""

    vocab_size: int = 49_408
    max_position_embeddings: int = 77
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float | int = 1e-5

    @classmethod
    def from_diffusers(
        cls, config: Mapping[str, Any], where: str = "text_encoder/config.json", reading: Reading | None = None
    ) -> "TextEncoderConfig":
        """Read ``text_encoder/config.json``; absent fields have transformers' ``CLIPTextConfig`` defaults.

        Raises:
            ValueError: naming every setting that is unknown, impossible or not supported.
        """
        nested = config.get("text_config")  # of a file of both towers, as transformers reads it
        if config.get("model_type") == "clip" and isinstance(nested, Mapping):
            config = {"model_type": "clip_text_model", **nested}
        r = SettingsReader(config, where, "CLIPTextModel", reading)
        values = dict(
            vocab_size=r.size("vocab_size", 49_408),
            max_position_embeddings=r.size("max_position_embeddings", 77),
            hidden_size=r.size("hidden_size", 512),
            intermediate_size=r.size("intermediate_size", 2048),
            num_hidden_layers=r.size("num_hidden_layers", 12),
            num_attention_heads=r.size("num_attention_heads", 8),
            hidden_act=r.choice("hidden_act", "quick_gelu", ("quick_gelu", "gelu")),
            layer_norm_eps=r.number("layer_norm_eps", 1e-5, 1e-12, 1e-2),
        )
        # Whatever it was saved as, diffusers makes the CLIPTextModel of it that model_index.json names, and the tensors
        # have to fit that: of the two others its last hidden states are a part.
        r.neutral(
            model_type=("clip_text_model", "clip"),
            architectures=(["CLIPTextModel"], None, ["CLIPTextModelWithProjection"], ["CLIPModel"]),
        )
        r.neutral(
            is_decoder=False, add_cross_attention=False, use_attention_mask=(False, None), pruned_heads=({}, None)
        )
        for names, check, expected in (
            (_NUMBERS, is_number, "a number"),
            (_WHOLE_NUMBERS, is_whole, "a whole number"),
            (_FLAGS, is_flag, "true or false"),
        ):
            for name in names.split():
                r.take(name, None, partial(is_none_or, check), f"{expected} or null")
        for name in ("dtype", "torch_dtype"):  # of the file; here everything is float32
            r.choice(name, None, (None, "float32", "float16", "bfloat16", "float64"))
        r.inert(*_WITHOUT_MEANING.split())
        r.finish()
        made = cls(**values)
        r.require(
            made.hidden_size % made.num_attention_heads == 0,
            f"num_attention_heads: expected a divisor of hidden_size {made.hidden_size}, got"
            f" {made.num_attention_heads}",
        )
        r.finish()
        return made

    def to_diffusers(self) -> dict[str, Any]:
        """The ``config.json`` that transformers reads."""
        # CLIP's vocabularies end with the two tokens around a text; the defaults of old transformers are ViT-L's.
        ends = {"bos_token_id": self.vocab_size - 2, "eos_token_id": self.vocab_size - 1}
        return {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **asdict(self), **ends}
