"""A SentencePiece model (BPE or Unigram) as a tokenizer of the tokenizers library, as transformers converts it.

The rules of a conversion are those of the class that a folder names (which ids come first, what stands before a text),
so transformers does it, with the sentencepiece library; both come with an extra. It sees copies of a few files and
nothing else, runs no code of the folder, and fetches nothing.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import tokenizers

from lapis.checkpoint.files import contained
from lapis.errors import CheckpointError, MissingExtra
from lapis.text.tokenizer.folder import CONFIG, has_file, read_object, write_json

MODELS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model")
BESIDE = ("special_tokens_map.json", "added_tokens.json")
CODE = ("auto_map", "custom_tokenizers", "tokenizer_file", "vocab_file", "name_or_path")  # never handed on


def model_file(folder: Path) -> str | None:
    """The name of the folder's SentencePiece model; None where there is none."""
    return next((name for name in MODELS if has_file(folder, name)), None)


def converted(folder: Path, name: str) -> tokenizers.Tokenizer:
    """The tokenizer that a SentencePiece model is, with the ids that transformers gives.

    Args:
        folder: Of the tokenizer; config.json or tokenizer_config.json says which class it has.
        name: Of the model's file in it.

    Raises:
        MissingExtra: transformers or sentencepiece is not installed.
        CheckpointError: The file is damaged, or of a class that transformers does not convert.
    """
    try:
        import google.protobuf  # noqa: F401  what transformers reads the file with
        import sentencepiece  # noqa: F401
        import transformers
    except ImportError:
        raise MissingExtra(
            f"{folder}: its tokenizer is a SentencePiece model ({name}); what converts it", "sentencepiece"
        ) from None
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place)
        for file in (name, *BESIDE):
            if has_file(folder, file):
                shutil.copyfile(contained(folder, file), copy / file)
        write_json(copy / CONFIG, _cleaned(read_object(folder, CONFIG)))
        kind = read_object(folder, "config.json").get("model_type")
        write_json(copy / "config.json", {"model_type": kind} if isinstance(kind, str) else {})
        try:
            opened = transformers.AutoTokenizer.from_pretrained(copy, local_files_only=True, trust_remote_code=False)
            return tokenizers.Tokenizer.from_str(json.dumps(json.loads(opened.backend_tokenizer.to_str())))
        except Exception as error:
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            reason = reason.replace(str(copy), str(folder))
            raise CheckpointError(f"{folder}: transformers cannot convert {name}: {reason:.200}") from None


def _cleaned(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in CODE}
