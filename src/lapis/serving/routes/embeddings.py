"""POST /v1/embeddings: texts as vectors.

A causal model's is the mean of its last layer over the text's tokens. An encoder's is what its folder says that it was
trained for (sentence-transformers' 1_Pooling and 2_Normalize), else the mean as well.
"""

import base64

import torch
from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from lapis.errors import LapisError
from lapis.serving.engine.served import ServedModel
from lapis.serving.errors import ApiError
from lapis.serving.routes.bodies import CheckedRoute
from lapis.serving.routes.orders import checked_prompt, engine_of, model_of, prompts_of
from lapis.serving.routes.replies import while_connected
from lapis.serving.schema import EmbeddingsRequest

router = APIRouter(route_class=CheckedRoute, tags=["embeddings"])


@router.post("/v1/embeddings")
async def embeddings(body: EmbeddingsRequest, request: Request) -> JSONResponse:
    """A vector for each text."""
    served = model_of(request, body.model)
    width = served.model.config.dim
    if body.dimensions not in (None, width):
        raise ApiError(400, f"dimensions: {served.name} has vectors of {width} numbers", param="dimensions")
    texts = await run_in_threadpool(_encoded, body, served)
    vectors = await while_connected(request, [], _vectors(request, served, texts))
    packed = body.encoding_format == "base64"
    data = [
        {
            "object": "embedding",
            "index": i,
            "embedding": base64.b64encode(vector_D.numpy().tobytes()).decode() if packed else vector_D.tolist(),
        }
        for i, vector_D in enumerate(vectors)
    ]
    count = sum(map(len, texts))
    usage = {"prompt_tokens": count, "total_tokens": count}
    return JSONResponse({"object": "list", "model": served.name, "data": data, "usage": usage})


def _encoded(body: EmbeddingsRequest, served: ServedModel) -> list[list[int]]:
    """Ids of each text, checked."""
    result = []
    vocab = served.model.config.vocab
    for prompt in prompts_of(body.input):
        try:
            ids = served.tokenizer.encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else list(prompt)
        except LapisError as error:
            raise ApiError(400, served.hides(str(error)), param="input") from None
        if not ids or not 0 <= min(ids) <= max(ids) < vocab:
            what = "a text is empty" if not ids else f"ids go from {min(ids)} to {max(ids)} of {vocab:,}"
            raise ApiError(400, f"input: {what}", param="input")
        result.append(checked_prompt(served, ids, "input"))
    return result


async def _vectors(request: Request, served: ServedModel, texts: list[list[int]]) -> list[torch.Tensor]:
    """One text at a time, so that replies under way stand still for no longer than one takes."""
    return [await engine_of(request).compute(served.name, lambda each, ids=ids: embed(each, ids)) for ids in texts]  # type: ignore[misc]


@torch.inference_mode()
def embed(served: ServedModel, ids: list[int]) -> torch.Tensor:
    """The vector of a text, float32 [D] on the CPU. Raises LapisError where it has no numbers."""
    hidden_TD = served.model.hidden(torch.tensor([ids], device=served.model.embed.weight.device))[0].float()
    vector_D = hidden_TD[0] if served.pooling.first else hidden_TD.mean(0)
    if served.pooling.normalized:
        vector_D = torch.nn.functional.normalize(vector_D, dim=0)
    if not bool(vector_D.isfinite().all()):
        raise LapisError("the model's last layer is NaN or infinite; its weights are damaged or overflow")
    return vector_D.cpu()
