"""What goes to the hub, against a stub of its API; no test reaches the network."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from conftest import TEXT, Run
from huggingface_hub import ModelCard, errors
from huggingface_hub.utils import filter_repo_objects

import slimgpt
from slimgpt.checkpoint import hub
from slimgpt.errors import ConfigError, ResourceError

Checkpoint = Callable[[str], Path]


class StubApi:
    """Keeps the content of repositories, as the hub would have it."""

    files: ClassVar[dict[str, dict[str, bytes]]] = {}

    def __init__(self, library_name: str) -> None:
        assert library_name == "slimgpt"

    def create_repo(self, repo_id: str, *, exist_ok: bool) -> Any:
        assert exist_ok
        name = repo_id if "/" in repo_id else f"me/{repo_id}"
        self.files.setdefault(name, {})
        return SimpleNamespace(repo_id=name, url=f"hub:{name}")

    def file_exists(self, repo_id: str, filename: str) -> bool:
        return filename in self.files[repo_id]

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, ignore_patterns: list[str], commit_message: str
    ) -> None:
        files = [f for f in folder_path.rglob("*") if f.is_file()]
        names = (file.relative_to(folder_path).as_posix() for file in files)
        for name in filter_repo_objects(names, ignore_patterns=ignore_patterns):
            self.files[repo_id][name] = (folder_path / name).read_bytes()

    def upload_file(
        self, *, repo_id: str, path_or_fileobj: Path | bytes, path_in_repo: str
    ) -> None:
        content = path_or_fileobj
        self.files[repo_id][path_in_repo] = (
            content if isinstance(content, bytes) else content.read_bytes()
        )


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, bytes]]:
    """Repositories of a user who is logged in."""
    monkeypatch.setattr(hub, "HfApi", StubApi)
    monkeypatch.setattr(hub, "get_token", lambda: "secret")
    monkeypatch.setattr(hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(StubApi, "files", {})
    return StubApi.files


@pytest.fixture
def slim(slim_checkpoint: Checkpoint, tmp_path: Path) -> Path:
    return shutil.copytree(slim_checkpoint("llama"), tmp_path / "slim")


def test_prune_and_export_push_their_results(
    run: Run, tiny_checkpoint: Checkpoint, tmp_path: Path, stored: dict[str, dict[str, bytes]]
) -> None:
    slim = tmp_path / "slim"
    small = ("--calibration", TEXT, "--nsamples", "2", "--seqlen", "16")
    code, out, err = run(
        "prune", tiny_checkpoint("llama"), "--output", slim, *small, "--push-to-hub", "me/tiny"
    )
    assert code == 0, err
    assert "uploaded to hub:me/tiny" in err
    assert "hub:" not in out
    assert stored["me/tiny"] == {
        file.relative_to(slim).as_posix(): file.read_bytes()
        for file in slim.rglob("*")
        if file.is_file()
    }
    assert {"config.json", "model.safetensors", "README.md"} <= stored["me/tiny"].keys()


def test_the_state_of_a_run_stays_at_home(slim: Path, stored: dict[str, dict[str, bytes]]) -> None:
    (slim / ".slimgpt").mkdir()
    (slim / ".slimgpt" / "lock").touch()
    assert slimgpt.push(slim, "tiny") == "hub:me/tiny"
    assert not any("lock" in name for name in stored["me/tiny"])


def test_exported_file_gets_a_card_once(slim: Path, stored: dict[str, dict[str, bytes]]) -> None:
    report = slim / "pruning_report.json"
    report.write_text(report.read_text().replace('"base_model": "', '"base_model": "owner/', 1))
    file = slim / "slim-f16.gguf"
    file.write_bytes(b"GGUF")
    (slim / "Modelfile").write_text("FROM ./slim-f16.gguf")
    slimgpt.push(file, "me/gguf", str(slim))
    assert stored["me/gguf"].keys() == {"slim-f16.gguf", "Modelfile", "README.md"}
    data = ModelCard(stored["me/gguf"]["README.md"].decode()).data.to_dict()
    assert data["base_model"].startswith("owner/")
    assert data["base_model_relation"] == "quantized"
    assert data["library_name"] == "gguf"
    stored["me/gguf"]["README.md"] = b"mine"
    slimgpt.push(file, "me/gguf", str(slim))
    assert stored["me/gguf"]["README.md"] == b"mine"


def test_a_local_base_is_no_base_on_the_hub(
    tiny_checkpoint: Checkpoint, tmp_path: Path, stored: dict[str, dict[str, bytes]]
) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF")
    slimgpt.push(file, "me/gguf", str(tiny_checkpoint("llama")))
    card = stored["me/gguf"]["README.md"].decode()
    assert "base_model" not in card
    assert str(tmp_path.parent) not in card


@pytest.mark.parametrize("name", ["", "a/b/c", "-x/y", "me/two words", "me/.."])
def test_wrong_names(name: str, stored: dict[str, dict[str, bytes]]) -> None:
    with pytest.raises(ConfigError, match="push_to_hub") as error:
        hub.check_destination(name)
    assert error.value.hint


@pytest.mark.parametrize("verb", ["prune", "recover", "export"])
def test_nothing_is_done_without_a_login(
    verb: str,
    run: Run,
    slim: Path,
    tmp_path: Path,
    stored: dict[str, dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hub, "get_token", lambda: None)
    output = tmp_path / "out"
    code, _, err = run(verb, slim, "--output", output, "--push-to-hub", "me/tiny")
    assert code == 2
    assert "nobody is logged in" in err
    assert "hf auth login" in err
    assert not output.exists()


def test_offline(run: Run, slim: Path, stored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "is_offline_mode", lambda: True)
    code, _, err = run("export", slim, "--push-to-hub", "me/tiny")
    assert code == 2
    assert "offline" in err


def test_dry_run_pushes_nothing(run: Run, slim: Path, stored: dict[str, dict[str, bytes]]) -> None:
    code, _, err = run("prune", slim, "--dry-run", "--push-to-hub", "me/tiny")
    assert code == 2
    assert "--dry-run leaves nothing to push" in err
    assert not stored


def test_only_results_are_pushed(tmp_path: Path, stored: dict[str, dict[str, bytes]]) -> None:
    with pytest.raises(ConfigError, match=r"no pruning_report\.json"):
        slimgpt.push(tmp_path, "me/tiny")
    assert not stored


@pytest.mark.parametrize(
    "failure", [OSError("the network is down"), errors.HTTPError("the network is down")]
)
def test_failed_upload_leaves_the_result(
    failure: Exception,
    slim: Path,
    stored: dict[str, dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise failure

    monkeypatch.setattr(StubApi, "upload_folder", fail)
    with pytest.raises(
        ResourceError, match="not uploaded to me/tiny: the network is down"
    ) as error:
        slimgpt.push(slim, "me/tiny")
    assert f"hf upload me/tiny {slim}" in str(error.value.hint)
