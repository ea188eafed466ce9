"""tokenizer.json in, a verdict out: a script in a process of its own, with limits, that opens and tries a tokenizer.

A tokenizer is a program that came with a model: its maps can be broken, its regular expressions can run without an end,
its normalizer can turn a character into gigabytes. Opened here first, it can do no more than end this process. Standard
input: the file. Standard output: JSON, {} for a good one, else {"wrong": why}. Imports nothing of lapis.
"""

import json
import resource
import sys
import time

BYTES, BYTES_EACH = 600_000_000, 30  # of address space, and for each byte of the file
OPENING, SECONDS = 60, 2.0  # of processor time, to open the largest and for all texts together
LONGEST = 2000  # characters of a text
GROWTH = 64  # ids for each character; a byte-level tokenizer has four at most
_CHARACTERS = "aZ0 \n\t'.!_-,é字😀\u0301\u200d\u00a0\ufdfa"


def texts() -> list[str]:
    """What a tokenizer meets, and what regular expressions and normalizers choke on."""
    runs = [character * LONGEST for character in _CHARACTERS]
    ends = [character * (LONGEST // 2) + other for character in _CHARACTERS[:8] for other in "!a0 "]
    mixed = [(one + other) * (LONGEST // 2) for one in _CHARACTERS[:10] for other in _CHARACTERS[:10] if one != other]
    plain = ["", "a", *_CHARACTERS, "The quick brown fox's 123 dogs.\n\n  Hello, world! 北京 안녕", "word " * 400]
    return [*plain, *runs, *ends, *mixed]


def main() -> None:
    sys.stderr.close()
    raw = sys.stdin.buffer.read()
    limit = BYTES + BYTES_EACH * len(raw)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (OPENING, OPENING + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    verdict = {}
    try:
        import tokenizers

        backend = tokenizers.Tokenizer.from_buffer(raw)
        backend.no_truncation()
        backend.no_padding()
        begin = time.process_time()
        seconds = int(begin + SECONDS) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))  # the kernel's own, whatever runs then
        for text in texts():
            ids = backend.encode(text).ids
            if len(ids) > GROWTH * (len(text) + 4):
                raise ValueError(f"it makes {len(ids):,} tokens of {len(text):,} characters")
            backend.decode(ids)
            if time.process_time() - begin > SECONDS:
                raise ValueError(f"texts of {LONGEST:,} characters take it more than {SECONDS:g} s")
    except BaseException as error:  # a panic of the library is no Exception
        verdict = {"wrong": " ".join(str(error).split())[:200] or type(error).__name__}
    sys.stdout.write(json.dumps(verdict))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
