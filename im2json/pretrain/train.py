"""Pre-training: the reader sees its stream of pages once, from fresh or given weights to the end of the schedule."""

from __future__ import annotations

import contextlib
import copy
import json
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PaliGemmaForConditionalGeneration, PaliGemmaProcessor

from im2json.pretrain.evaluate import read, summary, unseen_receipts
from im2json.pretrain.mixture import ALPHABET, IGNORED, Batches, pixels
from im2json.pretrain.model import Reader, build_model, build_processor, load_model
from im2json.pretrain.nf4 import rounded
from im2json.pretrain.optimizer import build_optimizers, is_quantised, set_rate
from im2json.pretrain.tokenizer import build_tokenizer

NF4_SHARE = 0.3  # the last part of the run, where every other step sees weights rounded to NF4
POINTS = 24  # of the curve
EMPTY_WEIGHT = 0.1  # of the read-out's cells without a character
CATCH_UP = 0.03  # of a run from given weights, in which the fresh read-out learns but does not teach the tower


@dataclass(frozen=True)
class Settings:
    """What a run depends on. Rates are the schedule's peaks."""

    seed: int = 0
    examples: int = 2_000_000  # or as many as the time allows
    minutes: float = 0.0  # 0: no limit; else the schedule follows the clock where that is faster
    size: str = "tiny"  # of fresh weights
    start: str | None = None  # folder of the weights to continue from
    batch_scale: float = 1.0  # times the sizes in mixture.BUCKETS
    matrix_lr: float = 0.02
    other_lr: float = 2e-3
    rate: float = 1.0  # times both
    evaluations: int = 3  # over the run
    evaluation_receipts: int = 48
    final_receipts: int = 500
    compile: bool = False


def text_loss(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Mean over suffix tokens, EOS among them. logits: (B, S, V) of the text positions."""
    tokens = batch["tokens"]  # B x S
    at = torch.arange(tokens.shape[1], device=tokens.device)[None]
    asked = (at >= batch["prompt_lengths"][:, None]) & (at < batch["lengths"][:, None])  # B x S
    labels = tokens.masked_fill(~asked, IGNORED)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def read_out_loss(cells: Tensor, targets: Tensor) -> Tensor:
    """Weighted mean over the cells. cells: (B, I, 6, A); targets: (B, I, 6)."""
    weight = torch.ones(ALPHABET, device=cells.device)
    weight[0] = EMPTY_WEIGHT
    return F.cross_entropy(cells.float().flatten(0, 2), targets.long().flatten(), weight, ignore_index=IGNORED)


def autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """bfloat16 on CUDA, plain float32 elsewhere."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def batches(
    settings: Settings, processor: PaliGemmaProcessor, workers: int, device: torch.device
) -> Generator[dict[str, Tensor]]:
    """The endless stream, on the device."""
    stream = Batches(processor.tokenizer, settings.seed, settings.batch_scale, curriculum=settings.start is None)
    loader = DataLoader(
        stream, batch_size=None, num_workers=workers, pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None,
    )  # fmt: skip
    for batch in loader:
        yield {name: value.to(device, non_blocking=True) for name, value in batch.items()}


class Trainer:
    """The state of a run and one step of it."""

    def __init__(self, settings: Settings, processor: PaliGemmaProcessor, device: torch.device):
        torch.manual_seed(settings.seed)
        self.settings, self.device = settings, device
        tokenizer = processor.tokenizer
        model = load_model(settings.start, tokenizer) if settings.start else build_model(tokenizer, settings.size)
        self.reader = Reader(model, ALPHABET).to(device).train()
        self.quantised = [
            module.weight for name, module in self.reader.model.named_modules() if is_quantised(name, module)
        ]
        self.optimizers = build_optimizers(
            self.reader, settings.rate * settings.matrix_lr, settings.rate * settings.other_lr
        )
        self.seen = 0  # examples
        self.steps = 0
        self.started = time.monotonic()
        self.progress = 0.0  # 0 to 1, what the schedule goes by
        if settings.compile:
            base = self.reader.model.model
            for layer in (*base.vision_tower.encoder.layers, *base.language_model.layers):
                layer.compile(dynamic=True)

    def step(self, batch: dict[str, Tensor]) -> Tensor:
        """One update. Returns the losses of text and read-out, unsynchronised, (2,)."""
        set_rate(self.optimizers, self.progress)
        round_weights = self.progress > 1 - NF4_SHARE and self.steps % 2 == 0
        teach = self.settings.start is None or self.progress >= CATCH_UP
        with rounded(self.quantised) if round_weights else contextlib.nullcontext():
            with autocast(self.device):
                logits, cells = self.reader(
                    pixels(batch["gray"], batch["tint"]), batch["tokens"], batch["prompt_lengths"], teach=teach
                )
                losses = torch.stack((text_loss(logits, batch), read_out_loss(cells, batch["cells"])))
            losses.sum().backward()
        torch.nn.utils.clip_grad_norm_(self.reader.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.seen += len(batch["tokens"])
        self.steps += 1
        if self.steps == 1:  # compiling is not counted
            self.started = time.monotonic()
        self.progress = self.seen / self.settings.examples
        if self.settings.minutes:
            self.progress = max(self.progress, (time.monotonic() - self.started) / 60 / self.settings.minutes)
        return losses.detach()


def save(
    model: PaliGemmaForConditionalGeneration,
    processor: PaliGemmaProcessor,
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """The model in 16 bit with its processor. The model in memory stays as it is."""
    stored = PaliGemmaForConditionalGeneration(copy.deepcopy(model.config)).to(dtype)  # type: ignore[arg-type]
    stored.load_state_dict(model.state_dict())
    stored.generation_config = copy.deepcopy(model.generation_config)
    stored.save_pretrained(folder)
    processor.save_pretrained(folder)
    # Pillow's resize wherever the base is loaded, and no warning where torchvision is not installed
    config = json.loads((folder / "processor_config.json").read_text())
    config["image_processor"]["image_processor_type"] = "SiglipImageProcessorPil"
    (folder / "processor_config.json").write_text(json.dumps(config, indent=2) + "\n")


def evaluate_stored(
    folder: Path, count: int, device: torch.device, dtype: torch.dtype, nf4: bool = False
) -> dict[str, Any]:
    """The stored model's error rates, loaded as anyone would load it; `nf4` rounds what QLoRA would quantise."""
    model = PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device).eval()  # type: ignore[arg-type]
    processor = PaliGemmaProcessor.from_pretrained(folder)
    linear = [module.weight for name, module in model.named_modules() if is_quantised(name, module)]
    with rounded(linear) if nf4 else contextlib.nullcontext():
        return summary(read(model, processor, unseen_receipts(count), batch=500))


def run(trainer: Trainer, processor: PaliGemmaProcessor, workers: int) -> Generator[dict[str, Any]]:
    """Train to the end of the schedule; a line of the curve at each of its POINTS, with an error rate at some."""
    settings = trainer.settings
    losses: list[Tensor] = []
    point = evaluated = 0
    stream = batches(settings, processor, workers, trainer.device)
    with tqdm(total=settings.examples, unit="ex", mininterval=5) as bar, contextlib.closing(stream):
        for batch in stream:
            losses.append(trainer.step(batch))
            bar.update(len(batch["tokens"]))
            if trainer.progress < min(1.0, (point + 1) / POINTS):
                continue
            point = int(trainer.progress * POINTS)
            text, cells = torch.stack(losses).mean(0).tolist()
            losses = []
            line = {"step": trainer.steps, "examples": trainer.seen, "loss": text, "read_out_loss": cells}
            if trainer.progress >= min(1.0, (evaluated + 1) / settings.evaluations):
                evaluated = int(trainer.progress * settings.evaluations)
                line["cer"] = validate(trainer, processor)["cer"]
            yield line | {"seconds": round(time.monotonic() - trainer.started, 1)}
            if trainer.progress >= 1:
                return


def pretrain(settings: Settings, output: Path, device: torch.device, workers: int) -> dict[str, Any]:
    """Train, leaving model, processor, curve.jsonl and result.json in `output`. Returns the result."""
    output.mkdir(parents=True, exist_ok=True)
    processor = build_processor(build_tokenizer())
    trainer = Trainer(settings, processor, device)
    with (output / "curve.jsonl").open("w") as curve:
        for line in run(trainer, processor, workers):
            if "cer" in line:
                save(trainer.reader.model, processor, output)
            curve.write(json.dumps(line) + "\n")
            curve.flush()
            tqdm.write(json.dumps(line))
    seconds = time.monotonic() - trainer.started
    result = {
        "settings": asdict(settings),
        "steps": trainer.steps,
        "examples": trainer.seen,
        "seconds": seconds,
        "parameters": sum(parameter.numel() for parameter in trainer.reader.model.parameters()),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }
    result["measured"] = measure(output, settings, device)
    (output / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def validate(trainer: Trainer, processor: PaliGemmaProcessor) -> dict[str, Any]:
    """Error rates of the weights as they are."""
    model = trainer.reader.model.eval()
    # Decoding would compile the layers again for every length
    with autocast(trainer.device), torch.compiler.set_stance("force_eager"):
        measured = summary(read(model, processor, unseen_receipts(trainer.settings.evaluation_receipts)))
    model.train()
    return measured


def measure(folder: Path, settings: Settings, device: torch.device) -> dict[str, Any]:
    """Error rates of what was stored, in the precisions that it will be used in."""
    count, dtype = settings.final_receipts, torch.bfloat16 if device.type == "cuda" else torch.float32
    measured = {"nf4": evaluate_stored(folder, count, device, dtype, nf4=True)}
    for precision in dict.fromkeys((dtype, torch.float32)):
        measured[str(precision).removeprefix("torch.")] = evaluate_stored(folder, count, device, precision)
    return measured
