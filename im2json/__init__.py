"""im2json: fine-tune PaliGemma with QLoRA to turn pictures of documents into JSON, judged by the JSON."""

__version__ = "0.1.0"
