"""Regular expressions from files in, which names they match out: a script in a process of its own, with limits.

A regular expression can take forever, and nothing in Python stops it; so one that came with an adapter is matched here,
with little processor time and memory. Standard input: JSON {keys, names}. Standard output, a line for each key: the
numbers of the names that it matches, or what is wrong with it. Imports nothing of lapis.
"""

import json
import re
import resource
import sys

SECONDS, BYTES = 1, 400_000_000

if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    request = json.load(sys.stdin)
    for key in request["keys"]:
        try:
            # PEFT's rule (peft/utils/other.py, get_pattern_key): any leading modules, then the expression to the end
            pattern = re.compile(rf"(.*\.)?({key})$")
            matches = [i for i, name in enumerate(request["names"]) if pattern.match(name)]
            print(json.dumps(matches), flush=True)
        except (re.error, OverflowError, RecursionError, MemoryError) as error:
            print(json.dumps(str(error) or type(error).__name__), flush=True)
