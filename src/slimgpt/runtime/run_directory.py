"""The output directory of a run, and its state, which survives interruptions.

During a run, ``OUT/.slimgpt`` holds the manifest and the finished blocks, or training checkpoints.
Files are written under a temporary name, synced and renamed, except the checkpoints, which the
Trainer writes. Each file has a checksum, which is verified before the file is used. The result is
assembled in ``OUT/.slimgpt/result``, listed in the manifest and then moved to ``OUT``,
``config.json`` last.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from slimgpt.errors import DamagedRunError, OtherRunError, RunStateError
from slimgpt.runtime.distributed import broadcast, is_main
from slimgpt.runtime.files import describe_file, reading, replacing, sync, write_atomically, writing
from slimgpt.runtime.locks import writing_alone

STATE_DIR = ".slimgpt"

LAST_FILE = "config.json"

GENERATED_FILE, SCORES_FILE = "generated.safetensors", "scores.safetensors"

MEASUREMENT_FILE, TRIALS_FILE = "sensitivity.json", "trials.json"

BUDGET_FILE = "budget.json"

LOGITS_FILE = "logits-{}-{:05d}.safetensors"  # of a teacher, for some windows

CHECKSUMS_FILE = "checksums.json"  # of a training checkpoint, written last

# Purpose of a sequential pass: to measure sensitivity, or to prune.
Stage = Literal["sensitivity", "block"]

_PROGRESS = (
    GENERATED_FILE,
    SCORES_FILE,
    MEASUREMENT_FILE,
    TRIALS_FILE,
    BUDGET_FILE,
    "dropped-*.json",
    "sensitivity-*.safetensors",
    "block-*.safetensors",
    "logits-*.safetensors",
    f"checkpoint-*/{CHECKSUMS_FILE}",
)

_MANIFEST, _RESULT, _DRAFT, _LOCK = "manifest.json", "result", "result.tmp", "lock"

_MARK = '{"slimgpt": '  # start of every manifest


def dropped_file(number: int) -> str:
    """Name of the state file with the choice of a layer to drop."""
    return f"dropped-{number:05d}.json"


@dataclass(frozen=True)
class Manifest:
    """Identity and result of a run.

    Attributes
    ----------
    identity : dict
        Everything that the result depends on, as JSON values.
    result : dict or None
        Names of the result's files, relative to the output directory, and their descriptions;
        None until the result is complete.
    """

    identity: dict[str, Any]
    result: dict[str, str] | None = None

    @classmethod
    def read(cls, file: Path) -> "Manifest":
        """Read and check a manifest.

        Raises
        ------
        RunStateError
            If it is damaged, or names files outside the output directory.
        """
        with reading(file):
            values = json.loads(file.read_text(encoding="utf-8"))
            manifest = cls(values["identity"], values["product"])
            if values["slimgpt"] != manifest._checksum:
                raise ValueError("its checksum does not match")
            for name in manifest.result or ():
                path = PurePosixPath(name)
                if not path.parts or path.is_absolute() or ".." in path.parts:
                    raise ValueError(f"{name!r} is not a name inside the output directory")
        return manifest

    def write(self, file: Path) -> None:
        """Write the manifest atomically."""
        write_atomically(file, json.dumps({"slimgpt": self._checksum} | self._values) + "\n")

    @property
    def _values(self) -> dict[str, Any]:
        # The key "product" is that of version 0.1, whose interrupted runs are still read.
        return {"identity": self.identity, "product": self.result}

    @property
    def _checksum(self) -> str:
        return hashlib.sha256(json.dumps(self._values, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Run:
    """The output directory of a run, and its state.

    Attributes
    ----------
    output : Path
        The output directory.
    """

    output: Path

    @property
    def state(self) -> Path:
        """Directory with the state."""
        return self.output / STATE_DIR

    @property
    def is_complete(self) -> bool:
        """Whether the output directory holds a result and no more state."""
        return (self.output / LAST_FILE).exists() and not self.state.exists()

    @property
    def is_written(self) -> bool:
        """Whether the result is complete, even if not yet moved to its place."""
        return self._has_manifest and self._is_written(Manifest.read(self._manifest))

    @property
    def size(self) -> int:
        """Size of the state in bytes."""
        return sum(path.stat().st_size for path in self.state.rglob("*") if path.is_file())

    @property
    def has_begun(self) -> bool:
        """Whether the state has anything worth resuming."""
        return any(next(self.state.glob(pattern), None) for pattern in _PROGRESS)

    def block_file(self, index: int, stage: Stage = "block") -> str:
        """Name of the state file of a finished block."""
        return f"{stage}-{index:05d}.safetensors"

    def has(self, name: str) -> bool:
        """Whether the state has a file (which is then complete)."""
        return (self.state / name).exists()

    def all_have(self, name: str) -> bool:
        """Whether the state has a file, as the main process sees it; all processes ask together."""
        return broadcast(is_main() and self.has(name))

    def is_finished(self) -> bool:
        """`is_written`, as the main process sees it; all processes ask together."""
        return broadcast(is_main() and self.is_written)

    def cached(self, name: str, make: Callable[[], bytes]) -> Path:
        """Find a file of the state, or have the main process make it; all processes ask together.

        Parameters
        ----------
        name : str
            Its name.
        make : callable
            Gives its content.
        """
        if is_main() and not self.has(name):
            content = make()
            with self.saving(name) as temporary:
                temporary.write_bytes(content)
        broadcast(None)  # until it is there
        return self.saved(name)

    @contextmanager
    def saving(self, name: str) -> Iterator[Path]:
        """Write a file of the state; its checksum is written before the file is renamed.

        Yields
        ------
        Path
            The temporary name.

        Raises
        ------
        RunStateError
            If it cannot be written.
        """
        file = self.state / name
        with writing(self.output), replacing(file) as temporary:
            yield temporary
            write_atomically(_checksum_file(file), describe_file(temporary) + "\n")

    def saved(self, name: str) -> Path:
        """Find a file of the state, and verify its checksum.

        Raises
        ------
        RunStateError
            If it is damaged.
        """
        file = self.state / name
        with reading(file):
            if describe_file(file) != _checksum_file(file).read_text(encoding="utf-8").strip():
                raise ValueError("its checksum does not match")
        return file

    def read(self, name: str) -> str:
        """Text of a file of the state; all processes ask together."""
        return broadcast(is_main() and self.saved(name).read_text(encoding="utf-8"))

    def write(self, name: str, text: str) -> None:
        """Write a file of the state, which only the main process does."""
        if is_main():
            with self.saving(name) as temporary:
                temporary.write_text(text, encoding="utf-8")

    def check(self) -> None:
        """Check that a run can begin or go on here.

        Raises
        ------
        RunStateError
            If the output is no directory, has other files, or a state that is not SlimGPT's.
        """
        output = self.output
        with writing(output):
            if "\0" in str(output):
                raise OSError("a path cannot have a null character")
            if output.exists() and not output.is_dir():
                raise RunStateError(
                    f"the output {output} exists and is not a directory",
                    hint="choose another --output",
                )
            self._check_ours()
            if output.is_dir() and not self.state.exists() and any(output.iterdir()):
                raise _occupied(output)

    def check_made_with(self, asked: Mapping[str, Any], report: Mapping[str, Any]) -> None:
        """Check that a finished result was made with these options.

        Parameters
        ----------
        asked : mapping
            The options and inputs now, as JSON values.
        report : mapping
            Those in the report of the result; what it lacks is not compared.

        Raises
        ------
        OtherRunError
            If any differ; names them.
        """
        differences = [key for key in asked if key in report and report[key] != asked[key]]
        if differences:
            raise OtherRunError(
                f"{self.output} was made with other options: {', '.join(differences)}",
                hint="choose another --output, or move that directory away",
            )

    def discard(self, name: str) -> None:
        """Remove a file of the state that is no longer needed."""
        for file in (self.state / name, _checksum_file(self.state / name)):
            file.unlink()

    def forget(self) -> None:
        """Remove the state: what it has is no longer needed."""
        if is_main():
            self._forget()

    def identify(self, identity: dict[str, Any], restart: bool) -> None:
        """Compare the identity with that of an interrupted run, or record it for a new run.

        Parameters
        ----------
        identity : dict
            Everything that the result depends on, as JSON values.
        restart : bool
            Discard the state of an interrupted run.

        Raises
        ------
        OtherRunError
            If the interrupted run has another identity and progress to resume; names the
            differences.
        RunStateError
            If the run to discard is finished, the state is damaged, or the output directory
            has a file with the name of a result file.
        """
        now = json.loads(json.dumps(identity))
        if restart:
            is_published = False
            with suppress(DamagedRunError):  # a damaged manifest is discarded as well
                is_published = self._is_published(Manifest.read(self._manifest))
            if is_published:
                raise _occupied(self.output)
            self._forget()
        elif not (self.has_begun or self.is_written):
            self._forget()
        if not self._has_manifest:
            with writing(self.output):
                Manifest(now).write(self._manifest)
        manifest = Manifest.read(self._manifest)
        before = manifest.identity
        differences = {
            key: f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
            for key in before | now
            if before.get(key) != now.get(key)
        }
        if differences:
            raise OtherRunError(
                f"{self.output} holds an interrupted run that differs: "
                + "; ".join(differences.values()),
                hint=_how_to_go_on(before, differences.keys()),
            )
        if not self._is_written(manifest):
            self._check_free([LAST_FILE])

    @contextmanager
    def result(self) -> Iterator[Path]:
        """Assemble the result.

        Yields
        ------
        Path
            An empty directory for its files; they are synced to disk when the context ends.
        """
        draft, result = self.state / _DRAFT, self.state / _RESULT
        with writing(self.output):
            manifest = Manifest.read(self._manifest)
            self._withdraw(manifest)
            _remove(draft)
            draft.mkdir()
            yield draft
            for path in (*draft.rglob("*"), draft):
                sync(path)
            draft.rename(result)
            sync(self.state)
            files = sorted(path for path in result.rglob("*") if path.is_file())
            listed = {file.relative_to(result).as_posix(): describe_file(file) for file in files}
            Manifest(manifest.identity, listed).write(self._manifest)

    def publish(self) -> None:
        """Move the result to the output directory.

        Raises
        ------
        RunStateError
            If the output directory has files of the same names or cannot be written, or the
            result is damaged.
        """
        if not is_main():
            return
        manifest, result = Manifest.read(self._manifest), self.state / _RESULT
        if self._is_published(manifest):
            return
        paths = sorted(result.iterdir(), key=lambda path: path.name == LAST_FILE)
        self._check_free([path.name for path in paths])
        for name, description in (manifest.result or {}).items():
            file = next((f for f in (result / name, self.output / name) if f.is_file()), result)
            with reading(file):
                if file == result or describe_file(file) != description:
                    raise ValueError(f"{name} is not what was written")
        with writing(self.output):
            for path in paths:
                if path.name == LAST_FILE:
                    sync(self.output)
                path.rename(self.output / path.name)
            sync(self.output)

    @property
    def _manifest(self) -> Path:
        return self.state / _MANIFEST

    @property
    def _has_manifest(self) -> bool:
        return self._manifest.exists()

    def _is_written(self, manifest: Manifest) -> bool:
        has_result = (self.state / _RESULT).exists() and manifest.result is not None
        return has_result or self._is_published(manifest)

    def _is_published(self, manifest: Manifest) -> bool:
        """Whether the last file of the result is in its place."""
        last = self.output / LAST_FILE
        return (
            manifest.result is not None
            and last.is_file()
            and describe_file(last) == manifest.result.get(LAST_FILE)
        )

    def _check_free(self, names: list[str]) -> None:
        if taken := [name for name in names if (self.output / name).exists()]:
            raise RunStateError(
                f"{self.output} has other files of these names: {', '.join(taken)}",
                hint="move them away, then repeat the command",
            )

    def _check_ours(self) -> None:
        """Reject a state directory that is not SlimGPT's, before anything is changed."""
        state = self.state
        if not (state.is_symlink() or state.exists()):
            return
        problem = None
        if state.is_symlink() or not state.is_dir():
            problem = "is a link or a file, not a directory"
        elif link := next((path for path in _walk(state) if path.is_symlink()), None):
            problem = f"has a link, {link.relative_to(state)}"
        elif self._has_manifest:
            with self._manifest.open(encoding="utf-8", errors="replace") as opened:
                if opened.read(len(_MARK)) != _MARK:
                    problem = f"has a {_MANIFEST} that is not from slimgpt"
        elif stranger := next((path for path in _walk(state) if not _is_passing(path)), None):
            problem = f"has no {_MANIFEST}, but {stranger.relative_to(state)}"
        if problem:
            raise RunStateError(
                f"{state} {problem}, so it is not the state of an interrupted run",
                hint="choose another --output, or move it away",
            )

    @property
    def _is_over(self) -> bool:
        """Whether there is nothing to resume."""
        if not self._has_manifest:
            return True
        try:
            manifest = Manifest.read(self._manifest)
        except DamagedRunError:
            return False
        return self._is_published(manifest) or not (self.has_begun or self._is_written(manifest))

    def _withdraw(self, manifest: Manifest) -> None:
        """Remove the files of an unfinished result that are already in their place."""
        result = self.state / _RESULT
        if result.exists():  # from here on the result is incomplete
            _remove(self.state / _DRAFT)
            result.rename(self.state / _DRAFT)
        output = self.output.resolve()
        for name, description in (manifest.result or {}).items():
            file = (self.output / name).resolve()
            if file.is_relative_to(output) and file.is_file():
                if describe_file(file) == description:
                    file.unlink()
                with suppress(OSError):  # if it is not empty
                    if file.parent != output:
                        file.parent.rmdir()

    def _forget(self) -> None:
        """Remove the state except the lock: an unfinished result first, the manifest last."""
        with suppress(DamagedRunError):
            manifest = Manifest.read(self._manifest)
            if not self._is_published(manifest):
                self._withdraw(manifest)
        for path in sorted(self.state.iterdir(), key=lambda path: path.name == _MANIFEST):
            if path.name != _LOCK:
                _remove(path)


@contextmanager
def open_run(output: Path) -> Iterator[Run]:
    """Open and lock an output directory, which only the main process does.

    Parameters
    ----------
    output : Path
        The output directory: missing, empty, or with the state of a run.

    Yields
    ------
    Run
        Its state is removed when the result is published, or when there is nothing to resume.

    Raises
    ------
    RunStateError
        If the output has other files or a state that is not SlimGPT's, another process works on
        it, or it cannot be written.
    """
    run = Run(output)
    if not is_main():
        yield run
        return
    with writing(output):
        run.check()
        is_new = not output.exists()
        run.state.mkdir(parents=True, exist_ok=True)
    try:
        with writing_alone(output, lock_file=run.state / _LOCK):
            try:
                yield run
            finally:
                if run._is_over:
                    run._forget()
    finally:
        with suppress(OSError):  # that they are not empty
            run.state.rmdir()
            if is_new:
                output.rmdir()


def _checksum_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")


def _walk(directory: Path) -> Iterator[Path]:
    """List everything in a directory tree, without following links."""
    for folder, folders, names in os.walk(directory):
        yield from (Path(folder, name) for name in (*folders, *names))


def _is_passing(path: Path) -> bool:
    """Whether a file may exist in a state that has no manifest yet."""
    return path.name == _LOCK or path.suffix == ".tmp"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _occupied(output: Path) -> RunStateError:
    return RunStateError(
        f"the output directory {output} exists and is not empty",
        hint="choose another --output, or remove it first",
    )


def _how_to_go_on(before: dict[str, Any], differences: Any) -> str:
    variables = {
        "threads": f"OMP_NUM_THREADS={before.get('threads')}",
        "CPU capability": f"ATEN_CPU_CAPABILITY={str(before.get('CPU capability')).lower()}",
    }
    wanted = [setting for key, setting in variables.items() if key in differences]
    if len(wanted) == len(differences):
        return f"set {' and '.join(wanted)} to go on with it, or --restart to discard it"
    return "give the same options to resume it, or --restart to discard it"
