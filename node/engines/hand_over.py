"""How weights and adapters get into another process of this machine, and how to tell whether they arrived.

**Weights** lie in anonymous memory of this process (memfd), which another process of the same user opens by its path in
/proc. Nothing is written to a disk, and nothing is left when this process ends. The other side copies them onto its
device, so that a GPU and a processor are served alike: 2 bytes a weight go through main memory.

**Adapters** are a folder as `peft` writes it, in a file system of memory where there is room in one.

**The probe**: the engine scores a fixed text, and so does the trainer. Rounding makes a small difference. Weights that
did not arrive make a larger one. An engine that fails the probe generates nothing more.
"""

import hashlib
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from node.errors import NonFiniteError
from node.policy.export import published
from node.policy.load import Policy

PROBE = (
    "The quick brown fox jumps over the lazy dog. What is 17 + 25? The answer is 42, since 17 + 25 = 42. "
    "On Monday morning she wrote: 'three quarters of 0.8 is 0.6', and closed the book."
)
MEMORY_FOLDER = Path("/dev/shm")  # noqa: S108  # in a container it may be small: `_has_room` asks
DTYPE = "bfloat16"  # of whole weights in an engine: what models are published in, and half of what float32 moves
TOLERANCE = 0.1  # nats a token: more than rounding to `DTYPE` costs, and less than weights that did not arrive
ALIGNMENT = 64  # bytes at whose multiples tensors begin


class WeightMismatchError(RuntimeError):
    """After a weight update an engine and the trainer disagree on the probability of a text."""


def digest(policy: Policy) -> tuple[float, ...]:
    """Return a number for each trained weight tensor that changes when the tensor does: its sum in float64."""
    with torch.no_grad():
        sums = [weight.sum(dtype=torch.float64) for weight in policy.model.parameters() if weight.requires_grad]
        return tuple(torch.stack(sums).tolist())


class SharedWeights:
    """A copy of a policy's weights that other processes of this user can read.

    Args:
        dtype: of the copy, by torch's name.
    """

    def __init__(self, dtype: str) -> None:
        self._dtype = getattr(torch, dtype)
        self._file = os.memfd_create("gossamer-weights")
        self._memory: mmap.mmap | None = None

    def write(self, policy: Policy) -> dict[str, Any]:
        """Copy the current weights; return where they are, as `vllm_worker` reads it.

        A weight that is tied to another is left out. There are no adapters in `policy`.
        """
        weights: dict[int, tuple[str, torch.Tensor]] = {}
        for name, tensor in policy.model.state_dict().items():
            weights.setdefault(tensor.data_ptr(), (name, tensor))
        places, end = [], 0
        for name, tensor in published(policy.model, [(name, tensor.to("meta")) for name, tensor in weights.values()]):
            places.append((name, tuple(tensor.shape), end))
            size = tensor.numel() * self._dtype.itemsize
            end += -(-size // ALIGNMENT) * ALIGNMENT
        if self._memory is None:
            os.ftruncate(self._file, end)
            self._memory = mmap.mmap(self._file, end)
        whole = torch.frombuffer(self._memory, dtype=torch.uint8)
        with torch.no_grad():
            ready = published(policy.model, weights.values())  # one after another: some are copies
            for (_, tensor), (_, shape, start) in zip(ready, places, strict=True):
                part = whole[start : start + tensor.numel() * self._dtype.itemsize].view(self._dtype).view(shape)
                part.copy_(tensor)
        return {
            "path": f"/proc/{os.getpid()}/fd/{self._file}",
            "dtype": str(self._dtype).removeprefix("torch."),
            "tensors": places,
        }

    def close(self) -> None:
        """Give the memory back, once the last process that reads it is done."""
        self._memory = None
        os.close(self._file)


class AdapterFolder:
    """The folder of a policy's current adapters.

    It removes the folders that an earlier, killed process of the node left.

    Args:
        node: the node's folder, in which it is made.
        in_memory: it is made in a file system of memory instead, where there is room in one.
    """

    def __init__(self, node: Path, *, in_memory: bool) -> None:
        self._parent = node
        self._in_memory = in_memory
        self._folder: Path | None = None
        self._prefix = f"gossamer-adapters-{hashlib.sha256(os.fsencode(node.resolve())).hexdigest()[:16]}-"
        for parent in (node, MEMORY_FOLDER):
            remove_leftovers(parent, self._prefix)

    def write(self, policy: Policy) -> Path:
        """Write the current adapters to a new folder, and remove the one before."""
        model: Any = policy.model
        size = sum(weight.nbytes for name, weight in model.named_parameters() if ".lora_" in name)
        parent = MEMORY_FOLDER if self._in_memory and _has_room(MEMORY_FOLDER, 4 * size) else self._parent
        before, self._folder = self._folder, Path(tempfile.mkdtemp(dir=parent, prefix=self._prefix))
        model.save_pretrained(str(self._folder))
        if before is not None:
            shutil.rmtree(before, ignore_errors=True)
        return self._folder

    def close(self) -> None:
        """Remove the folder."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def remove_leftovers(parent: Path, prefix: str) -> None:
    """Delete the folders in `parent` whose names begin with `prefix`."""
    for folder in parent.glob(f"{prefix}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _has_room(folder: Path, size: int) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > size


def probe_tokens(policy: Policy, longest: int) -> list[int]:
    """Return the tokens of the probe, fewer than `longest`."""
    return list(policy.tokenizer(PROBE)["input_ids"])[: longest - 1]


def expected_probe(policy: Policy, tokens: Sequence[int]) -> list[float]:
    """Return what an engine with the policy's weights should say of the probe, in nats a token after the first.

    Raises:
        NonFiniteError: that is no number.
    """
    ours = policy_logprobs(policy, tokens)
    if not all(map(math.isfinite, ours)):
        raise NonFiniteError
    return ours


def check_probe(ours: Sequence[float], theirs: Sequence[float], version: int) -> float:
    """Return how far an engine's log-probabilities of the probe are from those expected, in nats a token, in the mean.

    Raises:
        WeightMismatchError: that is more than `TOLERANCE`.
    """
    error = sum(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / len(ours)
    if not error <= TOLERANCE:  # NaN is no agreement either
        raise WeightMismatchError(
            f"the engine does not have policy version {version}: its log-probabilities are off by {error:.3g} "
            f"nats a token, of which {TOLERANCE:g} may be rounding"
        )
    return error


def policy_logprobs(policy: Policy, tokens: Sequence[int]) -> list[float]:
    """Return the policy's log-probability, in nats, of each of `tokens` after the first."""
    model = policy.model
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            ids = torch.tensor([list(tokens)], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    finally:
        model.train(training)
    return torch.log_softmax(logits, dim=-1).gather(1, ids[0, 1:, None]).squeeze(1).tolist()


def adapters_of(policy: Policy) -> Mapping[str, Any]:
    """Return the configuration of the policy's adapters; empty where it has none."""
    return getattr(policy.model, "peft_config", {})
