"""A model folder to the hub: `lapis push DIR owner/name`.

huggingface_hub holds the token, the protocol and the bars; HF_ENDPOINT, HF_TOKEN and the login of `hf auth login` mean
what they mean everywhere, and the token is in no message. One commit has everything, made on the state that was looked
at, so that nobody else's files are written over in between; afterwards the hub's own listing is compared with what lies
here. A push that broke off goes on with the same command: what the hub has already is not sent again.
"""

import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from lapis.checkpoint.hub.repository import SHOWN, Repository, endpoint, list_files
from lapis.checkpoint.hub.shipment import README, Report, Shipment, shipment
from lapis.checkpoint.remote.requests import Refused
from lapis.errors import CheckpointError, ConfigError, LapisError, OutputError

Bar = Callable[[str], AbstractContextManager[Report]]
_STAYS = re.compile(
    r"\.gitattributes|README\.md|(LICENSE|LICENCE|NOTICE)[\w.-]*"
)  # of the hub's files, whatever is sent
_NAME = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}")
_TIMES = 3  # that the hub is asked before it counts as away
_MEANINGS = {
    401: "the hub does not take the token (401); log in with `hf auth login`, or set HF_TOKEN to one that may write",
    403: "the token may not write there (403); it needs the right to write, to you or to your organization",
    404: "the hub has no such owner or repository (404); check the name",
    409: "somebody else made or changed it in the meantime (409); run again",
    412: "it was changed on the hub in the meantime (412); run again",
    413: "a file is larger than the hub takes (413); write the model in smaller shards",
}  # fmt: skip


def push(
    folder: str | os.PathLike[str],
    name: str,
    *,
    private: bool | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    card: str | os.PathLike[str] | None = None,
    message: str = "",
    listed: Callable[[Shipment], None] = lambda what: None,
    bar: Bar = lambda label: nullcontext(lambda done, total: None),
) -> dict[str, Any]:
    """Sends a model to the hub.

    Args:
        folder: A model, an adapter, or GGUF files with what belongs to them.
        name: owner/name.
        private: Whether a new repository is; None leaves it to the hub's own rule (public, unless an organization has
            another). What is there already stays as it is.
        overwrite: Replace what a repository holds: files of the same name, and those of the model that is there and not
            in this one. Its history keeps them. Without it a repository that holds anything is refused.
        dry_run: Say what would be sent; the hub is not asked.
        card: A folder of `lapis card`, or its README.md, to go with it.
        message: Of the commit.
        listed: Called with what will be sent, before anything is.
        bar: Shows how far the reading is that comes before; while it sends, huggingface_hub's own bars show.

    Returns:
        `repository`, `files` (name -> bytes), `bytes`, `left_out` (name -> reason), `removed` (names on the hub),
        `notes`, `dry_run`; when it was sent `url`, `commit`, `created`.

    Raises:
        CheckpointError: For a folder that is no model, or is damaged.
        OutputError: Where the hub does not take it: no token, no right, a repository that exists, a file too large.
        ConfigError: For a name that is none.
    """
    if not _NAME.fullmatch(name) or ".." in name:
        raise ConfigError(f'push: "{name}" is no name on the hub; give owner/name')
    if os.path.isfile(folder):
        raise CheckpointError(f"push: {folder} is a file; give the folder that holds it")
    what = shipment(folder, card)
    listed(what)
    result: dict[str, Any] = {
        "repository": name, "files": what.sizes, "bytes": what.bytes, "left_out": what.left_out, "removed": [],
        "notes": what.notes, "dry_run": dry_run,
    }  # fmt: skip
    if dry_run:
        return result
    token = _token(name)
    with bar("reading what is sent") as report:
        what.check(report)
    before = _look(name)
    if before is not None and not overwrite and (there := [file for file in before.files if file != ".gitattributes"]):
        raise OutputError(
            f"{name}: is on the hub already, with {len(there)} file(s) such as {there[0]}; give --overwrite to replace "
            "them, or another name"
        )
    removed = [file for file in before.files if file not in what.files and not _STAYS.fullmatch(file)] if before else []
    with _hub(name, token, what.bytes) as notes:
        commit = _send(what, name, token, private, before, removed, message)
    after = list_files(name, "model", name, commit, tries=_TIMES)
    _compare(what, after)
    url = f"{endpoint()}/{name}"
    return {
        **result, "removed": removed, "notes": [*what.notes, *notes], "url": url, "commit": commit,
        "created": before is None,
    }  # fmt: skip


def _token(name: str) -> str:
    from huggingface_hub import constants, get_token

    if constants.is_offline_mode():
        raise OutputError(f"{name}: HF_HUB_OFFLINE is set, so nothing is sent; unset it")
    token = get_token()
    if not token:
        raise OutputError(f"{name}: there is no token; log in with `hf auth login`, or set HF_TOKEN")
    return token


def _look(name: str) -> Repository | None:
    """What the hub has under a name; None where it has nothing that this token sees."""
    try:
        return list_files(name, "model", name, None, tries=_TIMES)
    except Refused as refused:
        if refused.code == "RepoNotFound" or refused.status == 404:
            return None
        meaning = _MEANINGS.get(refused.status)
        raise OutputError(f"{name}: {meaning}" if meaning else str(refused)) from None
    except CheckpointError as error:
        raise OutputError(str(error)) from None


def _send(
    what: Shipment, name: str, token: str, private: bool | None, before: Repository | None, removed: list[str],
    message: str,
) -> str:  # fmt: skip
    """Makes the repository where there is none, and the commit. Returns the commit's hash."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(endpoint=endpoint(), token=token, library_name="lapis")
    if before is None:
        api.create_repo(name, private=private, repo_type="model")
    operations: list[Any] = [CommitOperationDelete(file) for file in removed]
    for file, path in what.files.items():
        add = CommitOperationAdd(file, str(path))
        add.upload_info.sha256 = bytes.fromhex(what.digests[file])  # it was read already
        operations.append(add)
    done = api.create_commit(
        name,
        operations,
        commit_message=message or f"{what.folder.name}, by lapis",
        parent_commit=before.commit if before else None,
    )
    return str(done.oid)


def _compare(what: Shipment, there: Repository) -> None:
    """Raises OutputError where the hub does not hold what was sent."""
    for name, size in what.sizes.items():
        listed = there.files.get(name)
        same = listed is not None and listed.size in (None, size)
        if listed is None or not same or (len(listed.digest) == 64 and listed.digest != what.digests[name]):
            state = "has no" if listed is None else "has another"
            raise OutputError(f"{there.name}: the hub {state} {name} after the commit {there.commit[:8]}; push again")


@contextmanager
def _hub(name: str, token: str, size: int) -> Iterator[list[str]]:
    """While inside, what the hub's library raises becomes one line, without the token; yields what it warned of.

    Args:
        name: Of the repository.
        token: That is in no message.
        size: Bytes that are sent: its bars are shown where that takes a while.
    """
    from huggingface_hub import errors
    from huggingface_hub import utils as hub_utils

    utils: Any = hub_utils
    notes: list[str] = []
    level = utils.logging.get_verbosity()
    quiet = utils.are_progress_bars_disabled()
    utils.logging.set_verbosity_error()  # its retries are told in several lines
    if size < SHOWN and not quiet:
        utils.disable_progress_bars()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield notes
        notes += [_words(warning.message, token) for warning in caught if README in str(warning.message)]
    except (LapisError, KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        if size >= SHOWN and not quiet:
            print(file=sys.stderr)  # its bar stands in the line
        raise _line(name, token, error, errors) from None
    finally:
        utils.logging.set_verbosity(level)
        if size < SHOWN and not quiet:
            utils.enable_progress_bars()


def _line(name: str, token: str, error: BaseException, errors: Any) -> BaseException:
    """The error of this library as one of ours; a fault of this machine's disk stays what it is."""
    where, text = f"{name}: ", _words(error, token)
    if file := re.match(r"Error while uploading '(.+)' to the Hub", text):
        where += f"{file[1]}: "
    if "LFS batch API returned errors" in text:
        why = text.split("`", 1)[-1]
        return OutputError(f"{where}the hub does not take a file: {why}; write the model in smaller shards")
    if "Invalid metadata in README.md" in text:
        why = text.partition("README.md.")[2].strip()
        return OutputError(f"{where}the hub does not take the head of README.md: {why}")
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    for one in chain:
        if isinstance(one, errors.HfHubHTTPError):
            status = int(one.response.status_code)
            answer = _words(one.server_message, token) if one.server_message else ""
            meaning = _MEANINGS.get(status, f"the hub answered with status {status}; try later")
            return OutputError(f"{where}{meaning}" + (f": {answer}" if answer else ""))
    for one in chain:
        if isinstance(one, errors.HTTPError):
            why = _words(one, token)
            return OutputError(f"{where}the hub cannot be reached, or broke off ({why}); the same command goes on")
        if isinstance(one, OSError):
            return one
    return OutputError(f"{where}what {endpoint()} answered is no hub's answer ({text})")


def _words(error: object, token: str) -> str:
    return (" ".join(str(error).replace(token, "***").split()) or type(error).__name__)[:300]
