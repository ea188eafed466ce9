"""The process that runs a user's reward function. A script for functions.py; imports nothing of lapis.

The first line in names the function, as JSON; every further one is a reply to score, and gets one line back. What the
function prints goes to standard error.
"""

import importlib
import importlib.util
import inspect
import json
import os
import sys
from typing import Any


def main() -> None:
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a function prints must not be taken for an answer
    sys.path.insert(0, os.getcwd())  # as for a script that lies there: the user names a function of it
    function: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if function is None:
                function, options = find(request["target"]), request["options"]
                inspect.signature(function).bind(None, "", {}, **options)
                answer: dict[str, Any] = {"value": None}
            else:
                value = function(request["prompt"], request["reply"], request["record"], **options)
                answer = {"value": plain(value)}
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            answer = {"error": reason if function is None else f"raised {type(error).__name__}: {reason}"}
        try:
            text = json.dumps(answer)
        except (TypeError, ValueError):
            text = json.dumps({"error": f"returned {type(answer['value']).__name__}; expected a number"})
        out.write(text + "\n")
        out.flush()


def find(target: str) -> Any:
    """The function of `package.module:function` or `file.py:function`."""
    place, _, name = target.rpartition(":")
    if place.endswith(".py"):
        spec = importlib.util.spec_from_file_location(os.path.basename(place)[:-3], place)
        if spec is None or spec.loader is None or not os.path.isfile(place):
            raise ImportError(f"{place}: there is no such file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    function = getattr(module, name, None)
    if not callable(function):
        raise ImportError(f"{place} has no function {name}")
    return function


def plain(value: Any) -> Any:
    """An array or tensor of one number as that number."""
    if not isinstance(value, (int, float)) and hasattr(value, "item"):
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError):
            return value
    return value


if __name__ == "__main__":
    main()
