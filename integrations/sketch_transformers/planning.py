"""Models for ``sketch-plugins plan``: transformers' classes, made from configurations, without weights or network."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

#: Name -> (class of the configuration, class of the model, differences from the configuration's defaults).
#: The numbers are those of the published configurations of these names.
BUILT_IN: dict[str, tuple[str, str, dict[str, Any]]] = {}


def _add(names: str, config: str, architecture: str, **values: Any) -> None:
    for name in names.split():
        BUILT_IN[name] = config, architecture, values


_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_ROBERTA = {
    "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
_add("bert-base-uncased", "BertConfig", "BertForMaskedLM")
_add("bert-base-cased", "BertConfig", "BertForMaskedLM", vocab_size=28996)
_add("bert-large-uncased", "BertConfig", "BertForMaskedLM", **_LARGE)
_add("bert-large-cased", "BertConfig", "BertForMaskedLM", vocab_size=28996, **_LARGE)
_add("distilbert-base-uncased distilbert", "DistilBertConfig", "DistilBertForMaskedLM")
_add("roberta-base", "RobertaConfig", "RobertaForMaskedLM", **_ROBERTA)
_add("roberta-large", "RobertaConfig", "RobertaForMaskedLM", **_ROBERTA, **_LARGE)
_add("gpt2", "GPT2Config", "GPT2LMHeadModel")
_add("distilgpt2", "GPT2Config", "GPT2LMHeadModel", n_layer=6)
_add("gpt2-medium", "GPT2Config", "GPT2LMHeadModel", n_embd=1024, n_layer=24, n_head=16)
_add("gpt2-large", "GPT2Config", "GPT2LMHeadModel", n_embd=1280, n_layer=36, n_head=20)
_add("gpt2-xl", "GPT2Config", "GPT2LMHeadModel", n_embd=1600, n_layer=48, n_head=25)
_add("t5-small", "T5Config", "T5ForConditionalGeneration")
_add(
    "t5-base", "T5Config", "T5ForConditionalGeneration",
    d_model=768, d_ff=3072, num_layers=12, num_heads=12,
)  # fmt: skip
_add(
    "t5-large", "T5Config", "T5ForConditionalGeneration",
    d_model=1024, d_ff=4096, num_layers=24, num_heads=16,
)  # fmt: skip
_add("opt-125m", "OPTConfig", "OPTForCausalLM")
_add(
    "tinyllama-1.1b", "LlamaConfig", "LlamaForCausalLM",
    hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4,
    max_position_embeddings=2048,
)  # fmt: skip
_add(
    "llama-3.2-1b", "LlamaConfig", "LlamaForCausalLM",
    vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=131072, tie_word_embeddings=True,
)  # fmt: skip
_add("llama-2-7b", "LlamaConfig", "LlamaForCausalLM", max_position_embeddings=4096)
_add(
    "llama-3-8b", "LlamaConfig", "LlamaForCausalLM",
    vocab_size=128256, intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=8192,
)  # fmt: skip
_add(
    "qwen2.5-0.5b", "Qwen2Config", "Qwen2ForCausalLM",
    vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
    num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True,
)  # fmt: skip

#: Organizations of the hub under whose names some of these are found, too.
_OWNERS = (
    "google-bert", "distilbert", "FacebookAI", "openai-community", "google-t5", "facebook", "TinyLlama", "meta-llama",
    "Qwen",
)  # fmt: skip

TASKS: dict[str, str] = {
    "masked-lm": "AutoModelForMaskedLM",
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
}
_ENDINGS = {
    "ForMaskedLM": "masked-lm",
    "ForPreTraining": "masked-lm",
    "LMHeadModel": "causal-lm",
    "ForCausalLM": "causal-lm",
    "ForConditionalGeneration": "seq2seq-lm",
    "ForSequenceClassification": "sequence-classification",
}


class HuggingFaceModel:
    """A model of transformers, in the form that `sketch_plugins.memory.plan.plan` expects.

    Args:
        model: a name of `BUILT_IN`, a model directory, a file with a configuration, a name in the local hub cache, or a
            configuration. Nothing is downloaded.
        task: one of `TASKS`; None: the task of the configuration's architecture.
        seq_len: tokens of a sample.
        gradient_checkpointing: keep only the inputs of the layers.

    Raises:
        ValueError: an unknown name or task, a configuration that cannot be read, a sequence that is too long.
    """

    def __init__(
        self, model: Any, task: str | None = None, seq_len: int = 128, gradient_checkpointing: bool = False
    ) -> None:
        self.config, self.label = _configuration(model)
        self.task = _task(self.config, task)
        if self.task == "sequence-classification" and getattr(self.config, "pad_token_id", None) is None:
            # Decoders search for the last token before the padding, and refuse batches without a padding token.
            self.config = copy.deepcopy(self.config)
            self.config.pad_token_id = 0
        if self.task == "seq2seq-lm" and getattr(self.config, "decoder_start_token_id", None) is None:
            # Labels are shifted with this token, and any one will do; published configurations have one.
            self.config = copy.deepcopy(self.config)
            self.config.decoder_start_token_id = 0
        self.seq_len, self.gradient_checkpointing = seq_len, gradient_checkpointing
        positions = _positions(self.config)
        if positions is not None and seq_len > positions:
            raise ValueError(
                f"seq_len={seq_len} is larger than the {positions} positions of {self.label}: use a shorter one, "
                "or a config.json with more positions"
            )

    def build(self) -> nn.Module:
        """Make the model. Its weights are on the caller's present device."""
        with _quiet():
            try:
                model = getattr(transformers, TASKS[self.task]).from_config(self.config)
            except Exception as error:  # a model's class may raise any error for a wrong configuration
                raise ValueError(
                    f"{self.label}: this configuration makes no valid {self.config.model_type} "
                    f"({type(error).__name__}: {error})"
                ) from error
            if self.gradient_checkpointing:
                try:
                    model.gradient_checkpointing_enable()
                except ValueError as error:
                    raise ValueError(f"{self.label} does not support gradient checkpointing ({error})") from error
        return model

    def sample(self, batch_size: int) -> dict[str, Tensor]:
        """A batch without padding."""
        ids = torch.zeros(batch_size, self.seq_len, dtype=torch.int64)
        if self.task == "sequence-classification":
            return {"input_ids": ids, "labels": torch.zeros(batch_size, dtype=torch.int64)}
        return {"input_ids": ids, "labels": torch.zeros_like(ids)}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The loss as Trainer computes it: under autocast, accelerate converts all outputs of a model to float32."""
        with _quiet():
            try:
                outputs = model(**batch)
            except (ValueError, DataDependentOutputException, DynamicOutputShapeException):
                raise  # these errors say themselves what is wrong
            except Exception as error:  # a model may raise any error for tensors without numbers
                raise ValueError(
                    f"{self.label} cannot be run on {self.seq_len} tokens without values ({type(error).__name__}: "
                    f"{error}): try another length, precision or task"
                ) from error
        if torch.is_autocast_enabled("cpu"):
            outputs = {key: value.float() if torch.is_tensor(value) else value for key, value in outputs.items()}
            return outputs["loss"]
        return outputs.loss


def _configuration(model: Any) -> tuple[Any, str]:
    if isinstance(model, transformers.PretrainedConfig):
        return model, type(model).__name__.removesuffix("Config")
    name = os.fspath(model)
    if not name:
        raise ValueError("the model's name is empty: give a name, a directory or a config.json")
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise ValueError(f"{name} has no config.json: give the directory of a model, or a configuration's file")
    if path.is_file():
        return _read(path), name
    owner, _, last = name.rpartition("/")
    key = last.lower().removeprefix("meta-") if owner in ("", *_OWNERS) else name
    if key in BUILT_IN and not path.suffix == ".json":
        config, architecture, values = BUILT_IN[key]
        return getattr(transformers, config)(**values, architectures=[architecture]), name
    cached = _cached(name)
    if cached is not None:
        return _read(cached), name
    begun = [known for known in BUILT_IN if last and known.startswith(last.lower())]
    near = list(dict.fromkeys([*begun, *get_close_matches(last.lower(), BUILT_IN, 3)]))[:3]
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(
        f"unknown model {name!r}. {hint}It is neither a file, nor a directory, nor in the local cache of "
        f"the hub, and nothing is downloaded. Built-in models are {', '.join(BUILT_IN)}; for others give "
        "a path or a config.json"
    )


def _cached(name: str) -> Path | None:
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # the text cannot be a name on the hub
        return None
    return Path(found) if isinstance(found, str) else None


def _read(path: Path) -> Any:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a configuration in JSON: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise ValueError(f"{path} has no key 'model_type': give the config.json of a model of transformers")
    kind = values["model_type"]
    if kind not in transformers.CONFIG_MAPPING:
        raise ValueError(
            f"{path}: model_type {kind!r} is unknown to transformers {transformers.__version__}, and code "
            "that comes with a model is not executed. In Python, plan() accepts a function that makes any "
            "module"
        )
    try:
        with _quiet():
            return transformers.CONFIG_MAPPING[kind].from_dict(values)
    except Exception as error:  # a configuration's class may raise any error for wrong values
        raise ValueError(f"{path}: {kind} does not take these values: {error}") from error


def _task(config: Any, task: str | None) -> str:
    if task is None:
        for architecture in config.architectures or ():
            for ending, meant in _ENDINGS.items():
                if architecture.endswith(ending):
                    task = meant
        if task is None:
            from transformers.models.auto import modeling_auto

            mappings = {
                "seq2seq-lm": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
                "masked-lm": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
                "causal-lm": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
                "sequence-classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
            }
            task = next((name for name, kinds in mappings.items() if config.model_type in kinds), None)
    if task not in TASKS:
        if task is None:
            raise ValueError(
                f"no task is known for this kind of model, {config.model_type}: set one of {', '.join(TASKS)}. "
                "For other models, plan() accepts a function in Python that makes any module"
            )
        raise ValueError(f"task={task!r} is not known: use one of {', '.join(TASKS)}")
    if type(config) not in getattr(transformers, TASKS[task])._model_mapping:
        raise ValueError(
            f"task={task!r}: {config.model_type} has no model for this task; the tasks are {', '.join(TASKS)}"
        )
    return task


def _positions(config: Any) -> int | None:
    """The maximum length of a sequence; None if nothing limits it."""
    positions = next(
        (n for name in ("max_position_embeddings", "n_positions") if isinstance(n := getattr(config, name, None), int)),
        None,
    )
    if positions is None or positions < 0 or config.model_type in ("t5", "mt5", "umt5"):  # relative positions
        return None
    # Their positions begin after the number of the padding token.
    if config.model_type in ("roberta", "xlm-roberta", "camembert"):
        return positions - (config.pad_token_id or 0) - 1
    return positions


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress advice on generation, and on options that will be renamed."""
    logging: Any = transformers.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
