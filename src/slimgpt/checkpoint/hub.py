"""Upload a pruned model, or a file exported from a model, to the Hugging Face hub."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, errors, get_token, is_offline_mode
from huggingface_hub.utils import validate_repo_id

from slimgpt.checkpoint.card import CARD_FILE, export_card
from slimgpt.checkpoint.results import REPORT_FILE
from slimgpt.errors import ConfigError, ResourceError
from slimgpt.runtime.run_directory import STATE_DIR

# Of the HTTP library that the installed version uses.
_NetworkError = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]

log = logging.getLogger(__name__)


def check_destination(name: str) -> None:
    """Check that a model can be uploaded under this name, without asking the hub.

    Parameters
    ----------
    name : str
        The repository, as ``owner/name``, or ``name`` for one's own.

    Raises
    ------
    ConfigError
        If it is no name of a repository, if nobody is logged in, or in offline mode.
    """
    try:
        validate_repo_id(name)
    except errors.HFValidationError as err:
        raise ConfigError(
            f"push_to_hub={name!r}: {' '.join(str(err).split())}",
            hint="name a repository of yours on the hub, e.g. your-name/your-model",
        ) from None
    if is_offline_mode():
        raise ConfigError(
            f"nothing can be pushed to {name} in offline mode",
            hint="unset HF_HUB_OFFLINE, or upload the result later with `hf upload`",
        )
    if get_token() is None:
        raise ConfigError(
            f"nobody is logged in to the hub, so nothing can be pushed to {name}",
            hint="`hf auth login` asks for a token with write access",
        )


def push(output: str | Path, name: str, exported_from: str | None = None) -> str:
    """Upload a pruned model or an exported file to the Hugging Face hub.

    The repository is created if there is none, with the default visibility of its owner. The login
    is that of ``hf auth login``. To update the card after an evaluation, push again.

    Parameters
    ----------
    output : str or Path
        Directory of a pruned or recovered model, or a file that `slimgpt.export` has written.
    name : str
        The repository, as ``owner/name``, or ``name`` for one's own.
    exported_from : str, optional
        The model that was exported to the file `output`. The file then gets a model card, if the
        repository has none.

    Returns
    -------
    str
        Address of the repository.

    Raises
    ------
    SlimGPTError
        If the directory has no pruned model, nobody is logged in, or the upload fails.

    Examples
    --------
    >>> import slimgpt
    >>> slimgpt.push("slim", "your-name/SmolLM2-135M-slim")  # doctest: +SKIP
    """
    check_destination(name)
    output = Path(output)
    if not output.is_file() and not (output / REPORT_FILE).is_file():
        raise ConfigError(
            f"{output} has no {REPORT_FILE}",
            hint="name a directory that `slimgpt prune` or `slimgpt recover` has written",
        )
    log.info("uploading %s to %s", output, name)
    api = HfApi(library_name="slimgpt")
    with _uploading(output, name):
        repository = api.create_repo(name, exist_ok=True)
        if output.is_file():
            _push_file(api, output, repository.repo_id, exported_from)
        else:
            api.upload_folder(
                repo_id=repository.repo_id,
                folder_path=output,
                ignore_patterns=[f"{STATE_DIR}/**"],
                commit_message="Upload a model pruned with SlimGPT",
            )
    log.info("uploaded to %s", repository.url)
    return repository.url


def _push_file(api: HfApi, file: Path, name: str, exported_from: str | None) -> None:
    """Upload an exported file, its ``Modelfile``, and a card if there is none yet."""
    contents: dict[str, Path | bytes] = {file.name: file}
    if (modelfile := file.with_name("Modelfile")).is_file():
        contents[modelfile.name] = modelfile
    if exported_from is not None and not api.file_exists(name, CARD_FILE):
        contents[CARD_FILE] = export_card(file, exported_from).encode()
    for path, content in contents.items():
        api.upload_file(repo_id=name, path_or_fileobj=content, path_in_repo=path)


@contextmanager
def _uploading(output: Path, name: str) -> Iterator[None]:
    """Convert what the hub or the network says into an error for the user."""
    try:
        yield
    except (_NetworkError, OSError, ValueError) as err:
        raise ResourceError(
            f"{output} is complete, but was not uploaded to {name}: {' '.join(str(err).split())}",
            hint=f"`hf upload {name} {output}` uploads it without pruning again",
        ) from err
