"""How weights and adapters get into another process of this machine, and how to tell whether they arrived.

**Weights** lie in anonymous memory of this process (memfd), which another process of the same user opens by its path in
/proc. Nothing is written to a disk, and nothing is left when this process ends. The other side copies them onto its
device, so that a GPU and a processor are served alike: 2 bytes a weight go through main memory.

**Adapters** are a folder as `peft` writes it, in a file system of memory where there is room in one.

**Checksums**: a child sums up the bits of what it computes with. The sum has to be that of what it was given. If it
keeps weights in another form (packed, quantised, shared out), so that the sums differ at the first hand-over, its sum
has to change at each later one.

**The probe**: the engine scores a fixed text, and so does the trainer. Rounding makes a small difference, and a wrong
model a larger one. The update of a round makes less than rounding, so this alone cannot tell that it is missing. But
other weights round elsewhere: SmolLM2's probabilities in vLLM move by 0.045 nats a token at each step of Adam, from
rates of 1e-8 to 1e-5. So an engine that says to the digit what it said before has its old weights (`ProbeAnswers`).

An engine that fails generates nothing more.
"""

import hashlib
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from node.engines.vllm_worker import checksum
from node.errors import NonFiniteError
from node.policy.export import published
from node.policy.load import Policy

PROBE = (
    "The quick brown fox jumps over the lazy dog. What is 17 + 25? The answer is 42, since 17 + 25 = 42. "
    "On Monday morning she wrote: 'three quarters of 0.8 is 0.6', and closed the book."
)
MEMORY_FOLDER = Path("/dev/shm")  # noqa: S108  # in a container it may be small: `_has_room` asks
DTYPE = "bfloat16"  # of whole weights in an engine: what models are published in, and half of what float32 moves
TOLERANCE = 0.1  # nats a token: more than rounding to `DTYPE` costs, and less than another model
ALIGNMENT = 64  # bytes at whose multiples tensors begin


class WeightMismatchError(RuntimeError):
    """After a weight update an engine and the trainer disagree on the probability of a text."""


def digest(policy: Policy) -> tuple[float, ...]:
    """Return a number for each trained weight tensor that changes when the tensor does: its sum in float64."""
    with torch.no_grad():
        sums = [weight.sum(dtype=torch.float64) for weight in policy.model.parameters() if weight.requires_grad]
        return tuple(torch.stack(sums).tolist())


Checksum = list[int]  # as `vllm_worker.checksum` returns it


class Receipts:
    """Tells by checksums whether a child computes with what it was given."""

    def __init__(self) -> None:
        self._given: Checksum = []  # of the last hand-over
        self._exact = False  # whether a child has had that very checksum

    def check(self, given: Checksum, before: Sequence[Checksum], held: Sequence[Checksum], version: int) -> None:
        """Compare what was handed over as `version` with what the child's processes held before, and hold now.

        Raises:
            WeightMismatchError: it is something else, or it did not change.
        """
        same = all(checksum == given for checksum in held)
        if not same and (self._exact or (held == before and given != self._given)):
            raise WeightMismatchError(
                f"the engine does not have policy version {version}: the weights that it holds are not those that it "
                "was given"
            )
        self._given = given
        self._exact |= same


class SharedWeights:
    """A copy of a policy's weights that other processes of this user can read.

    Args:
        dtype: of the copy, by torch's name.

    Attributes:
        checksum: of the copy.
    """

    def __init__(self, dtype: str) -> None:
        self.checksum: Checksum = []
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
        dtype = str(self._dtype).removeprefix("torch.")
        sums = [0, 0]
        with torch.no_grad():
            ready = published(policy.model, weights.values())  # one after another: some are copies
            for (_, tensor), (_, shape, start) in zip(ready, places, strict=True):
                rounded = tensor.to(self._dtype)  # where it is: half as much is copied
                part = whole[start : start + tensor.numel() * self._dtype.itemsize].view(self._dtype).view(shape)
                part.copy_(rounded)
                sums = [total + more for total, more in zip(sums, checksum([rounded], dtype), strict=True)]
        self.checksum = [total % 2**64 for total in sums]
        return {
            "path": f"/proc/{os.getpid()}/fd/{self._file}",
            "dtype": dtype,
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

    Attributes:
        checksum: of the adapters in it, as vLLM computes with them.
    """

    def __init__(self, node: Path, *, in_memory: bool) -> None:
        self._parent = node
        self._in_memory = in_memory
        self.checksum: Checksum = []
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
        self.checksum = checksum(_adapters_as_computed(model), DTYPE)
        if before is not None:
            shutil.rmtree(before, ignore_errors=True)
        return self._folder

    def close(self) -> None:
        """Remove the folder."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def _adapters_as_computed(model: Any) -> Iterator[torch.Tensor]:
    """Yield the matrices of all adapters as vLLM has them: rounded, the second one times its scaling."""
    number = getattr(torch, DTYPE)
    for layer in model.modules():
        for name, first in getattr(layer, "lora_A", {}).items():
            yield first.weight.to(number)
            yield layer.lora_B[name].weight.detach().to(number) * layer.scaling[name]


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
    error = _distance(ours, theirs)
    if not error <= TOLERANCE:  # NaN is no agreement either
        raise WeightMismatchError(
            f"the engine does not have policy version {version}: its log-probabilities are off by {error:.3g} "
            f"nats a token, of which {TOLERANCE:g} may be rounding"
        )
    return error


class ProbeAnswers:
    """The answers of an engine that has no checksums to the probe: another update gives another one."""

    def __init__(self) -> None:
        self._first: list[float] = []  # before it was given any weights: it says so again once it was started again
        self._left_first = False
        self._former: list[float] = []  # by other weights than those of now
        self._latest: list[float] = []  # by those of now

    def begin(self, theirs: list[float]) -> None:
        """Note the answer of an engine that has not been given any weights yet."""
        self._first = theirs

    def renew(self) -> None:
        """Note that it is given other weights."""
        self._former, self._latest = self._latest or self._former, []

    def check(self, ours: Sequence[float], theirs: list[float], version: int) -> None:
        """Compare an answer with what is expected and with earlier ones.

        Raises:
            WeightMismatchError: it is too far from what is expected, or it is an earlier one.
        """
        rounding = check_probe(ours, theirs, version)

        def is_answer(known: Sequence[float]) -> bool:
            return bool(known) and _distance(known, theirs) <= rounding / 10

        if is_answer(self._former) or (self._left_first and is_answer(self._first)):
            raise WeightMismatchError(
                f"the engine does not have policy version {version}: it says of a text what it said before"
            )
        self._left_first |= not is_answer(self._first)
        self._latest = theirs


def _distance(some: Sequence[float], others: Sequence[float]) -> float:
    """Return the mean difference."""
    return sum(abs(a - b) for a, b in zip(some, others, strict=True)) / len(some)


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
