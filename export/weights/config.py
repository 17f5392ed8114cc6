"""Reading the configuration files beside weights, as data. Values that a network's graph cannot have are refused.

No library is loaded. The defaults of a class, for keys that a file lacks, are written down in its `Config`.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tilewright.runtime.bundle.strict import one_line
from tilewright.runtime.errors import InputError

__all__ = ["HARMLESS", "Config", "read_config", "read_json", "read_one_of"]

NAMING = ("_class_name", "architectures", "image_processor_type", "feature_extractor_type", "model_type")
HARMLESS = frozenset(  # keys that do not change a network's result
    (
        *NAMING,
        *("_name_or_path", "_commit_hash", "_diffusers_version", "transformers_version", "processor_class"),
        *("torch_dtype", "dtype", "torchscript", "use_bfloat16", "use_cache", "gradient_checkpointing"),
        *("_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "chunk_size_feed_forward"),
        # keys of training
        *("attention_dropout", "attention_probs_dropout_prob", "classifier_dropout", "drop_path_rate", "dropout"),
        *("dropout_rate", "hidden_dropout_prob", "initializer_factor", "initializer_range", "problem_type"),
        *("finetuning_task", "id2label", "label2id", "num_labels", "tf_legacy_loss", "task_specific_params"),
        # keys of generation, which old files contain for every network
        *("bad_words_ids", "begin_suppress_tokens", "decoder_start_token_id", "diversity_penalty", "do_sample"),
        *("early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty"),
        *("forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length", "min_length"),
        *("no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions"),
        *("output_hidden_states", "output_past", "output_scores", "pad_token_id", "prefix", "remove_invalid_values"),
        *("repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id", "suppress_tokens"),
        *(
            "temperature",
            "tie_encoder_decoder",
            "tie_word_embeddings",
            "tokenizer_class",
            "top_k",
            "top_p",
            "typical_p",
        ),
    )
)
LARGEST = 1 << 31  # upper bound of integers


@dataclass(frozen=True)
class Config:
    """The keys of a network's configuration file, and their meaning here. Any other key must be empty."""

    classes: tuple[str, ...]  # classes and model types that the file may name
    defaults: Mapping[str, Any]  # the keys that are read -> the default of the class
    must: Mapping[str, Any] = field(default_factory=dict)  # keys that must have one value -> the value
    silent: Mapping[str, Any] = field(default_factory=dict)  # default of the class for those, if it is another value
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # a key that is read -> its allowed values
    lists: tuple[str, ...] = ()  # keys that are read and may have one value for each block
    moot: tuple[str, ...] = ()  # keys of the class without an effect here
    wrappers: tuple[str, ...] = ()  # classes of larger models, whose files hold these keys under `inner`
    inner: str = ""
    number: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # a key -> the keys that a lone number sets
    fits: Callable[[Mapping[str, Any]], str | None] = lambda values: None  # a complaint if values do not fit together
    file: str = "config.json"

    def read(self, path: Path) -> dict[str, Any] | None:
        """The values of all keys that are read, from a file or from the file in a folder; none if it is missing."""
        path = path / self.file if path.is_dir() else path
        if not path.is_file():
            return None
        document = read_config(path, (*self.classes, *self.wrappers))
        if not set(_names(document)) & set(self.wrappers):
            return self.values_from(document, path)
        tower = document.get(self.inner) or document.get(f"{self.inner}_dict")
        if not isinstance(tower, dict):
            raise _refusal(path, f"holds no {self.inner!r}", f"give a folder with {self.classes[0]}")
        return self.values_from(tower, path)

    def values_from(self, document: Mapping[str, Any], path: Path) -> dict[str, Any]:
        """The values of all keys that are read, from a parsed file. `path` begins every complaint."""
        document = {key: _plain(self._spelled(key, value)) for key, value in document.items()}
        advice = f"give {self.classes[0]} as it was published"
        for key, value in document.items():
            if key in self.must:
                continue
            if key in self.defaults:
                if complaint := self._complaint(key, value):
                    raise _refusal(path, f"{key!r} is {_shown(value)}, {complaint}", advice)
            elif key not in self.moot and key not in HARMLESS and not _empty(value):
                raise _refusal(path, f"{key!r} is {_shown(value)}, which this graph cannot do", advice)
        for key, only in self.must.items():
            value = document.get(key, self.silent.get(key, only))
            if value != only and not (_empty(value) and _empty(only)):
                absent = "" if key in document else " by default"
                can = f"this graph does only {_shown(only)}"
                raise _refusal(path, f"{key!r} is {_shown(value)}{absent}, {can}", advice)
        values = {**self.defaults, **document}
        if complaint := self.fits(values):
            raise _refusal(path, complaint, advice)
        return {key: values[key] for key in self.defaults}

    def _complaint(self, key: str, value: Any) -> str | None:
        """A complaint about a value that the graph cannot have."""
        usual, parts = self.defaults[key], value if isinstance(value, tuple) else (value,)
        as_list = key in self.lists and isinstance(value, tuple) and not isinstance(usual, tuple)
        if not _alike(key, value, (usual,) if as_list else usual):
            return f"where one like {_shown(usual)} belongs"
        choices = self.choices.get(key)
        if choices and not all(part in choices for part in parts):
            return f"this graph can do only {', '.join(choices)}"
        return None

    def _spelled(self, key: str, value: Any) -> Any:
        lone = key in self.number and type(value) is int
        return dict.fromkeys(self.number[key], value) if lone else value


def read_one_of(configs: Sequence[Config], path: Path) -> dict[str, Any] | None:
    """The values of a file that may be of several classes, read as the class that it names."""
    path = path / configs[0].file if path.is_dir() else path
    if not path.is_file():
        return None
    names = _names(read_config(path, tuple(name for config in configs for name in config.classes)))
    return next(config for config in configs if set(names) & set(config.classes)).read(path)


def read_config(path: Path, classes: tuple[str, ...]) -> dict[str, Any]:
    """The content of a configuration file, which must name one of these classes."""
    document = read_json(path)
    if not set(names := _names(document)) & set(classes):
        what = f"is of class {', '.join(names)}" if names else "names no class"
        raise _refusal(path, f"{what}, expected is {' or '.join(classes)}", "is this the right folder?")
    return document


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        document = json.loads(path.read_bytes(), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise _refusal(path, f"not valid JSON ({str(error).splitlines()[0]})", "copy it again") from None
    except OSError as error:
        raise _refusal(path, f"{error.strerror}", "give a file that can be read") from None
    if not isinstance(document, dict):
        raise _refusal(path, f"holds {_shown(document)}, not an object", "copy it again")
    return document


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


def _names(document: Mapping[str, Any]) -> list[str]:
    """The class that a file names, or else the type of its model."""
    for key in NAMING:
        names = document.get(key)
        if names := [names] if isinstance(names, str) else names:
            return [str(name) for name in names] if isinstance(names, list) else []
    return []


def _plain(value: Any) -> Any:
    return tuple(_plain(inner) for inner in value) if isinstance(value, list) else value


def _empty(value: Any) -> bool:
    return value is None or value is False or value == "" or value in ((), {})


def _alike(name: str, value: Any, usual: Any) -> bool:
    """Whether a value has the type of the default and a possible size."""
    if isinstance(usual, tuple):
        return isinstance(value, tuple) and bool(value) and all(_alike(name, inner, usual[0]) for inner in value)
    if usual is None:
        return value is None or _alike(name, value, 0) or _alike(name, value, 0.0)
    if type(value) is int and type(usual) in (int, float):
        return 0 <= value < LARGEST and (value > 0 or usual <= 0 or name.endswith("_id"))
    if type(value) is float:
        return type(usual) is float and math.isfinite(value) and (value > 0 or usual <= 0)
    return type(value) is type(usual)


def _shown(value: Any) -> str:
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _refusal(path: Path, complaint: str, advice: str) -> InputError:
    return InputError(one_line(f"config {path}: {complaint}; {advice}"))
