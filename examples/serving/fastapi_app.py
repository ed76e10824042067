"""Serve model.pt2 with FastAPI: DIGITS=digits/served uvicorn --factory fastapi_app:create_app --app-dir examples/serving"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import torch
from digits_model import MOST, DigitsData, answers
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from trainyard.data.inference import prepare_batch

Ink = Annotated[int, Field(ge=0, le=16, strict=True)]
Row = Annotated[list[Ink], Field(min_length=8, max_length=8)]
Image = Annotated[list[Row], Field(min_length=8, max_length=8)]


class Request(BaseModel):
    """What does not fit is answered with 422 and the place of the mistake."""

    model_config = ConfigDict(extra="forbid")
    images: Annotated[list[Image], Field(min_length=1, max_length=MOST)]


def create_app() -> FastAPI:
    folder = Path(os.environ.get("DIGITS", "served"))
    data = DigitsData.for_serving(folder / "preprocessing.json")
    model = torch.export.load(folder / "model.pt2").module()
    app = FastAPI(title="Digits")

    @app.exception_handler(RequestValidationError)
    def refuse(request: object, error: RequestValidationError) -> JSONResponse:
        """FastAPI's own answer repeats the whole of the request."""
        told = [{"loc": each["loc"], "msg": each["msg"]} for each in error.errors()[:10]]
        return JSONResponse({"detail": told}, status_code=422)

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    # Not `async def`: FastAPI runs it in a thread, and the next request need not wait for torch.
    @app.post("/predict")
    def predict(request: Request) -> dict[str, Any]:
        images = torch.tensor(request.images, dtype=torch.uint8)
        with torch.inference_mode():
            return {"predictions": answers(model(prepare_batch(data, images)))}

    return app
