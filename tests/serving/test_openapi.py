"""Schemathesis on the OpenAPI document: whatever fits it, or just does not, is never answered with a 5xx.

500 cases here; `make serve-fuzz` tries LAPIS_FUZZ_CASES of them.
"""

import os

import schemathesis
from hypothesis import HealthCheck, settings

CASES = int(os.environ.get("LAPIS_FUZZ_CASES", "500"))
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/models", "/health")


def test_no_case_gives_a_5xx(server):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    counts: dict[int, int] = {}
    operations = [each.ok() for each in schema.get_all_operations()]
    assert {operation.path for operation in operations} > set(PATHS)
    for operation in operations:
        posts = operation.method.upper() == "POST"
        share = CASES // 5 if posts else max(CASES // 25, 1)

        @settings(
            max_examples=share, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True
        )
        @schema_given(operation)
        def case_is_answered(case) -> None:
            if isinstance(case.body, dict):  # what fits is computed, so it is kept short; and it names the model
                for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
                    if isinstance(case.body.get(name), int) and case.body[name] > 4:
                        case.body[name] = 4
                case.body.setdefault("max_tokens", 4)
                case.body["model"] = "tiny"
            reply = case.call(base_url=server.url, timeout=60)
            counts[reply.status_code] = counts.get(reply.status_code, 0) + 1
            assert reply.status_code < 500, (case.body, reply.text)
            if reply.status_code >= 400 and reply.headers["content-type"] == "application/json":
                assert set(reply.json()["error"]) == {"message", "type", "param", "code"}

        case_is_answered()
    print(f"answered: {counts}")
    assert sum(counts.values()) >= CASES * 0.8 and counts[200] and counts[400]


def schema_given(operation):
    """Cases that fit the document, and cases that do not."""
    from hypothesis import given
    from hypothesis import strategies as st
    from schemathesis import GenerationMode

    strategies = [
        operation.as_strategy(generation_mode=mode) for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    ]
    return given(st.one_of(strategies))
