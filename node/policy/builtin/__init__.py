"""The policy that ships with the node: a tiny Llama-style model over characters, and the script that made it."""

from pathlib import Path

FOLDER = Path(__file__).parent / "assets"
"""Model and tokenizer as `transformers` saves them: load with `from_pretrained(FOLDER)`."""
