"""An exported model is the run's: its weights, answers and figures; and what the hub is sent is what was written."""

from __future__ import annotations

import base64
import json
import shutil
import threading
import types
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from helpers import clear_error
from huggingface_hub import ModelCard
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PaliGemmaForConditionalGeneration,
)

import im2json
from im2json.families import open_collator
from im2json.inference import plain
from im2json.runs import RunFolder
from im2json.scoring import METRICS
from im2json.scoring.examples import score_predictions

# The names in google/paligemma-3b-pt-224's model.safetensors.index.json, layers and modules within them aside.
HUB_NAMES = {
    "language_model.model.embed_tokens.weight",
    "language_model.model.layers",
    "language_model.model.norm.weight",
    "multi_modal_projector.linear.bias",
    "multi_modal_projector.linear.weight",
    "vision_tower.vision_model.embeddings.patch_embedding.bias",
    "vision_tower.vision_model.embeddings.patch_embedding.weight",
    "vision_tower.vision_model.embeddings.position_embedding.weight",
    "vision_tower.vision_model.encoder.layers",
    "vision_tower.vision_model.post_layernorm.bias",
    "vision_tower.vision_model.post_layernorm.weight",
}


@pytest.fixture
def export(cli, finished):
    """`export(folder, *flags)` runs the command on the finished run."""

    def run(folder: Path, *flags: object, source: Path = finished.path) -> Any:
        return cli("im2json.__main__", "export", source, "--out", folder, *flags)

    return run


@pytest.fixture
def in_process(monkeypatch):
    """Load what was exported here, which is faster; test_a_process_of_its_own does it as the command does."""

    def run(command: list[str], input: str, **_: object) -> Any:
        class Done:
            returncode, stderr, stdout = 0, "", json.dumps(plain.answers(**json.loads(input)))

        return Done

    monkeypatch.setattr("im2json.inference.export.subprocess.run", run)


def test_merged_weights(export, in_process, finished, tmp_path):
    folder = tmp_path / "new" / "model"
    result = export(folder)
    assert result.exit_code == 0, result.output
    assert "4 of 4 answers are the run's to the letter; field F1: the run 0.000, merged weights 0.000" in result.stdout
    weights = load_file(folder / "model.safetensors")
    assert {name.split("layers.")[0] + "layers" * ("layers." in name) for name in weights} == HUB_NAMES
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["architectures"] == ["PaliGemmaForConditionalGeneration"]
    assert (config["dtype"], config["text_config"]["num_image_tokens"]) == ("bfloat16", 4)
    loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    merged = im2json.Extractor.from_run(finished.path).decoder.model
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, merged.state_dict()[name].bfloat16()), name
    assert loaded.generation_config.max_new_tokens == 6
    assert AutoProcessor.from_pretrained(folder).image_seq_length == 4
    assert not [path for path in folder.parent.iterdir() if path != folder]
    assert all(path.stat().st_mode & 0o044 for path in folder.iterdir())


def test_merged_weights_in_fp32(export, in_process, finished, tmp_path):
    result = export(tmp_path / "out", "--merge-dtype", "fp32", "--parity", 1)
    assert result.exit_code == 0, result.output
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype="auto")
    merged = im2json.Extractor.from_run(finished.path).decoder.model.state_dict()
    for name, weight in loaded.state_dict().items():
        assert weight.dtype == torch.float32 and torch.equal(weight, merged[name]), name
    refused = export(tmp_path / "other", "--adapter-only", "--merge-dtype", "fp32")
    assert "--merge-dtype goes with merged weights: the adapter alone is a copy" in refused.output


def test_merged_weights_in_nf4(export, in_process, finished, tmp_path):
    """They load without the base, and what they stand for is the merged weights up to a step of NF4."""
    result = export(tmp_path / "out", "--quant", "nf4", "--merge-dtype", "fp32", "--parity", 0)
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["bnb_4bit_quant_type"], config["bnb_4bit_use_double_quant"]) == ("nf4", True)
    loaded: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.generation_config.max_new_tokens == 6
    merged = im2json.Extractor.from_run(finished.path).decoder.model.state_dict()
    in_4_bits = [name for name, weight in loaded.named_parameters() if weight.dtype == torch.uint8]
    assert sum("language_model.layers" in name for name in in_4_bits) == 7 * loaded.config.text_config.num_hidden_layers
    for name, weight in loaded.dequantize(torch.float32).state_dict().items():
        wanted = merged[name]
        if name not in in_4_bits:
            assert torch.equal(weight.float(), wanted.bfloat16().float()), name
        else:
            assert (weight - wanted).abs().max() < 0.2 * wanted.abs().max() and not torch.equal(weight, wanted), name
    assert "--quant goes with merged weights" in export(tmp_path / "x", "--adapter-only", "--quant", "nf4").output


def test_a_run_with_a_causal_prompt(export, in_process, train, finished, tmp_path):
    """Its adapter records the mask, and plain transformers gives its answers if it is told the prompt's type."""
    run = train(tmp_path / "run", "--prefix-mask", "picture")
    usage = json.loads((run.adapter / "im2json.json").read_text())
    assert usage["prefix_mask"] == "picture"
    result = export(tmp_path / "out", source=run.path)
    assert result.exit_code == 0, result.output
    assert "4 of 4 answers are the run's to the letter" in result.stdout
    assert json.loads((tmp_path / "out" / "im2json.json").read_text())["prefix_mask"] == "picture"
    assert 'inputs["token_type_ids"] = ' in (tmp_path / "out" / "README.md").read_text()
    again = im2json.Extractor.from_run(run.adapter)
    assert again.decoder.collator.both_ways == 4
    assert im2json.Extractor.from_run(finished.adapter).decoder.collator.both_ways is None
    assert weights_of(run) != weights_of(finished)


def weights_of(run: RunFolder) -> bytes:
    return (run.adapter / "adapter_model.safetensors").read_bytes()


def test_refused_where_the_answers_differ(export, in_process, finished, tmp_path):
    run = RunFolder(Path(shutil.copytree(finished.path, tmp_path / "run")))
    lines = [json.loads(line) for line in run.predictions_file.read_text().splitlines()]
    for row in lines:
        row["text"] += "!" if row["split"] == "validation" and row["id"] == "validation/0.png" else ""
    run.predictions_file.write_text("".join(json.dumps(row) + "\n" for row in lines))
    error = clear_error(export(tmp_path / "out", source=run.path))
    assert error.startswith("not exported: 3 of 4 answers are the run's")
    assert error.endswith("less than --parity 0.9 of them")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert export(tmp_path / "out", "--parity", "0.75", source=run.path).exit_code == 0


def test_examples_that_changed_since_the_run_began_are_not_compared(export, in_process, finished, tmp_path):
    run = RunFolder(Path(shutil.copytree(finished.path, tmp_path / "run")))
    record = json.loads(run.splits.read_text())
    record["validation"]["validation/0.png"] = "0123456789abcdef 0123456789abcdef"
    run.splits.write_text(json.dumps(record))
    result = export(tmp_path / "out", source=run.path)
    said = "3 of 3 answers are the run's to the letter (1 left out, because their examples changed since the run began)"
    assert said in result.stdout
    record["validation"] = dict.fromkeys(record["validation"], "0123456789abcdef 0123456789abcdef")
    run.splits.write_text(json.dumps(record))
    error = clear_error(export(tmp_path / "none", source=run.path))
    assert "of the 4 validation examples that the run has answers to, none is what it was when the run began" in error


def test_fields_of_the_two_models_are_compared(export, finished, tmp_path, monkeypatch):
    run = RunFolder(Path(shutil.copytree(finished.path, tmp_path / "run")))
    lines = [json.loads(line) for line in run.predictions_file.read_text().splitlines()]
    for row in lines:
        row |= {"text": '{"a": "1", "b": "2"}', "target": {"a": "1", "b": "2"}}
    run.predictions_file.write_text("".join(json.dumps(row) + "\n" for row in lines))
    texts = ['{"a": "1", "b": "2"}', '{"b": "2", "a": "1"}', '{"a": "1", "b": "3"}', "nothing"]
    collator = open_collator(run.read_config().model.model, "extract JSON.")
    written = Mock(return_value=[{"text": text} for text in texts[:2] * 2], **{"decoder.collator": collator})
    monkeypatch.setattr("im2json.inference.export.write_merged", lambda *_: written)
    monkeypatch.setattr(
        "im2json.inference.export.subprocess.run",
        lambda *_, **__: types.SimpleNamespace(returncode=0, stdout=json.dumps(texts)),
    )
    result = export(tmp_path / "out", "--parity", "0.25", source=run.path)
    assert result.exit_code == 0, result.output
    said = (
        "1 of 4 answers are the run's to the letter; field F1: the run 1.000, merged weights 1.000 (+0.000, too few "
        "for an interval), plain generate 0.714 (-0.286, too few for an interval)"  # 2 * 5 / (8 + 6)
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert said in result.stdout and said in card
    assert "\nlibrary_name: transformers\n" in card and "\n# out\n" in card


def test_answers_held_to_a_schema_are_not_compared_and_the_card_says_so(export, finished, tmp_path):
    """transformers writes freely."""
    run = RunFolder(Path(shutil.copytree(finished.path, tmp_path / "run")))
    lines = [json.loads(line) | {"constrained": True} for line in run.predictions_file.read_text().splitlines()]
    run.predictions_file.write_text("".join(json.dumps(row) + "\n" for row in lines))
    error = clear_error(export(tmp_path / "out", source=run.path))
    assert "none but those held to a schema" in error and "--split validation --no-constrain`" in error
    assert "- These answers were held to a JSON Schema" in export(tmp_path, "--dry-run", source=run.path).stdout


def test_errors_are_one_line_and_come_first(cli, export, finished, tmp_path, monkeypatch):
    monkeypatch.setattr("im2json.inference.export.write_merged", None)  # none of these gets so far
    assert "exists already" in clear_error(export(tmp_path))
    assert "there is no such run folder" in clear_error(export(tmp_path / "out", source=tmp_path / "none"))
    run = RunFolder(Path(shutil.copytree(finished.path, tmp_path / "run")))
    run.predictions_file.unlink()
    assert "--split validation --no-constrain` makes them" in clear_error(export(tmp_path / "out", source=run.path))
    assert "--split test` makes them" in clear_error(export(tmp_path / "out", "--adapter-only", source=run.path))
    run.result.unlink()
    assert "is not a finished run" in clear_error(export(tmp_path / "out", source=run.path))
    for flag, program in (
        ("--parity", export),
        ("--target-precision", lambda _, *flags: cli("evaluate", run.path, *flags)),
    ):
        result = program(tmp_path / "out", flag, "nan")
        assert result.exit_code == 2 and "nan is not a number" in result.output
    assert "the adapter alone is a copy" in export(tmp_path / "out", "--adapter-only", "--parity", 1).output
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_adapter_alone(export, finished, dataset, tmp_path):
    result = export(tmp_path / "out", "--adapter-only")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [f"copying the adapter of {finished.path}", f"exported  {tmp_path / 'out'}"]
    for path in finished.adapter.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / "out" / "schema.json").read_bytes() == finished.schema.read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\nlibrary_name: peft\n" in card and "\n# out\n" in card
    picture = f"{dataset}/test/0.png"
    (mine,) = im2json.Extractor.from_run(tmp_path / "out")([picture])
    (wanted,) = im2json.Extractor.from_run(finished.path)([picture])
    assert mine == wanted


def test_the_card(export, finished, dataset, tmp_path):
    result = export(tmp_path, "--dry-run", "--push-to-hub", "me/receipts")
    text = result.stdout
    card = ModelCard(text)
    assert card.data.library_name == "transformers"
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    scored = score_predictions(finished.predictions("test", "after")).metrics
    values, bounds = scored.compute(), scored.intervals()
    assert found == {name: round(values[name], 4) for name in METRICS}
    for name in METRICS:
        assert bounds[name] is None and f"| {values[name]:.3f} | too few |" in text
    assert "| lr | 0.01 |" in text
    assert str(Path(dataset).parent) not in text
    assert str(Path(finished.read_config().model.model).parent) not in text
    assert list(tmp_path.iterdir()) == []


def test_the_card_of_options_that_are_paths_or_hold_markdown(export, finished, tmp_path):
    run = RunFolder(Path(shutil.copytree(finished.path, tmp_path / "run")))
    stored = json.loads(run.config.read_text())
    stored["options"] |= {"schema": "/home/me/mine.json", "prompt": "a | b\nc"}
    run.config.write_text(json.dumps(stored))
    lines = export(tmp_path / "out", "--dry-run", source=run.path).stdout.splitlines()
    assert {"| schema | mine.json |", "| prompt | a \\| b c |"} <= set(lines)


# --- the hub


class StandIn(BaseHTTPRequestHandler):
    """What of the hub's API uploading needs; files are sent within the commit."""

    refuse: dict[str, int]  # path -> status
    taken: bool
    received: dict[str, Any]

    def do_GET(self) -> None:
        if "whoami" in self.path:
            self.answer({"name": "me", "type": "user", "orgs": [], "auth": {}})
        else:
            self.answer({"id": "me/receipts"}, 200 if self.taken else 404, "RepoNotFound")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.received["create"] = json.loads(body)
            self.answer({"url": f"{self.server.url}/me/receipts"})  # type: ignore[attr-defined]
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.received[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{self.server.url}/me/receipts/commit/0", "commitOid": "0", "success": True})  # type: ignore[attr-defined]
        else:
            self.answer({})

    def answer(self, value: dict[str, Any], status: int = 200, code: str = "") -> None:
        status = next((status for path, status in self.refuse.items() if path in self.path), status)
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if code and status >= 400:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch) -> Iterator[type[StandIn]]:
    class Hub(StandIn):
        refuse, taken, received = {}, False, {}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)  # type: ignore[attr-defined]
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield Hub
    server.shutdown()


def test_upload(export, hub, tmp_path):
    result = export(tmp_path / "out", "--adapter-only", "--push-to-hub", "me/receipts", "--private")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].endswith("/me/receipts")
    created = hub.received.pop("create")
    assert (created["name"], created["organization"]) == ("receipts", "me")
    assert created.get("private") or created["visibility"] == "private"  # the hub's client has renamed it
    assert hub.received == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_an_interrupted_upload_leaves_what_was_exported(export, hub, tmp_path, monkeypatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("im2json.model.hub.HfApi.upload_folder", interrupt)
    result = export(tmp_path / "out", "--adapter-only", "--push-to-hub", "me/receipts")
    assert result.exit_code == 130
    assert f"interrupted: {tmp_path / 'out'} is whole, and `hf upload" in result.output
    assert (tmp_path / "out" / "README.md").exists()


def test_what_the_hub_refuses_is_one_line(export, hub, tmp_path, monkeypatch):
    def refused(*flags: object) -> str:
        return clear_error(export(tmp_path / "out", "--adapter-only", "--push-to-hub", "me/receipts", *flags))

    hub.refuse = {"whoami": 401}
    assert refused() == "--push-to-hub me/receipts: the token is not valid: run `hf auth login`"
    hub.refuse, hub.taken = {}, True
    assert refused() == "--push-to-hub me/receipts: the name is taken: choose another"
    assert not (tmp_path / "out").exists()  # both are known before anything is written
    hub.refuse, hub.taken = {"create": 403}, False
    error = refused()
    assert "does not allow to write there" in error
    assert error.endswith(f"`hf upload me/receipts {tmp_path / 'out'}` sends it")
    assert (tmp_path / "out" / "README.md").exists()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "nobody is logged in: run `hf auth login`" in refused()


# --- one receipt, three ways


@pytest.mark.slow
def test_extract_peft_and_export_agree(export, train, dataset, tmp_path):
    """Through extract, through plain PEFT on the run's own NF4 base, and through the export, loaded in a process of its
    own: the same text."""
    run = train(tmp_path / "run", "--quant", "nf4", "--max-new-tokens", "20", "--steps", "8")
    result = export(tmp_path / "out", source=run.path)
    assert result.exit_code == 0, result.output
    assert "4 of 4 answers" in result.stdout
    options, pictures = run.read_config().model, [f"{dataset}/test/{i}.png" for i in range(3)]
    quantised = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32"
    )
    base = PaliGemmaForConditionalGeneration.from_pretrained(options.model, quantization_config=quantised)
    model = PeftModel.from_pretrained(base, str(run.adapter)).eval()
    exported = plain.answers(str(tmp_path / "out"), "extract JSON.", pictures, 1, causal_prompt=False)
    processor = AutoProcessor.from_pretrained(options.model)
    for row, other in zip(im2json.Extractor.from_run(run.path)(pictures), exported):
        inputs = processor(images=Image.open(row["id"]), text="<image>extract JSON.", return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert row["text"] == processor.decode(output, skip_special_tokens=True) == other
