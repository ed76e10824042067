"""TorchServe's handler: the archive has the TorchScript model, digits_model.py and preprocessing.json beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from digits_model import DigitsData, answers

from trainyard.data.inference import prepare_batch


class DigitsHandler:
    """`handle` gets as many requests as TorchServe has put together; a bad one does not spoil the others."""

    def initialize(self, context: Any) -> None:
        folder = Path(context.system_properties["model_dir"])
        gpu = context.system_properties.get("gpu_id")
        cuda = torch.cuda.is_available() and gpu is not None
        self.device = torch.device("cuda", int(gpu)) if cuda else torch.device("cpu")
        serialized = context.manifest["model"]["serializedFile"]
        self.model = torch.jit.load(folder / serialized, map_location=self.device).eval()
        self.data = DigitsData.for_serving(folder / "preprocessing.json")

    def handle(self, requests: list[dict[str, Any]], context: Any) -> list[Any]:
        replies: list[Any] = []
        parsed: list[tuple[int, torch.Tensor]] = []
        for number, request in enumerate(requests):
            replies.append(None)
            try:
                parsed.append((number, self.data.parse(_images(request))))
            except ValueError as error:
                context.set_response_status(code=400, phrase="Bad Request", idx=number)
                replies[number] = {"error": str(error)}
        if parsed:
            batch = prepare_batch(self.data, torch.cat([images for _, images in parsed]), self.device)
            with torch.inference_mode():
                logits = self.model(batch).split([len(images) for _, images in parsed])
            for (number, _), part in zip(parsed, logits, strict=True):
                replies[number] = {"predictions": answers(part)}
        return replies


def _images(request: dict[str, Any]) -> Any:
    """TorchServe has parsed the body if its content type said JSON."""
    body = request.get("body", request.get("data"))
    if isinstance(body, bytes | bytearray | str):
        try:
            body = json.loads(body)
        except (ValueError, RecursionError) as error:  # the latter for a body of a thousand brackets
            raise ValueError(f"the body is no JSON: {error}") from error
    return body.get("images") if isinstance(body, dict) else None
