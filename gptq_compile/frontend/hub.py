# SPDX-License-Identifier: Apache-2.0
"""Finds a model: a folder, a GGUF file, or a hub id that is downloaded or taken from the cache."""

from __future__ import annotations

import re
from pathlib import Path

from gptq_compile.errors import ModelError
from gptq_compile.frontend.wording import first_line

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
# Everything but other formats of the same weights: safetensors, configs, tokenizers, templates, remote code.
_WANTED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py", "*.tiktoken"]
_UNWANTED = ["original/*", "consolidated*", "onnx/*", "*/*"]


def locate(model: str, *, revision: str | None = None, offline: bool = False) -> Path:
    """The local path of a model.

    Args:
        model: a folder, a ``.gguf`` file or a hub id such as ``HuggingFaceTB/SmolLM2-135M-Instruct``.
        revision: branch, tag or commit of a hub id.
        offline: look into the cache only.

    Raises:
        ModelError: if it is none of these, or neither the cache nor the network has it.
    """
    path = Path(model).expanduser()
    if path.exists():
        if revision is not None:
            raise ModelError(f"{model} is on this disk, so the revision {revision!r} has no meaning; leave it out.")
        return path
    if not _HUB_ID.fullmatch(model) or model.endswith((".gguf", ".safetensors", ".bin")):
        raise ModelError(f"{model} does not exist. Give a Hugging Face folder, a .gguf file, or a hub id (org/name).")
    return _download(model, revision, offline)


def _download(model: str, revision: str | None, offline: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = f"{model!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                local_files_only=offline,
                allow_patterns=_WANTED,
                ignore_patterns=_UNWANTED,
            )
        )
    except GatedRepoError as e:
        raise ModelError(
            f"The model {name} is gated: accept its terms on its page and log in with `hf auth login`."
        ) from e
    except RepositoryNotFoundError as e:
        raise ModelError(
            f"There is no folder {model!r} here and no model {name} on the hub (a private one needs `hf auth login`)."
        ) from e
    except RevisionNotFoundError as e:
        raise ModelError(f"The model {model!r} has no revision {revision!r}; its page lists them.") from e
    except HFValidationError as e:
        raise ModelError(f"{model} does not exist and is no hub id. Give a folder, a .gguf file, or org/name.") from e
    except LocalEntryNotFoundError as e:
        where = "you asked to stay offline" if offline else "the hub cannot be reached"
        raise ModelError(
            f"There is no folder {model!r}, the model {name} is not in the cache, and {where}. "
            "Check the name, or download it where there is a network with `hf download`."
        ) from e
    except OSError as e:
        raise ModelError(f"The model {name} cannot be downloaded ({first_line(e)}).") from e
