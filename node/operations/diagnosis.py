"""The checks of `gossamer doctor`: can this machine run a node, and does the node in a folder work?

To add a finding, yield a `Diagnosis` from one of the functions here: what is so, whether that will do, and what to do.
"""

import importlib.metadata
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from packaging.requirements import Requirement

from node.config import NodeConfig, fill, is_set, load_config, parse_config, understood
from node.engines.missing import missing
from node.errors import UserError, for_shell, how_to_install, namesakes, printable
from node.operations.presets import preset, smaller
from node.operations.settling import StaleSettingsError, memory_of
from node.policy.memory import BUILTIN_SIZE, PHASES, Device, Machine, ModelSize, adapter_parameters, memory_held
from node.processes.cage import lacking
from node.processes.machine import undefended

MIN_MEMORY = 1.5e9  # bytes available: one node on the built-in policy, with room to start
MIN_DISK = 2e9
EXTRAS = ("vllm", "bitsandbytes", "reasoning-gym", "verifiers", "tensorboard", "wandb", "trackio")
FULL, WEIGHTS = 12, 4  # bytes of a trained weight in a checkpoint: with Adam's two moments, and alone
NVIDIA = Path("/proc/driver/nvidia")

Tree = dict[str, Any]


class Diagnosis(NamedTuple):
    """One finding, and what to do where it is not as it should be; only one that is needed makes the command fail."""

    name: str
    ok: bool
    text: str
    needed: bool = True
    do: str = ""


def examine(folder: Path) -> Iterator[Diagnosis]:
    """Yield what was found of this machine, one thing at a time."""
    yield from _packages()
    yield from _namesakes()
    yield from _torch()
    for line in undefended():
        yield Diagnosis("defences", False, line, needed=False, do="run nodes that meet strangers on Linux")
    lacks = lacking()
    remedy = "run it on Linux 6.12 or later, or as root: until then no task is shared whose reward may run a text"
    yield Diagnosis("cage", not lacks, lacks or "whole: texts of peers are scored apart", needed=False, do=remedy)
    memory = psutil.virtual_memory()
    yield Diagnosis(
        "memory",
        memory.available >= MIN_MEMORY,
        f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free",
        do=f"free {MIN_MEMORY / 1e9:.1f} GB: end other programs, or take a larger machine",
    )
    existing = _existing(folder)
    free = shutil.disk_usage(existing).free
    remedy = f"free {MIN_DISK / 1e9:.0f} GB, or choose a folder on another disk with --state"
    yield Diagnosis("disk", free >= MIN_DISK, f"{free / 1e9:.1f} GB free at {existing}", do=remedy)


def _packages() -> Iterator[Diagnosis]:
    """Compare what is installed with the ranges that this package declares."""
    wrong: list[str] = []
    extras: dict[str, Requirement] = {}
    count = 0
    for line in importlib.metadata.requires("gossamer") or []:
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            extras.setdefault(wanted.name, wanted)
            continue
        count += 1
        installed = _version(wanted.name)
        if installed is None or not wanted.specifier.contains(installed, prereleases=True):
            wrong.append(f"{wanted.name} {installed or 'missing'}, wants {wanted.specifier}")
    remedy = "pip install --upgrade gossamer, or pip install --editable . in a checkout"
    yield Diagnosis("packages", not wrong, "; ".join(wrong) or f"all {count} within their ranges", do=remedy)
    for extra in EXTRAS:
        installed = _version(extra)
        if installed is not None:
            fits = extra not in extras or extras[extra].specifier.contains(installed, prereleases=True)
            text = installed if fits else f"{installed}, wants {extras[extra].specifier}"
            yield Diagnosis(extra, fits, text, needed=False, do=how_to_install(extra))


def _namesakes() -> Iterator[Diagnosis]:
    """Find others' packages that were installed into our folders: pip lets the last one win."""
    for name, others in namesakes().items():
        for other in others:
            remedy = f"give gossamer an environment of its own (pipx does), or pip uninstall {other} and install anew"
            yield Diagnosis(
                f"package {name}", False, f"{other} {_version(other)} writes into the same folder", do=remedy
            )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch() -> Iterator[Diagnosis]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: one of its libraries cannot be loaded
        yield Diagnosis("torch", False, str(error), do="pip install torch")
        return
    yield Diagnosis("torch", True, torch.__version__)
    driver = (NVIDIA / "version").exists()
    count = torch.cuda.device_count()
    names = ", ".join(torch.cuda.get_device_name(index) for index in range(count))
    if count:
        which = "; a node trains on the first, those of `gossamer swarm` on each in turn" if count > 1 else ""
        yield Diagnosis("gpu", True, names + which)
    elif driver and torch.version.cuda is None:
        remedy = "install the CUDA build of torch that its site names for this driver"
        yield Diagnosis("gpu", False, "there is one, but this torch is built for the CPU", needed=False, do=remedy)
    elif driver:
        remedy = f"update the driver to one that serves CUDA {torch.version.cuda}, or give the container its GPUs"
        yield Diagnosis("gpu", False, "there is a driver, but torch sees no device", needed=False, do=remedy)
    elif torch.backends.mps.is_available():
        yield Diagnosis("gpu", True, "Apple's, used with --set policy.device=mps, which nobody has tried yet")
    else:
        yield Diagnosis("gpu", False, "none that torch sees: the CPU is used", needed=False, do="fine for small models")


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())


def examine_model(
    model: str, folder: Path, settings: Sequence[str] = (), gpu: int = 0, sharers: int = 1
) -> Iterator[Diagnosis]:
    """Yield what a node takes with `model` on each device here, and on the disk that holds `folder`.

    Args:
        model: as `policy.model` names it.
        folder: of the node.
        settings: `key.path=value` each, which go before the preset.
        gpu: bytes of a GPU that is not here, for which the sum is made instead.
        sharers: processes on such devices among which FSDP2 shares the weights out.

    Raises:
        UserError: there is no such model, or no such setting.
    """
    from node.policy.detection import detect_machine, has_bitsandbytes, measure_model

    asked = load_config(None, [*settings, f"policy.model={json.dumps(model)}"])
    size = BUILTIN_SIZE if model == "builtin" else measure_model(model)
    yield Diagnosis(
        "model", True, f"{size.parameters / 1e6:.4g} M parameters in {size.layers} layers, {size.vocabulary} words"
    )
    yield from _engine(asked)
    vllm = not missing("vllm", asked.engine)
    this_machine = detect_machine(vllm=vllm)
    machines = [this_machine, detect_machine("cpu", vllm=vllm)] if this_machine.gpu else [this_machine]
    if gpu:
        machines = [Machine(gpu, gpu=True, bf16=True, vllm=this_machine.vllm, nf4=has_bitsandbytes())]
    machines = [machine._replace(sharers=sharers) for machine in machines]
    for machine in machines:
        yield from _fit(asked, size, machine)
    choices = preset(asked, size, machines[0])
    yield _checkpoints(size, fill(asked, {key: choice.value for key, choice in choices.items()}), folder)


def _fit(asked: NodeConfig, size: ModelSize, machine: Machine) -> Iterator[Diagnosis]:
    """Yield the table of what a node with the preset of this machine holds, whether it fits, and the preset."""
    choices = preset(asked, size, machine)
    config = fill(asked, {key: choice.value for key, choice in choices.items()})
    table, own = memory_held(size, config, machine), "gpu" if machine.gpu else "cpu"
    named: dict[Device, str] = {"trainer": own, "engine": "engine's", "main": "main"}
    for device, name in named.items():
        parts = [part for part in table.parts if part.device == device]
        if parts:
            yield Diagnosis(f"{name} GB", True, "".join(f"{phase:>10}" for phase in PHASES))
        for part in parts:
            held = [part.bytes if phase in part.phases else 0 for phase in PHASES]
            yield Diagnosis(f"{name} {part.name}", True, f"{_columns(held)}  {part.why}")
        if parts:
            what = "with what the allocators keep"
            yield Diagnosis(
                f"{name} in all", True, f"{_columns([table.total(phase, device) for phase in PHASES])}  {what}"
            )
    what = "adapters" if config.policy.lora.r else "all weights"
    text = f"{table.peak() / 1e9:6.2f} GB  of {machine.memory / 1e9:.1f} GB, training {what} with what is set here"
    fits = table.peak() <= machine.memory
    remedy = "" if fits else smaller(config, size, machine, lambda table: table.peak() <= machine.memory)
    yield Diagnosis(f"{own} together", fits, text, needed=False, do=f"{remedy}choose a smaller model")
    for key, choice in choices.items():
        if not is_set(asked, key):
            yield Diagnosis(f"{own} set", True, f"{key}={choice.value}  # {choice.reason}")


def _columns(held: Sequence[int]) -> str:
    return "".join(f"{some / 1e9:10.2f}" if some else f"{'-':>10}" for some in held)


def _checkpoints(size: ModelSize, config: NodeConfig, folder: Path) -> Diagnosis:
    """Return whether checkpoints and the group buffer fit on the disk; while one is written there is one more."""
    trainer, rank = config.trainer, config.policy.lora.r
    trained = adapter_parameters(size, rank) if rank else size.parameters
    most = trainer.options.save_total_limit
    full = min(trainer.save_full, most)
    need = trained * (FULL * (full + 1) + WEIGHTS * (most - full)) + config.buffer.max_bytes
    free = shutil.disk_usage(_existing(folder)).free
    text = f"{need / 1e9:6.2f} GB  of {free / 1e9:.1f} GB free, for {most} checkpoints and the group buffer"
    remedy = "set trainer.trl.save_total_limit=1, or choose another disk with --state"
    return Diagnosis("disk together", need <= free, text, needed=False, do=remedy)


def examine_node(folder: Path) -> Iterator[Diagnosis]:
    """Yield what the node in `folder` needs, and how it does if it runs; nothing where there is none."""
    if not (folder / "config.json").exists():
        return
    try:
        config = parse_config(understood(memory_of(folder).last))
    except StaleSettingsError as error:
        yield Diagnosis("settings", False, error.why, do=error.command)
        return
    except UserError as error:
        yield Diagnosis("settings", False, str(error), do="mend or delete that file")
        return
    if folder.stat().st_mode & 0o077:
        yield Diagnosis(
            "privacy", False, f"others can look into {folder}", needed=False, do=f"chmod 700 {for_shell(folder)}"
        )
    yield from _engine(config)
    yield from _swarm(config, folder)
    yield from _running(folder)


def _engine(config: NodeConfig) -> Iterator[Diagnosis]:
    if config.role == "train" and not config.engine.own_weights:
        kind = config.engine.kind
        lacks = missing(kind, config.engine)
        yield Diagnosis(f"engine {kind}", not lacks, lacks or "can start", do=lacks)


def _swarm(config: NodeConfig, folder: Path) -> Iterator[Diagnosis]:
    """Compare the swarm's manifest with what is here: the protocol, and the tasks to the bit."""
    from node.swarm.agreed_tasks import adopt_tasks, earlier_versions
    from node.swarm.swarm_folder import load_manifest
    from node.tasks import load_tasks
    from protocol.wire.version import MAJOR, VERSION, said

    try:
        manifest = load_manifest(folder)
    except UserError as error:
        yield Diagnosis("swarm", False, str(error), do="join it again with an invite")
        return
    if manifest is None:
        return
    same = manifest.protocol_version >> 8 == MAJOR
    text = f"{manifest.name!r}, founded on protocol {said(manifest.protocol_version)}; this is {said(VERSION)}"
    remedy = "nodes that still speak that version do not talk to this one: update them"
    yield Diagnosis("swarm", same, text, needed=False, do=remedy)
    if config.role == "train":
        try:
            earlier = earlier_versions(manifest, load_tasks(config.tasks))
            adopted = [] if earlier else adopt_tasks(manifest, config.tasks)
        except UserError as error:
            yield Diagnosis(
                "swarm's tasks", False, str(error), do="install what the task needs, in the swarm's version"
            )
        else:
            for key, version in earlier.items():
                text = f"{key.name} has version {version} in the swarm and {key.version} here"
                alone = "nodes that still run the founder's release share nothing with this one: update them"
                yield Diagnosis("swarm's tasks", False, text, needed=False, do=alone)
            if not earlier:
                yield Diagnosis(
                    "swarm's tasks", True, f"{', '.join(task.name for task in adopted)}: as the swarm's, to the bit"
                )


def _running(folder: Path) -> Iterator[Diagnosis]:
    """Ask the node that runs in `folder`, if one does: only others know whether it can be dialled."""
    from node.swarm.peering import UPDATE, agent
    from node.telemetry.status_server import ask

    try:
        tree = ask(folder)
    except UserError as error:
        yield Diagnosis("node", True, str(error), needed=False)
        return
    if tree["failure"]:
        yield Diagnosis("network", False, tree["failure"], do="start the node again")
    peers = tree["peers"]
    remedy = "check network.seeds or the invite, and that a firewall lets this machine dial out"
    yield Diagnosis("peers", bool(peers), f"{len(peers)} live, {tree['counters']['known_peers']} known", False, remedy)
    if tree["refusal"]:
        from node.swarm.notices import REMEDIES

        remedy = REMEDIES.get(tree["refusal"], REMEDIES["not_admitted"])
        yield Diagnosis("admitted", False, f"its peers do not admit it: {tree['refusal']}", do=remedy)
    if tree["twin"]:
        yield Diagnosis(
            "identity", False, f"another process runs with this key, at {printable(tree['twin'])}", do="stop one"
        )
    remedy = "start it with --listen tcp://0.0.0.0:4001, forward that port, open the firewall; it works without"
    yield Diagnosis("reached", bool(tree["dialable"]), reachability(tree), needed=False, do=remedy)
    remedy = "start one more with --listen tcp://0.0.0.0:4001: when the one stops, the others lose each other"
    yield Diagnosis(
        "members", not peers or tree["counters"]["dialable_members"] > 1, members(tree), needed=False, do=remedy
    )
    versions = Counter(peer["agent"] for peer in peers)
    if versions:
        text = ", ".join(f"{printable(name)} at {count}" for name, count in versions.most_common(4))
        newer = set(versions) <= {agent()}
        yield Diagnosis("versions", newer, f"peers run {text}; this is {agent()}", False, UPDATE)
    if tree["other_form"]:
        yield Diagnosis("groups", False, tree["other_form"], do=UPDATE)


def reachability(tree: Tree) -> str:
    """Say in one line by whom the node of this /status can be dialled, or why nobody can and what it does then."""
    from protocol.credentials.records import Address
    from protocol.limits.networks import Scope, scope_of

    seen_at, asked, relays = tree["seen_at"], tree["dialable_asked"], len(tree["peers"])
    failed = "".join(
        f"; {failure['endpoint']} could not be dialled from {failure['tried_from']}" for failure in tree["unreached"]
    )
    if seen_at and tree["dialable"]:
        whom = "everybody" if scope_of(seen_at) is Scope.PUBLIC else "nodes of its own network"
        return f"by {whom}, at {seen_at}" + (", says one peer" if asked == 1 else "") + failed
    why = "you do not listen"
    if tree["address"]:
        endpoint = Address.parse(tree["address"]).endpoint
        if not seen_at:
            return "by nodes of this machine" if endpoint.is_loopback else "nobody on another machine has tried yet"
        whom = "the one network asked" if asked == 1 else f"the {asked} networks asked"
        router = tree.get("router") or "a router or firewall is between"
        why = f"{whom} cannot dial port {endpoint.port} at {seen_at}: {router}"
    through = "one relay" if relays == 1 else f"{relays} relays"
    return f"you cannot be reached because {why}{failed}; you learn and teach through {through}"


def members(tree: Tree) -> str:
    """Say in one line how many members of the swarm others can dial: when the only one stops, the rest is apart."""
    count = tree["counters"]["dialable_members"]
    return f"{count} can be dialled" + (
        ": the swarm needs a second that listens, to outlive the first" if count < 2 else ""
    )
