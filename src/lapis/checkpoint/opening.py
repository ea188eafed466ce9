"""A folder, or a model of the hub, becomes a Checkpoint: which files make up the model, and whether they agree."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lapis.checkpoint.adapter import CONFIG, open_adapter
from lapis.checkpoint.files import contained, read_json, read_object, stamp
from lapis.checkpoint.mxfp4 import unpacked
from lapis.checkpoint.store import Adapter, Checkpoint
from lapis.checkpoint.tensor_file import (
    INDEX,
    SHARD_NAME,
    SINGLE,
    Header,
    TensorInfo,
    holds_adapter,
    holds_delta,
    read_header,
)
from lapis.errors import CheckpointError
from lapis.families import find
from lapis.wording import format_count, format_part

if TYPE_CHECKING:
    from lapis.checkpoint.remote.model import RemoteModel

_AT_ONCE = 8  # headers that a server is asked for at a time


def open_checkpoint(source: str | os.PathLike[str], *, adapters: bool = False) -> Checkpoint:
    """Opens a model folder, or a model of the hub: config and headers are read and checked, no weight is.

    Args:
        source: A folder, or `owner/name` or `owner/name@revision` where no such folder is here; or an address
            (`https://`, `s3://`, `gs://`); or `MODEL+ADAPTER`, an adapter on a base that is given, each of them any of
            these.
        adapters: A folder that holds an adapter opens the model that it belongs to, with `adapter` set; otherwise it is
            refused.

    Raises:
        CheckpointError: For every damage that headers, index and config can show, before anything is allocated.
    """
    if (pair := _split(source)) is not None:
        if not adapters:
            raise CheckpointError(
                f"{source}: names an adapter on its base; make it a model with: lapis fuse {pair[1]} --base {pair[0]} "
                "--out DIR"
            )
        adapter = open_adapter(pair[1])
        opened = replace(base_of(adapter, pair[0]), source=str(source), adapter=adapter, front=adapter.root)
        if adapter.base and Path(adapter.base).name != Path(pair[0].partition("@")[0]).name:
            opened.notes.append(f"{pair[1]} says that it belongs to {adapter.base}; here it is put on {pair[0]}")
        return opened
    root, snapshot = Path(source), None
    if not os.path.isdir(source):
        from lapis.checkpoint.hub.models import find_model

        snapshot = find_model(source, INDEX)
        root = snapshot.root
    listed = [name for name in snapshot.sizes if "/" not in name] if snapshot else []
    present = sorted({*listed, *os.listdir(root)})
    if holds_adapter(present):
        if not adapters:
            raise CheckpointError(f"{source}: holds an adapter; make it a model with: lapis fuse {source} --out DIR")
        adapter = open_adapter(root)
        return replace(base_of(adapter), source=str(source), adapter=adapter, front=adapter.root)
    if holds_delta(present):
        raise CheckpointError(
            f"{source}: holds a delta; add it to a model with: lapis delta apply {source} --onto MODEL --out DIR"
        )
    if "config.json" not in present and (files := [name for name in present if name.endswith(".gguf")]):
        place = root / files[0]
        raise CheckpointError(
            f"{source}: holds a GGUF file; make a model folder of it with: lapis import {place} --out DIR"
        )
    if "config.json" not in present:
        raise CheckpointError(f"{source}: config.json is missing; give the folder of a model")
    config = read_object(contained(root, "config.json"))
    notes: list[str] = []

    def header_of(name: str) -> Header:
        if snapshot is not None and not snapshot.here(name) and name in snapshot.sizes:
            return snapshot.header(name)
        return read_header(contained(root, name))

    files = _weight_files(root, present, header_of, notes, snapshot)
    with ThreadPoolExecutor(_AT_ONCE if snapshot is not None else 1) as pool:
        headers = dict(zip(files, pool.map(header_of, files), strict=True))
    index: dict[str, TensorInfo] = {}
    for file, header in headers.items():
        for name, info in header.tensors.items():
            if name in index:
                raise CheckpointError(f"{root}: {name} stands in both {index[name].file.name} and {file}")
            index[name] = info
    _check_against_index(root, headers, notes)
    stats = {info.file: stamp(info.file.stat()) for info in index.values() if os.path.lexists(info.file)}
    if len(stats) < len({info.file for info in index.values()}):
        notes.append(
            "weights are read from a server in ranges: what writes a model compares the sha256 of files that it reads "
            "whole, what only looks does not"
        )
    if snapshot is not None and (bare := snapshot.unlisted(["config.json", *headers])):
        notes.append(
            f"unverified: the server lists no digest for {', '.join(bare[:4])}{' ...' if len(bare) > 4 else ''}"
        )
    return unpacked(
        Checkpoint(str(source), root, config, find(config), index, headers, notes, stats, snapshot=snapshot)
    )


def _split(source: str | os.PathLike[str]) -> tuple[str, str] | None:
    """The base and the adapter of `MODEL+ADAPTER`; None for a name that means one folder, or no adapter's."""
    text = os.fspath(source)
    if "+" not in text or os.path.lexists(text):
        return None
    pairs = [(text[:at].strip(), text[at + 1 :].strip()) for at, letter in enumerate(text) if letter == "+"]
    for base, adapter in pairs:
        if base and os.path.lexists(os.path.join(adapter, CONFIG)):
            return base, adapter
    from lapis.checkpoint.hub.models import hub_id
    from lapis.checkpoint.remote.folder import is_address

    for base, adapter in pairs:
        if is_address(adapter) or (hub_id(adapter) and (os.path.isdir(base) or hub_id(base))):
            return base, adapter
    return None


_CORRECT = f"set base_model_name_or_path in {CONFIG}"


def base_of(adapter: Adapter, base: str | os.PathLike[str] | None = None, remedy: str = _CORRECT) -> Checkpoint:
    """The model that an adapter belongs to: the given one, or where its config says (also seen from its own folder).

    Args:
        adapter: Opened.
        base: A folder or a model of the hub, in place of what the config says.
        remedy: What the refusal says to do.

    Raises:
        CheckpointError: Where it is not there.
    """
    if base is not None:
        return open_checkpoint(base)
    if not adapter.base:
        raise CheckpointError(f"{adapter.root}: {CONFIG} names no base_model_name_or_path; {remedy}")
    near = adapter.root / adapter.base
    place = adapter.base if os.path.isdir(adapter.base) or not os.path.isdir(near) else str(near)
    try:
        return open_checkpoint(place)
    except CheckpointError as error:
        reason = str(error).removesuffix("; give a folder")
        raise CheckpointError(f"{adapter.root}: its base cannot be opened: {reason}; {remedy}") from None


def _weight_files(
    root: Path,
    present: list[str],
    header_of: Callable[[str], Header],
    notes: list[str],
    snapshot: "RemoteModel | None",
) -> list[str]:
    """Names of the safetensors files that make up the model; says what lies beside them and is not read."""
    place = root if snapshot is None else snapshot.source
    pickles = [name for name in present if name.endswith((".bin", ".pt", ".pth", ".ckpt")) and "train" not in name]
    if INDEX in present:
        files = sorted(set(_weight_map(root).values()))
        missing = [name for name in files if name not in present and not os.path.lexists(root / name)]
        if missing:
            remedy = "fetch, or upload, the whole model" if snapshot is None else "ask its owner for the whole model"
            raise CheckpointError(
                f"{place}: {format_part(len(missing), len(files), 'shard', 'is', 'are')} missing: "
                f"{', '.join(missing[:4]):.400}; {remedy}"
            )
        if SINGLE in present and SINGLE not in files:
            _refuse_ambiguous(root, files, header_of)
            notes.append(f"{SINGLE} stands beside {INDEX} and lists the same tensors; the index was followed")
    elif SINGLE in present:
        files = [SINGLE]
    else:
        files = [name for name in present if SHARD_NAME.fullmatch(name)]
        if files and len(files) != int(SHARD_NAME.fullmatch(files[0])[2]):  # type: ignore[index]
            raise CheckpointError(
                f"{place}: {format_count(len(files), 'shard')}, but {files[0]} says otherwise; fetch the others"
            )
    if not files:
        if pickles:
            raise CheckpointError(
                f"{place}: {pickles[0]} is a pickle, which can run code and is never read; convert it to safetensors"
            )
        if snapshot is not None and snapshot.unasked:
            raise CheckpointError(
                f"{place}: its server cannot be asked ({snapshot.unasked}), and no weights of it are here; try again "
                "later, or give a folder"
            )
        raise CheckpointError(f"{place}: there is no {SINGLE} and no {INDEX}; fetch the weights, too")
    aside = [n for n in present if n.endswith(".safetensors") and n not in files and n != SINGLE]
    for names, why in ((pickles, "pickles are never read"), (aside, "not part of the index")):
        if names:
            notes.append(f"ignored {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}: {why}")
    return files


def _weight_map(root: Path) -> dict[str, str]:
    path = contained(root, INDEX)
    index = read_json(path)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(v, str) for v in names.values()):
        raise CheckpointError(f"{path}: weight_map must map each tensor to a file")
    return names


def _check_against_index(root: Path, headers: dict[str, Header], notes: list[str]) -> None:
    if not os.path.lexists(root / INDEX):
        return
    names = _weight_map(root)
    lacking = [n for n, file in names.items() if n not in headers[file].tensors]
    if lacking:
        file = names[lacking[0]]
        raise CheckpointError(
            f"{root}: {INDEX} puts {lacking[0]:.200} in {file:.200}, which lacks it ({len(lacking)} such in all)"
        )
    extra = [n for header in headers.values() for n in header.tensors if n not in names]
    if extra:
        notes.append(
            f"{format_count(len(extra), 'tensor is', 'tensors are')} in the shards but not in {INDEX}: "
            f"{', '.join(extra[:3])}"
        )


def _refuse_ambiguous(root: Path, shards: list[str], header_of: Callable[[str], Header]) -> None:
    def table(names: list[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
        headers = [header_of(name) for name in names]
        return {n: (info.dtype, info.shape) for header in headers for n, info in header.tensors.items()}

    if table([SINGLE]) != table(shards):
        raise CheckpointError(f"{root}: {SINGLE} and {INDEX} are both there and differ; remove the one that is stale")
