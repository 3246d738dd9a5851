# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: loaded through transformers, kept as the files that the artifact carries."""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

from gptq_compile.errors import ModelError
from gptq_compile.frontend.wording import first_line

log = logging.getLogger(__name__)

_VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json", "tiktoken.model",
)  # fmt: skip
# What goes into the artifact, and into a dequantized folder, beside tokenizer.json.
_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json")
# Texts on which a folder's tokenizer.json must agree with the tokenizer that transformers builds from the folder.
_PROBES = (
    "Hello world, it's 3.14159 o'clock!  Two  spaces.\n\n\tTabs; déjà vu, 你好, 🙂 and <|weird|> marks.",
    " leading space",
    "UPPER lower CamelCase snake_case 1234567890",
    "",
)


def load_tokenizer(folder: Path, *, gguf_file: str | None = None, trust_remote_code: bool = False) -> Any:
    """Loads a fast tokenizer.

    Raises:
        ModelError: if the folder has none, or one without a tokenizer.json form.
    """
    from transformers import AutoTokenizer

    if gguf_file is None and not any((folder / name).is_file() for name in _VOCABULARIES):
        raise ModelError(
            f"{folder} has no tokenizer: add tokenizer.json (and tokenizer_config.json) from the model's page."
        )
    kwargs = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code, **kwargs
            )
    except Exception as e:  # json, OSError, ValueError, ImportError or a Rust exception, by kind of damage
        what = f"The tokenizer of {folder / gguf_file if gguf_file else folder} cannot be read"
        raise ModelError(f"{what} ({first_line(e)}). Download its files again.") from e
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ModelError(
            f"The tokenizer of {folder} ({type(tokenizer).__name__}) exists only as Python code, and the artifact "
            "needs tokenizer.json. Look for a repository of this model that has one."
        )
    return tokenizer


def tokenizer_files(tokenizer: Any, folder: Path | None) -> dict[str, Path | bytes]:
    """The files an artifact needs to tokenize: name -> path, or content where it is made here.

    ``tokenizer.json`` is the folder's own where it tokenizes like the tokenizer transformers builds (some classes
    change what the file says), else the one transformers writes.

    Args:
        tokenizer: the loaded tokenizer.
        folder: where it came from; None writes everything from the tokenizer (GGUF).
    """
    if folder is not None and (folder / "tokenizer.json").is_file():
        if _same(folder / "tokenizer.json", tokenizer):
            names = ("tokenizer.json", *_COMPANIONS)
            return {name: folder / name for name in names if (folder / name).is_file()}
        kind = type(tokenizer).__name__
        log.warning("tokenizer.json of %s tokenizes unlike transformers' %s; the latter is used.", folder, kind)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        files: dict[str, Path | bytes] = {}
        for name in ("tokenizer.json", *_COMPANIONS):
            if (Path(scratch) / name).is_file():
                files[name] = (Path(scratch) / name).read_bytes()
    settings = json.loads(files.get("tokenizer_config.json", b"{}"))  # type: ignore[arg-type]
    for key in ("name_or_path", "gguf_file", "is_local", "local_files_only"):  # of this machine, not of the tokenizer
        settings.pop(key, None)
    files["tokenizer_config.json"] = json.dumps(settings, indent=2, ensure_ascii=False).encode()
    return files


def _same(path: Path, tokenizer: Any) -> bool:
    from tokenizers import Tokenizer

    try:
        own = Tokenizer.from_file(str(path))
    except Exception as e:  # tokenizers raises bare Exception
        raise ModelError(f"{path} is not a valid tokenizer.json ({first_line(e)}). Download it again.") from e
    return all(own.encode(text).ids == tokenizer(text)["input_ids"] for text in _PROBES)


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts the beginning-of-sequence token before a text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
