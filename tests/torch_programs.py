"""What people run on torch's groups: `python -m tests.torch_programs BACKEND FOLDER` is a rank, as torchrun starts it.

Each program has a world of its own. A rank writes to FOLDER what came of each.
"""

import json
import os
import signal
import sys
import threading
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import collectives.torch_backend  # noqa: F401

TIMEOUT_S = 60
LATE_S = 1.0
MANY = 12  # groups: more than there are places for in shared memory
LARGE = 20 << 20  # bytes of an object


def accelerate(folder):
    """Train by an `Accelerator`, which takes the group that is there; save its state and load it."""
    from accelerate import Accelerator
    from accelerate.utils import broadcast_object_list, gather_object

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    model = torch.nn.Linear(16, 4)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    batches = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.randn(50, 16), torch.randn(50, 4)), batch_size=4, shuffle=True
    )
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    losses = []
    for x, y in batches:
        with accelerator.accumulate(model):
            loss = (model(x) - y).square().mean()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    accelerator.save_state(f"{folder}/{sys.argv[1]}-state")
    accelerator.wait_for_everyone()  # one rank writes for all
    accelerator.load_state(f"{folder}/{sys.argv[1]}-state")
    number = accelerator.process_index
    return [
        losses,
        accelerator.gather_for_metrics(torch.full((3,), float(number))).tolist(),
        accelerator.pad_across_processes(torch.ones(number + 2)).tolist(),
        accelerator.reduce(torch.ones(2), "mean").tolist(),
        gather_object([number, "x"]),
        broadcast_object_list([number]),
    ]


def trl(folder):
    """Take two steps of TRL's `GRPOTrainer` with a model that is made here."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    words = {letter: number for number, letter in enumerate("abcdefghij ")} | {"<eos>": 11, "<pad>": 12, "<unk>": 13}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=14,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=11,
        eos_token_id=11,
        pad_token_id=12,
    )
    trainer = GRPOTrainer(
        GPT2LMHeadModel(config),
        reward_funcs=lambda completions, **_: [float(text.count("a")) for text in completions],
        args=GRPOConfig(
            output_dir=f"{folder}/{sys.argv[1]}-trl",
            max_steps=2,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=8,
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            learning_rate=1e-3,
            seed=1,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["abc", "bcd", "cde", "def"] * 4}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special),
    )
    trainer.train()
    return sum(parameter.double().sum().item() for parameter in trainer.model.parameters())


def context_parallel(folder):
    """Attend over a sequence that the ranks share."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel as shared
    from torch.nn.functional import scaled_dot_product_attention

    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parts = [torch.randn(1, 2, 64, 16) for _ in range(3)]
    with shared(mesh, buffers=parts, buffer_seq_dims=[2] * 3):
        return scaled_dot_product_attention(*parts, is_causal=True).double().sum().item()


def many_groups_and_a_large_object(folder):
    """Reduce in many groups at once, with an object of 20 MB among the sums."""
    size, sums = dist.get_world_size(), []
    groups = [dist.new_group(list(range(size))) for _ in range(MANY)]
    for _ in range(3):
        given = [torch.full((40_000,), float(number)) for number in range(MANY)]
        works = [dist.all_reduce(x, group=group, async_op=True) for x, group in zip(given, groups, strict=True)]
        objects = [None] * size
        dist.all_gather_object(objects, b"x" * LARGE if dist.get_rank() == 0 else "s")
        for work in works:
            work.wait()
        sums.append([[x.min().item(), x.max().item()] for x in given] + [len(each) for each in objects])
    for group in groups:
        dist.destroy_process_group(group)
    return sums


def split_group(folder):
    """Split the world."""
    return said_by(lambda: dist.split_group(split_ranks=[[0], [1]]))


def sigterm_in_a_call(folder):
    """Get SIGTERM, which the program has a handler for, while the other rank is late to a call."""
    seen = []
    signal.signal(signal.SIGTERM, lambda *_: seen.append("SIGTERM"))
    dist.barrier()
    late = threading.Event()
    if dist.get_rank() == 0:
        threading.Timer(LATE_S / 2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    else:
        late.wait(LATE_S)
    dist.all_reduce(x := torch.ones(3))
    return [x.tolist(), seen]


def destroy_twice(folder):
    """Destroy the world, and once more."""
    dist.destroy_process_group()
    return said_by(dist.destroy_process_group)


def world_after_world(folder):
    """Make another world when one has been destroyed."""
    sums = []
    for _ in range(3):
        dist.destroy_process_group()
        begin("gossamer", "env://")  # one store for all: gloo may hang there, if one rank is far ahead
        dist.all_reduce(x := torch.ones(3))
        sums.append(x.tolist())
    return sums


PROGRAMS = {
    program.__name__: program
    for program in (
        accelerate,
        trl,
        context_parallel,
        many_groups_and_a_large_object,
        split_group,
        sigterm_in_a_call,
        destroy_twice,
    )
}


def said_by(call):
    """Return the error of a call."""
    try:
        call()
    except (RuntimeError, AssertionError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def begin(backend, store):
    """Make the default group."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        backend, init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT_S)
    )


def main(backend, folder):
    """See above."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results = {}
    programs = PROGRAMS if backend == "gloo" else PROGRAMS | {"world_after_world": world_after_world}
    for name, program in programs.items():  # an error in one ends all, and torchrun says it
        begin(backend, f"file://{folder}/store-{backend}-{name}")
        results[name] = program(folder)
        if dist.is_initialized():
            dist.destroy_process_group()
    (Path(folder) / f"{backend}{os.environ['RANK']}").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
