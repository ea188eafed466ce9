"""`lapis export`: a model as a file for other programs. `lapis import`: the way back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from lapis.cli.output import line, notes, progress, show, size
from lapis.wording import format_count


def export(
    model: str,
    /,
    *,
    gguf: Path,
    type: Annotated[Literal["bf16", "f16", "f32", "q8_0", "q5_1", "q4_0", "tq2_0"], Parameter(name="--type")] = "bf16",
    ollama: bool = False,
    text: Path | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Write a model as one GGUF file, for llama.cpp, Ollama and all that is built on them.

    The tokenizer is proved: 300 texts in many scripts, words of the vocabulary and every added token must have the ids
    that llama.cpp gives them by the file.

    Args:
        model: A model folder, or a model of the hub.
        gguf: The file to write.
        type: Of the matrices. q8_0 halves bf16 and costs next to nothing; q4_0 is a quarter; tq2_0 is for weights that
            have three values.
        ollama: Also write a Modelfile beside it, for `ollama create`.
        text: Text on which bits per byte are measured, before and after the weights are rounded.
        overwrite: Replace files that exist.
        json: Print one JSON object.
    """
    from lapis.formats.export import export_gguf

    with progress("exporting", "bytes") as report:
        result = export_gguf(
            model, gguf, type=type, ollama=ollama, text=text, overwrite=overwrite, progress=report
        )  # fmt: skip
    show(result.to_json(), json, lambda: _print(result.to_json()))


def import_(
    file: Path,
    /,
    *,
    out: str,
    dtype: Literal["bf16", "f16", "f32"] = "bf16",
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Make a model folder of a GGUF file: config, tokenizer, chat template, settings, and weights.

    What a file rounded stays rounded: a folder from a 4-bit file is no 16-bit model, and says so.

    Args:
        file: A .gguf file of a family that `lapis export` writes.
        out: A new folder.
        dtype: Of the weights that are written; f32 keeps exactly what the file says.
        overwrite: Swap an existing folder for the new one, whole.
        json: Print one JSON object.
    """
    from lapis.formats.importing import import_gguf

    with progress("importing", "bytes") as report:
        result = import_gguf(file, out, dtype=dtype, overwrite=overwrite, progress=report)
    show(result.to_json(), json, lambda: _print(result.to_json()))


def _print(result: Mapping[str, Any]) -> None:
    proof = result["tokenizer"]
    line(f"{result['out']}: {result['type']}, {size(result['bytes'])} in {result['seconds']:.1f} s")
    line(
        f"tokenizer ({proof['pre']}): equal ids on {format_count(proof['proved'], 'text')} in many scripts, "
        f"{format_count(proof['words'], 'word')} of its vocabulary, {format_count(proof['special'], 'text')} with "
        "added tokens"
    )
    if bits := result.get("bits_per_byte"):
        line(f"bits per byte: {bits['before']:.4f} before, {bits['after']:.4f} after rounding")
    if result.get("modelfile"):
        line(f"{result['modelfile']}: ollama create NAME -f {result['modelfile']}")
    notes(result["notes"])
