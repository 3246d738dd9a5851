# SPDX-License-Identifier: Apache-2.0
"""Hub ids: from the cache without a network, and sentences for what the hub says."""

from __future__ import annotations

import shutil

import huggingface_hub
import pytest
from huggingface_hub import errors

from gptq_compile.errors import ModelError
from gptq_compile.frontend.hub import locate
from gptq_compile.frontend.source import load_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_from_the_cache(cache, save_model):
    """The cache's layout as huggingface_hub documents it: refs/<name> holds a commit, snapshots/<commit> the files."""
    repo = cache / "models--acme--tiny"
    save_model(repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    source = load_source("acme/tiny", offline=True)
    assert (source.name, source.source) == ("tiny", "acme/tiny")
    assert source.params.shape("model.norm.weight") == (32,)
    assert load_source("acme/tiny", offline=True, revision=COMMIT).source == f"acme/tiny@{COMMIT}"
    shutil.rmtree(repo / "snapshots" / COMMIT)


def test_not_in_the_cache(cache):
    with pytest.raises(ModelError) as error:
        load_source("acme/absent", offline=True)
    assert str(error.value) == (
        "There is no folder 'acme/absent', the model 'acme/absent' is not in the cache, and you asked to stay offline. "
        "Check the name, or download it where there is a network with `hf download`."
    )


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (errors.LocalEntryNotFoundError("no network"), "is not in the cache, and the hub cannot be reached"),
        (errors.HFValidationError("bad"), "does not exist and is no hub id"),
        (OSError("connection reset"), "cannot be downloaded .connection reset"),
    ],
)
def test_what_the_hub_says(monkeypatch, raised, words):
    def fail(*args, **kwargs):
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=words):
        locate("acme/tiny", revision="v2")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (errors.RepositoryNotFoundError, "no model 'acme/tiny' at revision 'v2' on the hub"),
        (errors.RevisionNotFoundError, "has no revision 'v2'"),
        (errors.GatedRepoError, "is gated: accept its terms"),
    ],
)
def test_what_the_server_says(monkeypatch, kind, words):
    def fail(*args, **kwargs):
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=words):
        locate("acme/tiny", revision="v2")
