"""The main job at PaliGemma-3B's real size on one GPU, without its weights: `--preset cord`, killed once and resumed.

Saves a PaliGemma of the real config with random weights and CORD-shaped rows (synthetic receipts with targets of CORD's
lengths as Parquet, in the hub's layout), trains on them through train.py, kills it with SIGKILL after its first
checkpoint, resumes, and prints loss, speed and memory. Speed and memory do not depend on the values of the weights;
accuracy means nothing here, and as such weights never end an answer, all are of the greatest length.

python benchmarks/full_size.py --work /tmp/full-size
python benchmarks/full_size.py --work /tmp/full-size --no-kill -- --steps 150 --eval-every 25 --eval-examples 100
"""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import click

REPOSITORY = Path(__file__).parent.parent


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="folder for model, data and run")
@click.option("--steps", default=20)
@click.option("--size", type=click.Choice(["3b", "3b-2", "toy"]), default="3b", help="toy: to try it on a CPU")
@click.option("--resolution", default=224)
@click.option("--kill/--no-kill", default=True, help="kill it after its first checkpoint, and resume")
@click.argument("flags", nargs=-1)
def main(work: Path, steps: int, size: str, resolution: int, kill: bool, flags: tuple[str, ...]) -> None:
    """Run it all; FLAGS (after --) go to train.py."""
    model, rows, run = work / "model", work / "cord", work / "run"
    if not model.exists():
        save_random_paligemma(model, size, resolution)
    if not rows.exists():
        write_cord_rows(rows)
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "train.py", "--preset", "cord", "--model", str(model),
        "--dataset", str(rows), "--steps", str(steps), "--eval-every", str(steps // 2), "--eval-examples", "16",
        "--no-test", *flags,
    ]  # fmt: skip
    memory = MemoryWatch()
    checkpoint = run / "checkpoints" / f"step-{steps // 2}" if kill else None
    first = run_until([*command, "--output", str(run)], checkpoint)
    second = run_until([*command, "--resume", str(run)], None) if kill else 0.0
    report(run, first, second, memory.stop())


def run_until(command: list[str], file: Path | None) -> float:
    """Seconds that a command took; it is killed with SIGKILL a step or so after `file` appears."""
    start = time.perf_counter()
    child = subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True)
    while child.poll() is None:
        time.sleep(0.5)
        if file is not None and file.exists():
            time.sleep(6)
            import os

            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            return time.perf_counter() - start
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - start


class MemoryWatch:
    """The most memory that nvidia-smi showed as used on one of these GPUs, CUDA's own included."""

    def __init__(self, gpus: Sequence[str] = ("0",)) -> None:
        self.gpus = gpus
        self.peak_mib = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", ",".join(self.gpus)]
        while not self._stop.wait(0.5):
            try:
                out = subprocess.run(query, capture_output=True, text=True, check=True).stdout
            except (OSError, subprocess.SubprocessError):
                return
            self.peak_mib = max(self.peak_mib, *map(int, re.findall(r"\d+", out)))

    def stop(self) -> float:
        self._stop.set()
        self._thread.join()
        return self.peak_mib / 1024


def report(run: Path, first: float, second: float, peak_gib: float) -> None:
    result = json.loads((run / "result.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["values"]["loss"] for row in rows if row["split"] == "train"}
    evaluations = [row["step"] for row in rows if row["split"] == "validation"]
    print(f"steps {len(losses)}, evaluations at {evaluations}; {first:.0f} s, and resumed for {second:.0f} s")
    if len(rows) > 1:  # after the first evaluation all is recorded and compiled
        times = [row["time"] for row in rows]
        print(f"{times[-1] - times[0]:.0f} s from the end of the first step to the end of the last evaluation")
    print("loss " + "  ".join(f"{step}: {loss:.4f}" for step, loss in losses.items()))
    print(f"examples/s {result['examples_per_second']}, trainable {result['trainable']:,} of {result['total']:,}")
    print(f"peak GiB: torch allocated {result['peak_memory_bytes'] / 2**30:.2f}, nvidia-smi {peak_gib:.2f}")
    config = json.loads((run / "config.json").read_text())
    print("versions", config["versions"])


def random_weights(kind, config):
    """Return a model of a class of transformers with random weights in bf16, made on the GPU if there is one."""
    import torch

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = kind(config)
    torch.set_default_dtype(torch.float32)
    return model


def save_random_paligemma(folder: Path, size: str, resolution: int) -> None:
    """A PaliGemma-3B of the published config, of the first or the second Gemma (3b, 3b-2), or a toy of the first one's
    shape, with random weights in bf16."""
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    tokens = (resolution // 14) ** 2
    vision = dict(
        model_type="siglip_vision_model", hidden_size=1152, intermediate_size=4304, num_hidden_layers=27,
        num_attention_heads=16, num_image_tokens=tokens, patch_size=14, image_size=resolution, projection_dim=2048,
        vision_use_head=False,
    )  # fmt: skip
    text = dict(
        model_type="gemma", hidden_size=2048, intermediate_size=16384, num_hidden_layers=18, num_attention_heads=8,
        num_key_value_heads=1, head_dim=256, num_image_tokens=tokens, vocab_size=257216, tie_word_embeddings=True,
        hidden_activation="gelu_pytorch_tanh",
    )  # fmt: skip
    if size == "3b-2":
        text |= dict(
            model_type="gemma2", hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_key_value_heads=4,
            query_pre_attn_scalar=256,
        )  # fmt: skip
        vision["projection_dim"] = 2304
    if size == "toy":
        vision |= dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2)
        text |= dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, head_dim=32)
        vision["projection_dim"] = 64
    config = PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_index=257152, projection_dim=text["hidden_size"],
        hidden_size=text["hidden_size"], pad_token_id=0, bos_token_id=2, eos_token_id=1,
    )  # fmt: skip
    random_weights(PaliGemmaForConditionalGeneration, config).save_pretrained(folder)
    _processor(resolution).save_pretrained(folder)


QWEN = {
    "qwen-4b": dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32),
    "qwen-2b": dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16),
    "qwen-toy": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, head_dim=16),
}
SIZES = ["3b", "3b-2", "toy", *QWEN]


def save_random(folder: Path, size: str, resolution: int) -> None:
    """Save a random model of one of SIZES; the resolution is PaliGemma's."""
    if size in QWEN:
        save_random_qwen(folder, size)
    else:
        save_random_paligemma(folder, size, resolution)


def picture_size(size: str, resolution: int) -> tuple[int, int]:
    """Return width and height of the pictures for a model: a square for PaliGemma, and for Qwen3-VL a receipt of 864 x
    1280 pixels, which is 1,080 image tokens."""
    return (resolution, resolution) if size not in QWEN else (864, 1280) if size != "qwen-toy" else (96, 128)


def save_random_qwen(folder: Path, size: str) -> None:
    """Save a Qwen3-VL of a published config, or a toy of its shape, with random weights in bf16."""
    from transformers import GenerationConfig, Qwen3VLConfig, Qwen3VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    toy = size == "qwen-toy"
    text = dict(num_key_value_heads=2 if toy else 8, head_dim=128) | QWEN[size]
    vision = dict(
        depth=24, hidden_size=1024, intermediate_size=4096, num_heads=16, deepstack_visual_indexes=[5, 11, 17]
    )
    if toy:
        vision = dict(depth=4, hidden_size=64, intermediate_size=128, num_heads=4, deepstack_visual_indexes=[0, 1, 2])
    special = dict(
        image_token_id=151655, video_token_id=151656, vision_start_token_id=151652, vision_end_token_id=151653
    )
    config = Qwen3VLConfig(
        text_config=dict(
            vocab_size=151936, max_position_embeddings=262144, tie_word_embeddings=True,
            rope_parameters=dict(
                rope_type="default", rope_theta=5e6, mrope_section=[2, 3, 3] if toy else [24, 20, 20],
                mrope_interleaved=True,
            ),
            **text,
        ),
        vision_config=dict(
            patch_size=16, spatial_merge_size=2, temporal_patch_size=2, in_channels=3, num_position_embeddings=2304,
            out_hidden_size=text["hidden_size"], **vision,
        ),
        tie_word_embeddings=True, **special,
    )  # fmt: skip
    model = random_weights(Qwen3VLForConditionalGeneration, config)
    model.generation_config = GenerationConfig(eos_token_id=[151645, 151643], pad_token_id=151643)
    model.save_pretrained(folder)
    _chat_tokenizer().save_pretrained(folder)
    edges = {"shortest_edge": 65536, "longest_edge": 16777216}
    Qwen2VLImageProcessorPil(
        size=edges, patch_size=16, merge_size=2, temporal_patch_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(folder)


def _chat_tokenizer():
    """Return a byte-level tokenizer with the ids of Qwen3's specials and a template like its own."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    special = {
        151643: "<|endoftext|>", 151644: "<|im_start|>", 151645: "<|im_end|>", 151652: "<|vision_start|>",
        151653: "<|vision_end|>", 151655: "<|image_pad|>", 151656: "<|video_pad|>",
    }  # fmt: skip
    names = ["<unk>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    names += [special.get(i, f"<unused{i}>") for i in range(len(names), 151669)]
    bpe = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True))
    bpe.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(special.values())})
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
        "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
        "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == 151655
    return tokenizer


def as_transformers(model, inputs):
    """Return the inputs of transformers' own forward pass for a batch of ours."""
    import torch

    from im2json.families.chat import pixel_values

    if "image_grid_thw" not in inputs:
        return inputs
    return {
        **{name: inputs[name] for name in ("input_ids", "attention_mask", "image_grid_thw")},
        "pixel_values": pixel_values(inputs, model.config.vision_config.temporal_patch_size, torch.float32),
        "mm_token_type_ids": (inputs["input_ids"] == model.config.image_token_id).int(),
    }


def _processor(resolution: int):
    """PaliGemma's processor around a byte-level tokenizer with its vocabulary's size and the ids of its specials."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PaliGemmaProcessor, PreTrainedTokenizerFast
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    names = ["<pad>", "<eos>", "<bos>", "<unk>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    names += [f"<unused{i}>" for i in range(len(names), 256000)]
    bpe = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True))
    bpe.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
    tokenizer.add_tokens([f"<loc{i:04}>" for i in range(1024)] + [f"<seg{i:03}>" for i in range(128)])
    pictures = SiglipImageProcessorPil(
        size={"height": resolution, "width": resolution}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    pictures.image_seq_length = (resolution // 14) ** 2
    processor = PaliGemmaProcessor(pictures, tokenizer)
    assert processor.image_token_id == 257152
    return processor


CORD = {"train": 800, "validation": 100, "test": 100}


def write_cord_rows(folder: Path, counts: Mapping[str, int] = CORD) -> None:
    """Synthetic receipts in CORD v2's columns, of about its sizes and lengths, as Parquet in the hub's layout."""
    from datasets import Dataset, Features, Image, Value
    from rows import Rows

    features = Features({"image": Image(), "ground_truth": Value("string")})
    (folder / "data").mkdir(parents=True)
    for seed, (split, count) in enumerate(counts.items()):
        targets = Rows(count, (0, 0), seed).targets
        with ProcessPoolExecutor() as pool:
            pictures = list(pool.map(partial(_picture, split, count), range(count), chunksize=8))
        rows = [
            {"image": {"bytes": picture, "path": None}, "ground_truth": json.dumps({"gt_parse": target})}
            for picture, target in zip(pictures, targets)
        ]
        name = folder / "data" / f"{split}-00000-of-00001.parquet"
        Dataset.from_list(rows, features=features).to_parquet(str(name))


def _picture(split: str, count: int, place: int) -> bytes:
    from im2json.data.receipts import Receipts

    file = io.BytesIO()
    Receipts(split, count)[place].image.resize((864, 1296)).save(file, "JPEG")
    return file.getvalue()


if __name__ == "__main__":
    main()
