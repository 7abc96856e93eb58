"""Write the model card of an export from its run: data, options, metrics with intervals, and limits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from im2json.catalogue import labelled
from im2json.errors import UserError
from im2json.files import read_json
from im2json.options import OPTIONS, TrainConfig
from im2json.report.comparison import fields_table
from im2json.report.table import interval_text
from im2json.resume import PATHS
from im2json.runs import HUB_NAME, RunFolder, adapter_usage
from im2json.scoring import METRICS
from im2json.scoring.examples import kept_predictions
from im2json.scoring.scorecard import Scorecard
from im2json.text import escape_surrogates

EMBEDDED = {"model": "tiny", "dataset": "receipts"}


def model_card(run: RunFolder, scorecard: Scorecard, title: str, adapter_alone: bool, parity: str = "") -> str:
    """Return README.md of a model on the hub, with its YAML head. It holds no path of this machine.

    Args:
        scorecard: of the run's answers on the test split (see scoring.examples.score_predictions).
        parity: how the answers of the exported weights compare with the run's; empty if they were not compared.
    """
    config = run.read_config()
    version = run.read_stored()["versions"].get("im2json")
    parts = [
        f"---\n{_head(config, scorecard, title, adapter_alone)}\n---",
        f"# {title}",
        f"Reads a picture of a document as JSON: {_base(config)}, fine-tuned with QLoRA by im2json {version}.",
        _usage(run, config, adapter_alone),
        _data(run, config, scorecard),
        _metrics(scorecard),
        _options(config),
        _limits(run, config, scorecard, adapter_alone, parity),
    ]
    return escape_surrogates("\n\n".join(parts) + "\n")


LICENCES = {
    "google/paligemma": "gemma",
    "google/gemma-3": "gemma",
    "Qwen/Qwen3-VL": "apache-2.0",
    "Qwen/Qwen2.5-VL-3B": "other",
    "Qwen/Qwen2.5-VL-7B": "apache-2.0",
    "HuggingFaceTB/SmolVLM": "apache-2.0",
    "ibm-granite/granite-docling": "apache-2.0",
    "PaddlePaddle/PaddleOCR-VL": "apache-2.0",
    EMBEDDED["model"]: "apache-2.0",
}
"""Of bases, by the beginning of their names."""
NEEDED = {"qwen2_5_vl": "torchvision", "qwen3_vl": "torchvision", "smolvlm": "torchvision and num2words"}
"""Packages that transformers' own processor asks for, for videos, by the type of the base."""


def _head(config: TrainConfig, scorecard: Scorecard, title: str, adapter_alone: bool) -> str:
    data, base = config.data.dataset, config.model.model
    values = scorecard.metrics.compute()
    on_hub = _on_hub(data)
    results = [
        EvalResult(
            task_type="image-text-to-text", dataset_type=data if on_hub else "other", dataset_name=_shown(data),
            dataset_split="test", metric_type=name, metric_value=round(values[name], 4),
        )
        for name in METRICS
    ]  # fmt: skip
    fields: dict[str, Any] = dict(
        library_name="peft" if adapter_alone else "transformers",
        pipeline_tag="image-text-to-text",
        base_model=base if _on_hub(base) else None,
        license=next((licence for start, licence in LICENCES.items() if base.startswith(start)), None),
        datasets=[data] if on_hub else None,
        metrics=["field_f1", "exact_match"],
        tags=["im2json", "document-understanding"],
        model_name=title,
        eval_results=results,
    )
    return ModelCardData(**fields).to_yaml()


def _usage(run: RunFolder, config: TrainConfig, adapter_alone: bool) -> str:
    usage = adapter_usage(run.adapter) or {}
    prompt = json.dumps(usage.get("text", f"<image>{config.data.prompt}"), ensure_ascii=False)
    steps = []
    if config.data.trim != "off":
        steps.append(f"cut the picture by `im2json.data.trim.trimmed(picture, {config.data.trim!r})`")
    if config.data.letterbox:
        steps.append("pad it to a square with white")
    padded = f"\nAs in training, first {' and '.join(steps)}." if steps else ""
    if needed := NEEDED.get(usage.get("model_type", "")):
        padded += f"\nThis processor needs {needed}."
    if adapter_alone:
        form = "in NF4 with double quantisation" if config.model.quant == "nf4" else "as it is"
        return (
            '```python\nfrom im2json import Extractor\n\nextractor = Extractor.from_run("this folder, or its name")\n'
            'for row in extractor(["receipt.jpg"]):\n    print(row["json"])\n```\n\n'
            f"With PEFT alone: load the base {form}, then `PeftModel.from_pretrained(base, folder)`, and ask {prompt}. "
            f"The base is {_base(config)}.{padded}"
        )
    mask = ""
    if config.data.prefix_mask == "picture":
        mask = 'inputs["token_type_ids"] = (inputs["input_ids"] != model.config.image_token_id).long()\n'
        padded += "\nThe prompt attends causally, as vLLM computes it; without `token_type_ids` transformers differs."
    return (
        "```python\nfrom PIL import Image\nfrom transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
        'name = "this folder, or its name"\n'
        "processor = AutoProcessor.from_pretrained(name)\nmodel = AutoModelForImageTextToText.from_pretrained(name, "
        'dtype="auto")\npicture = Image.open("receipt.jpg").convert("RGB")\n'
        f'inputs = processor(images=picture, text={prompt}, return_tensors="pt").to(model.dtype)\n{mask}'
        'answer = model.generate(**inputs)[0, inputs["input_ids"].shape[1]:]\n'
        f"print(processor.decode(answer, skip_special_tokens=True))\n```{padded}"
    )


def _data(run: RunFolder, config: TrainConfig, scorecard: Scorecard) -> str:
    result = run.read_result()
    parts = {
        "data set": _shown(config.data.dataset),
        "configuration": config.data.dataset_config,
        "revision": config.data.revision,
        "examples seen in training": result and result.examples,
        "steps": result and result.step,
        "best step": result and result.best_step,
        "test examples": int(scorecard.metrics.compute()["num"]),
    }
    return "## Data\n\n" + "\n".join(f"- {name}: {value}" for name, value in parts.items() if value is not None)


def _metrics(scorecard: Scorecard) -> str:
    values, bounds = scorecard.metrics.compute(), scorecard.metrics.intervals()
    rows = [
        f"| {labelled(name)} | {values[name]:.3f} | {interval_text(bounds[name], '{:.3f} - {:.3f}')} |"
        for name in METRICS
    ]
    fields = fields_table(scorecard)
    return "\n".join([
        f"## Metrics\n\nOf generated text, on the {values['num']:.0f} examples of the test split, with 95 % intervals "
        "(Poisson bootstrap over examples):\n",
        "| metric | value | 95 % |",
        "|---|---|---|",
        *rows,
        *([f"\n```\n{fields}\n```"] if fields else []),
    ])  # fmt: skip


def _options(config: TrainConfig) -> str:
    """Return the table of the options that affect the result."""
    shown = {
        name: _shown(value) if name in PATHS else value
        for name, value in config.flat().items()
        if value is not None and OPTIONS[name].affects_result
    }
    rows = [f"| {name} | {_cell(value)} |" for name, value in shown.items()]
    return "\n".join(["## Options", "", "| option | value |", "|---|---|", *rows])


def _cell(value: Any) -> str:
    """Return a value as text that a cell of a Markdown table can hold."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _picture_size(processor: Path, letterbox: bool) -> str:
    """Return how pictures are shown to the model, for adapters of earlier versions, which do not say.

    Raises:
        UserError: if the processor's file does not say.
    """
    stored = read_json(processor)
    try:
        size = stored["image_processor"]["size"]
        form = "padded" if letterbox else "squashed"
        return f"a picture of {size['width']} x {size['height']} pixels, {form} to that square"
    except (KeyError, TypeError) as error:
        raise UserError(f"{processor} does not hold the size of the model's pictures") from error


def _limits(run: RunFolder, config: TrainConfig, scorecard: Scorecard, adapter_alone: bool, parity: str) -> str:
    values = scorecard.metrics.compute()
    usage = adapter_usage(run.adapter) or {}
    seen = usage.get("seen") or _picture_size(run.adapter / "processor_config.json", config.data.letterbox)
    limits = [
        f"Of {values['num']:.0f} test documents {1 - values['exact_match']:.0%} were read with some mistake, and "
        f"{1 - values['json_validity']:.0%} of the answers were not valid JSON. A misread digit looks like a right "
        "one: check what matters.",
        f"The model sees {seen}; what cannot be read at that size is guessed.",
        "It was measured on documents like those that it was trained on, and writes the keys that it was trained on; "
        "how it reads others is not known.",
    ]
    if any(prediction.constrained for prediction in kept_predictions(run, "test")):
        limits.append("These answers were held to a JSON Schema as they were written; transformers writes freely.")
    if not adapter_alone and config.model.quant == "nf4":
        limits.append(
            "LoRA is merged into the weights that the NF4 base of training stands for, not into the original's."
        )
    if parity:
        prepared = "" if config.data.trim == "off" else ", pictures trimmed as in training"
        limits.append(f"Loaded by plain transformers: {parity} (validation{prepared}).")
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits)


def _base(config: TrainConfig) -> str:
    base = config.model.model
    if base == EMBEDDED["model"]:
        return "im2json's embedded base of 8 M weights (the folder im2json/model/tiny of the package)"
    return _shown(base)


def _on_hub(name: str) -> bool:
    return name not in EMBEDDED.values() and re.fullmatch(HUB_NAME, name) is not None and not Path(name).exists()


def _shown(name: str) -> str:
    """Return the public name of a data set or model, which is the last part of a local path."""
    if name == EMBEDDED["dataset"]:
        return "synthetic receipts (im2json's own)"
    return name if _on_hub(name) or name in EMBEDDED.values() else Path(name).name
