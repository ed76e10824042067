"""Serve model.onnx with Flask and onnxruntime: DIGITS=digits/served flask --app examples/serving/flask_app run

In production behind a WSGI server: gunicorn --chdir examples/serving 'flask_app:create_app()'.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from digits_model import DigitsData, answers
from flask import Flask, jsonify, request
from werkzeug.exceptions import BadRequest, HTTPException

from trainyard.data.inference import prepare_batch


def create_app() -> Flask:
    folder = Path(os.environ.get("DIGITS", "served"))
    data = DigitsData.for_serving(folder / "preprocessing.json")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    (images_input,) = session.get_inputs()
    app = Flask(__name__)
    app.config["MAX_CONTENT_LENGTH"] = 1 << 20

    @app.get("/health")
    def health() -> Any:
        return {"status": "ok"}

    @app.post("/predict")
    def predict() -> Any:
        try:
            body = request.get_json()
            images = data.parse(body.get("images") if isinstance(body, dict) else None)
        except (ValueError, RecursionError) as error:  # the latter for a body of a thousand brackets
            raise BadRequest(str(error)) from error
        (logits,) = session.run(None, {images_input.name: prepare_batch(data, images).numpy()})
        return {"predictions": answers(torch.from_numpy(logits))}

    @app.errorhandler(HTTPException)
    def tell(error: HTTPException) -> Any:
        return jsonify(error=error.description), error.code

    return app
