"""What a GPU shows: rounds of models of real shapes against TRL's, within some minutes, into one JSON and one page.

    python -m benchmarks.gpu --out runs/gpu

Nothing is fetched: the models have random weights and are made here, with a tokenizer of as many words as the real one
has tokens. They never end a text by themselves, so every completion has the longest length.
"""

import argparse
import html
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers.utils import is_flash_attn_2_available

from benchmarks.block import Engine
from benchmarks.round import run

VOCABULARY = 151_936  # Qwen's; the architecture is Llama's, whose tokenizer may be any
Row = dict[str, Any]


class Shape(NamedTuple):
    """A model's, as its configuration says."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int = VOCABULARY


SHAPES = {
    "tiny": Shape(2, 64, 128, 4, 2, 512),  # for a trial without a GPU
    "0.5B": Shape(24, 896, 4864, 14, 2),  # Qwen2.5's
    "1.5B": Shape(28, 1536, 8960, 12, 2),
}


class Case(NamedTuple):
    """One comparison: a model, both sides' engine, and the lengths of prompts and completions in tokens."""

    shape: str
    engine: Engine
    examples: int
    lengths: tuple[int, int]
    questions: int = 8
    completions: int = 8


CASES = (
    Case("0.5B", "generate", 0, (64, 128)),
    Case("0.5B", "paged", 0, (64, 128)),
    Case("0.5B", "generate", 16, (512, 128)),
    Case("0.5B", "paged", 16, (512, 128)),
    Case("1.5B", "generate", 16, (512, 128)),
)
TRIAL = (Case("tiny", "generate", 0, (64, 16), 2, 4), Case("tiny", "paged", 0, (64, 16), 2, 4))


def make_model(shape: Shape, folder: Path) -> None:
    """Write a model of this shape with random weights in float32, and its tokenizer, to `folder`."""
    words = ["<pad>", "<eos>", "<unk>", *(f"w{number}" for number in range(shape.vocabulary - 3))]
    backend = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    split = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(individual_digits=True)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(split)
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(cases: tuple[Case, ...], folder: Path, device: str, seconds: float) -> Iterator[Row]:
    """Yield the rows of each case, and what is left out because the time is over or the machine lacks something."""
    began = time.monotonic()
    for case in cases:
        about = {"case": f"{case.shape}, {case.engine}, {case.lengths[0]}+{case.lengths[1]} tokens"}
        if time.monotonic() - began > seconds:
            yield about | {"left_out": "no time is left"}
            continue
        if case.engine == "paged" and device == "cuda" and not is_flash_attn_2_available():
            yield about | {"note": "without FlashAttention: a row looks at the pages of all others"}
        model = folder / case.shape
        if not model.exists():
            make_model(SHAPES[case.shape], model)
        try:
            for row in run(
                model=str(model),
                questions=case.questions,
                completions=case.completions,
                rounds=3,
                blocks=2,
                threads=torch.get_num_threads(),
                compare="trl",
                examples=case.examples,
                engine=case.engine,
                device=device,
                lengths=case.lengths,
            ):
                yield about | row
        except torch.OutOfMemoryError as error:
            yield about | {"left_out": str(error).splitlines()[0]}
            torch.cuda.empty_cache()


def machine() -> Row:
    """Say what this is."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__}
    return {"gpu": card, "gpu_bytes": memory, "python": platform.python_version(), **versions}


def page(about: Row, rows: list[Row]) -> str:
    """Return a page of the ratios and of each side's figures."""
    columns = ("case", "impl", "reward", "median_s", "tokens_s", "peak_bytes")
    sides = [tuple(row.get(column, "") for column in columns) for row in rows if "median_s" in row]
    ratios = [
        (row["case"], what, ratio) for row in rows if "ratio" in row for what, ratio in row["ratio"]["trl"].items()
    ]
    notes = [f"{row['case']}: {row.get('left_out') or row.get('note')}" for row in rows if "impl" not in row]
    notes = [note for note in notes if not note.endswith("None")]
    return (
        "<!doctype html><meta charset=utf-8><title>Gossamer on a GPU</title>"
        "<style>body{font:15px sans-serif;margin:2em;max-width:60em}td,th{padding:.2em .8em;text-align:left}</style>"
        f"<h1>Rounds on {html.escape(str(about['gpu']))}</h1><p>{html.escape(json.dumps(about))}</p>"
        "<h2>Our time, or memory, over TRL's</h2>"
        + _table(("case", "what", "ratio"), ratios)
        + "<h2>Each side</h2>"
        + _table(columns, sides)
        + "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    )


def _table(head: tuple[str, ...], body: list[tuple[Any, ...]]) -> str:
    rows = [("th", head), *(("td", cell) for cell in body)]
    cells = ["".join(f"<{tag}>{html.escape(_shown(value))}</{tag}>" for value in row) for tag, row in rows]
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Measure, and write `gpu.json` and `gpu.html`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--minutes", type=float, default=6.0, help="begin no comparison after so many")
    parser.add_argument("--trial", action="store_true", help="tiny models on the processor, to see that all works")
    args = parser.parse_args()
    if not args.trial and not torch.cuda.is_available():
        raise SystemExit("error: torch sees no GPU here; --trial runs tiny models on the processor")
    args.out.mkdir(parents=True, exist_ok=True)
    about, rows = machine(), []
    cases, device = (TRIAL, "cpu") if args.trial else (CASES, "cuda")
    for row in measure(cases, args.out / "models", device, 60 * args.minutes):
        print(json.dumps(row), flush=True)
        rows.append(row)
        (args.out / "gpu.json").write_text(json.dumps({"machine": about, "rows": rows}, indent=1))
        (args.out / "gpu.html").write_text(page(about, rows))
    print(f"written: {args.out / 'gpu.json'} and {args.out / 'gpu.html'}")


if __name__ == "__main__":
    main()
