"""Models in Python packages: parts become one file, once, and never a wrong one."""

import errno
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import BinaryIO

import pytest

from slimgpt.errors import ConfigError, MissingDependencyError, ResourceError, SlimGPTError
from slimgpt.models import source
from slimgpt.models.source import EmbeddedModel, find_model

ALIAS = "in-parts"
PARTS = (b"GGUF", b"x" * 100_000, b"", b"end")
WHOLE = b"".join(PARTS)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """An embedded model in several packages, each with one part of a file."""
    parts = [f"some_model_part{number}/data/some.gguf.part{number}" for number in range(len(PARTS))]
    for part, content in zip(parts, PARTS, strict=True):
        file = tmp_path / "packages" / part
        file.parent.mkdir(parents=True)
        file.write_bytes(content)
        (file.parents[1] / "__init__.py").touch()
    model = EmbeddedModel(tuple(parts), "pip install some-model", hashlib.sha256(WHOLE).hexdigest())
    monkeypatch.setitem(source.EMBEDDED_MODELS, ALIAS, model)
    monkeypatch.setattr(source, "HF_ASSETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path / "packages")
    return [tmp_path / "packages" / part for part in parts]


def joined() -> Path:
    found = find_model(ALIAS)
    assert found.title == ALIAS
    return Path(found.location, str(found.gguf_file))


def test_parts_are_joined_once(packages: Sequence[Path]) -> None:
    file = joined()
    assert file.name == "some.gguf"
    assert file.read_bytes() == WHOLE
    before = file.stat()
    assert joined() == file
    assert file.stat() == before


def test_a_file_is_hashed_once(packages: Sequence[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    hashed, digest = [], hashlib.file_digest

    def look(opened: BinaryIO, name: str) -> object:
        hashed.append(opened.name)
        return digest(opened, name)

    file = joined()
    monkeypatch.setattr(hashlib, "file_digest", look)
    for _ in range(3):
        joined()
    assert hashed == [str(file)]


@pytest.mark.parametrize("content", [b"", WHOLE[:-1], b"y" * len(WHOLE)])
def test_a_damaged_file_in_the_cache_is_replaced(packages: Sequence[Path], content: bytes) -> None:
    file = joined()
    file.write_bytes(content)
    assert joined().read_bytes() == WHOLE


def test_a_link_in_the_cache_is_not_followed(packages: Sequence[Path], tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    file = joined()
    file.unlink()
    file.symlink_to(mine)
    assert joined().read_bytes() == WHOLE
    assert mine.read_text() == "mine"


def test_parts_that_give_another_file(packages: Sequence[Path], tmp_path: Path) -> None:
    packages[1].write_bytes(b"y" * 100_000)
    with pytest.raises(ConfigError, match="its 4 parts do not have the SHA-256") as error:
        joined()
    assert error.value.hint == "install it again: pip install some-model --force-reinstall"
    assert not list((tmp_path / "cache" / "slimgpt" / ALIAS).iterdir())


def test_a_missing_part(packages: Sequence[Path]) -> None:
    packages[2].unlink()
    with pytest.raises(ConfigError, match=r"not completely installed: .*part2 is missing") as error:
        joined()
    assert "--force-reinstall" in str(error.value.hint)


def test_a_missing_package(packages: Sequence[Path]) -> None:
    (packages[3].parents[1] / "__init__.py").unlink()
    with pytest.raises(MissingDependencyError, match="needs the package 'some-model-part3'") as err:
        joined()
    assert err.value.hint == "install it with: pip install some-model"


@pytest.mark.parametrize("problem", ["full", "no directory", "no file"])
def test_a_cache_that_cannot_be_written(
    problem: str, packages: Sequence[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    if problem == "full":

        def fill(*args: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(source.shutil, "copyfileobj", fill)
    elif problem == "no directory":
        cache.write_text("a file")
    else:
        (cache / "slimgpt" / ALIAS / "some.gguf").mkdir(parents=True)
    with pytest.raises(ResourceError, match="cannot join the 4 parts of the model") as error:
        joined()
    assert "HF_ASSETS_CACHE" in str(error.value.hint)
    assert not list(tmp_path.rglob("*.tmp"))


def test_several_that_join_at_the_same_time(packages: Sequence[Path], tmp_path: Path) -> None:
    barrier = Barrier(4)

    def join(_: int) -> bytes:
        barrier.wait()
        return joined().read_bytes()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(join, range(4))) == [WHOLE] * 4
    assert [file.name for file in (tmp_path / "cache").rglob("*.*")] == ["some.gguf"]


def test_names_of_embedded_models_are_suggested() -> None:
    with pytest.raises(SlimGPTError) as error:
        find_model("gemma3-270")
    assert "did you mean 'gemma3-270m'? available: smollm2-135m, gemma3-270m" in str(
        error.value.hint
    )
