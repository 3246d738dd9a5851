# SPDX-License-Identifier: Apache-2.0
"""Loads what is compiled: config, lazily read weights, tokenizer, generation defaults and chat pieces."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptq_compile.checkpoint import artifact
from gptq_compile.checkpoint import config as gptq_config
from gptq_compile.checkpoint.artifact import ArtifactCheckpoint
from gptq_compile.checkpoint.config import GptqConfig
from gptq_compile.checkpoint.reader import QuantizedCheckpoint, transposed_weights
from gptq_compile.errors import ModelError
from gptq_compile.frontend import chat as chat_template
from gptq_compile.frontend import gguf, hooks
from gptq_compile.frontend.binding import bind
from gptq_compile.frontend.checkpoint import Checkpoint
from gptq_compile.frontend.hub import locate
from gptq_compile.frontend.tokenizer import adds_bos, load_tokenizer, tokenizer_files
from gptq_compile.frontend.trace import build_model, context_length
from gptq_compile.frontend.wording import first_line
from gptq_compile.passes.adopt_codes import QuantizedWeight
from gptq_compile.passes.program import ParamStore

log = logging.getLogger(__name__)

_OUTPUT_SWITCHES = ("output_attentions", "output_hidden_states", "return_dict_in_generate")


@dataclass(frozen=True)
class ModelSource:
    """One model as it was given.

    Attributes:
        name: short name: the folder's, the hub id's last part, or the GGUF file's without its suffix.
        source: what the user gave, with ``@revision`` where there was one.
        path: the folder or the GGUF file on this disk.
        config: the transformers config.
        params: the weights in float32 under the model's parameter names, read when asked for; the first read of a
            tensor refuses NaN and infinity.
        tokenizer: the transformers tokenizer.
        tokenizer_files: name -> path or content of the files that the artifact carries.
        generation: generation defaults as a plain dict.
        chat: the chat template in pieces (see :mod:`gptq_compile.frontend.chat`), or None.
        inputs: the files that were read.
        quantization: settings of a GPTQ checkpoint, or None; ``codes``: parameter name -> its codes, for the parameters
            that are stored as such, whose float weights in ``params`` are dequantized ones.
        notes: what the user should know about the checkpoint.
    """

    name: str
    source: str
    path: Path
    config: Any = field(repr=False)
    params: ParamStore = field(repr=False)
    tokenizer: Any = field(repr=False)
    tokenizer_files: dict[str, Path | bytes] = field(repr=False)
    generation: dict[str, Any] = field(repr=False)
    chat: dict[str, Any] | None = field(repr=False)
    inputs: tuple[Path, ...] = field(repr=False)
    quantization: GptqConfig | None = None
    codes: dict[str, QuantizedWeight] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()

    @property
    def vocab_size(self) -> int:
        """Rows of the logits."""
        return int(self._text("vocab_size"))

    @property
    def bos_token_id(self) -> int | None:
        """The token that starts a text: the tokenizer's, else the generation config's or the config's; or None."""
        for value in (self.tokenizer.bos_token_id, self.generation.get("bos_token_id"), self._text("bos_token_id")):
            if tokens := self._tokens(value):
                return tokens[0]
        return None

    @property
    def eos_token_ids(self) -> list[int]:
        """The tokens that end a text: the generation config's (as transformers), else the tokenizer's or config's."""
        for value in (self.generation.get("eos_token_id"), self.tokenizer.eos_token_id, self._text("eos_token_id")):
            if tokens := self._tokens(value):
                return tokens
        return []

    @property
    def add_bos(self) -> bool:
        """Whether a text is tokenized with the beginning-of-sequence token before it."""
        return adds_bos(self.tokenizer)

    @property
    def context_length(self) -> int:
        """Most positions the model takes."""
        return context_length(self.config)

    @property
    def parameter_count(self) -> int:
        """Weights in the checkpoint, tied ones once."""
        total = 0
        for name in self.params:
            size = 1
            for extent in self.params.shape(name):
                size *= extent
            total += size
        return total

    def hashes(self) -> dict[str, str]:
        """File name -> sha256 of the files the model was read from (reads them all: about a second per gigabyte)."""
        return dict(self._hashes)

    @functools.cached_property
    def _hashes(self) -> dict[str, str]:
        digests = {}
        for path in self.inputs:
            with path.open("rb") as f:
                digests[path.name] = hashlib.file_digest(f, "sha256").hexdigest()
        return digests

    def config_json(self) -> bytes:
        """config.json as transformers writes it."""
        return self.config.to_json_string(use_diff=True).encode()

    def generation_json(self) -> bytes:
        """generation_config.json."""
        return json.dumps(self.generation, indent=2).encode()

    def _tokens(self, value: Any) -> list[int]:
        """A token id or a list of them as a list, without those outside the vocabulary (defaults of config classes)."""
        values = value if isinstance(value, list | tuple) else [value]
        return [v for v in values if isinstance(v, int) and 0 <= v < self.vocab_size]

    def _text(self, key: str) -> Any:
        return getattr(self.config.get_text_config(), key, None)


def load_source(
    model: str, *, revision: str | None = None, offline: bool = False, trust_remote_code: bool = False
) -> ModelSource:
    """Opens a model; weights stay on disk until they are asked for.

    Args:
        model: a Hugging Face folder, a hub id, or a GGUF file.
        revision: branch, tag or commit of a hub id.
        offline: take a hub id from the cache only.
        trust_remote_code: run the Python code that the model's repository carries.

    Raises:
        ModelError: in one sentence, what is wrong with which file and what to do.
    """
    path = locate(model, revision=revision, offline=offline)
    source = f"{model}@{revision}" if revision else model
    if path.is_file():
        if path.suffix != ".gguf" and path.read_bytes()[:4] != b"GGUF":
            raise ModelError(f"{path} is a file but not a GGUF file. Give the folder it lies in, or a .gguf file.")
        return _load_gguf(path, source)
    return _load_folder(path, source, _short_name(model, path), trust_remote_code)


def _skeleton(config: Any) -> Any:
    """The model without weights, for its parameter names, shapes and ties.

    Raises:
        ModelError: if transformers has no causal language model for this config.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and "AutoModelForCausalLM" not in getattr(
        config, "auto_map", {}
    ):
        raise ModelError(
            f"transformers has no causal language model of type {config.model_type!r}; give a model that "
            "generates text."
        )
    with hooks.installed():
        return build_model(config, "eager")


def _short_name(model: str, path: Path) -> str:
    return path.resolve().name if Path(model).expanduser().exists() else model.rsplit("/", 1)[-1]


def _load_folder(folder: Path, source: str, name: str, trust_remote_code: bool) -> ModelSource:
    config = load_config(folder, trust_remote_code)
    compiled = artifact.read_settings(folder)
    quantization = gptq_config.parse(getattr(config, "quantization_config", None), folder)
    if hasattr(
        config, "quantization_config"
    ):  # the model is traced as the float one, and its config is written as such
        del config.quantization_config
    skeleton = _skeleton(config)
    checkpoint: Checkpoint
    if compiled is not None:
        checkpoint = ArtifactCheckpoint(folder, compiled)
        quantization = checkpoint.config
    elif quantization is not None:
        checkpoint = QuantizedCheckpoint(folder, quantization, transposed_weights(skeleton))
    else:
        checkpoint = Checkpoint(folder)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    files = tokenizer_files(tokenizer, folder)
    origins: dict[str, str] = {}
    params = bind(skeleton, checkpoint, origins)
    config.tie_word_embeddings = skeleton.config.tie_word_embeddings
    inputs = [folder / "config.json", *checkpoint.files, *(f for f in files.values() if isinstance(f, Path))]
    inputs += [f for f in (folder / "generation_config.json", folder / gptq_config.FILE) if f.is_file()]
    return ModelSource(
        name=name,
        source=source,
        path=folder,
        config=config,
        params=params,
        tokenizer=tokenizer,
        tokenizer_files=files,
        generation=_generation(config, folder),
        chat=chat_template.decompose(tokenizer),
        inputs=tuple(inputs),
        quantization=quantization,
        codes=checkpoint.bound(origins) if isinstance(checkpoint, QuantizedCheckpoint) else {},
        notes=tuple(checkpoint.notes) if isinstance(checkpoint, QuantizedCheckpoint) else (),
    )


def _load_gguf(path: Path, source: str) -> ModelSource:
    with gguf.reading_once():
        config = gguf.load_config(path)
        params = gguf.load_params(path, _skeleton(config))
        tokenizer = load_tokenizer(path.parent, gguf_file=path.name)
    return ModelSource(
        name=path.stem,
        source=source,
        path=path,
        config=config,
        params=params,
        tokenizer=tokenizer,
        tokenizer_files=tokenizer_files(tokenizer, None),
        generation=_generation(config, None),
        chat=chat_template.decompose(tokenizer),
        inputs=(path,),
    )


def load_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """The config of a Hugging Face folder.

    Raises:
        ModelError: no config.json, not valid JSON, an unknown model type, or quantized by another method than GPTQ.
    """
    from transformers import AutoConfig

    file = folder / "config.json"
    if not any(folder.iterdir()):
        raise ModelError(f"{folder} is an empty folder. Give the folder that holds config.json and the weights.")
    if not file.is_file():
        ggufs = sorted(folder.glob("*.gguf"))
        hint = f" It has {ggufs[0].name}: give the path of that file." if ggufs else ""
        raise ModelError(f"{folder} has no config.json, so it is not a Hugging Face model folder.{hint}")
    try:
        raw = json.loads(file.read_text("utf-8"))
        model_type = raw.get("model_type")
    except (OSError, ValueError, AttributeError) as e:
        raise ModelError(f"{file} is not a valid model config ({e}). Download it again.") from e
    gptq_config.parse(raw.get("quantization_config"), folder)  # refuses what is not GPTQ
    if raw.get("auto_map") and not trust_remote_code and not _known(model_type):
        raise ModelError(
            f"The model type {model_type!r} of {folder} runs Python code from its repository. Read that code, and if "
            "you trust it pass --trust-remote-code."
        )
    if not _known(model_type) and not raw.get("auto_map"):
        import transformers

        raise ModelError(
            f"The model type {model_type!r} in {file} is not known to transformers {transformers.__version__}. Check "
            "the config, or update transformers."
        )
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as e:  # a wrong value raises whatever the config class does
        raise ModelError(f"transformers does not accept {file} ({first_line(e)}).") from e


def _known(model_type: object) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return isinstance(model_type, str) and model_type in CONFIG_MAPPING


def _generation(config: Any, folder: Path | None) -> dict[str, Any]:
    from transformers import GenerationConfig

    if folder is not None and (folder / "generation_config.json").is_file():
        try:
            generation = GenerationConfig.from_pretrained(folder, local_files_only=True)
        except Exception as e:
            raise ModelError(f"{folder / 'generation_config.json'} is not valid ({first_line(e)}).") from e
    else:
        generation = GenerationConfig.from_model_config(config)
    values = generation.to_diff_dict()
    # What remains are sampling defaults; these describe a Python call or this machine.
    for key in ("_from_model_config", "transformers_version", "_commit_hash", "use_cache", *_OUTPUT_SWITCHES):
        values.pop(key, None)
    return values
