"""The configuration of a node: one tree, from a TOML file and `--set a.b=c`.

Every key is checked: an unknown key, a wrong type or a value out of range is a
`UserError` whose line names the key. Trainer options carry TRL's own names.
"""

import difflib
import functools
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from collectives.types import Codec
from node.errors import UserError

SETTINGS_VERSION = 1
"""Of the settings in a node's folder. To give a setting another meaning under its old name, raise it by one."""
ENDLESS = 2**40  # rounds: at 20 ms each, seven centuries
ImportanceMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
if TYPE_CHECKING:
    CodecName = str
else:
    CodecName = Literal[tuple(codec.value for codec in Codec)]
Schedule = Literal[
    "constant", "constant_with_warmup", "inverse_sqrt",
    "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "polynomial",
]  # fmt: skip
AnswerMode = Literal["tags", "boxed", "last_number", "first_line", "whole"]
# Learning rates that come down until the last round.
DECAYING = ("linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "polynomial")

COMMON_KEYS = frozenset(
    (
        "seed",
        "rounds",
        "tasks",
        "policy.model",
        "policy.device",
        "policy.lora.r",
        "engine.kind",
        "engine.placement",
        "engine.temperature",
        "engine.max_prompt_length",
        "engine.max_completion_length",
        "sampling.local",
        "sampling.external",
        "sampling.completions",
        "sampling.rule",
        "trainer.learning_rate",
        "trainer.save_steps",
        "network.listen",
        "network.advertise",
        "network.seeds",
        "network.upload_limit",
        "weights.mode",
        "observe.host",
        "observe.port",
        "budget.compute",
        "eval.every",
    )
)
"""The settings that people set. `--dry-run` and the reference show these first, and all others on request."""


NAMED_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {
        "sampling.rule": "sapo",
        "sampling.local": 4,
        "sampling.external": 4,
        "sampling.max_surprise": 0.0,
        "sampling.max_length_ratio": 0.0,
        "sampling.max_signer_share": 0.0,
    }
}
"""Settings that go together, by the name that `--preset` takes. "paper" is Algorithm 1 of arXiv 2509.08721, without the
bounds on what a peer may teach, which the paper does not have."""


class Section(BaseModel):
    """A table of the configuration; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


def option_complaint(error: ValidationError, section: type[Section]) -> str:
    """Return one line on the first bad option of a table that another part reads by `section`."""
    first = error.errors()[0]
    option = ".".join(str(part) for part in first["loc"])
    where = f"option {option!r}: " if option else ""  # else it is of several options together
    return f"{where}{first['msg'].removeprefix('Value error, ')}; its options are {', '.join(section.model_fields)}"


class LoraConfig(Section):
    """Low-rank adapters through `peft`; off unless `r` is positive."""

    r: int = Field(0, ge=0, le=512)
    alpha: int = Field(16, ge=1)
    target_modules: str | list[str] = Field(
        "all-linear", description="names of layers, or a pattern; []: those that peft chooses for the architecture"
    )


class PolicyConfig(Section):
    """The model that this node trains."""

    model: str = Field("builtin", description="'builtin', a folder, or a model id")
    prompt: Literal["auto", "chat", "plain"] = Field(
        "auto", description="by the model's chat template, or plain text; 'auto': the template where there is one"
    )
    dtype: Literal["float32", "bfloat16", "float16", "nf4"] = Field(
        "float32",
        description="of the weights; all but 'float32' are for weights beneath adapters; 'float16': for a GPU without "
        "bfloat16; 'nf4': 4 bits each (QLoRA), by bitsandbytes",
    )
    template: dict[str, Any] = Field(
        {}, description="variables for the model's chat template, such as { enable_thinking = false }"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto",
        description="'auto': CUDA where torch sees a GPU, else the CPU; 'mps': an Apple GPU, on request",
    )
    lora: LoraConfig = LoraConfig()


class VllmConfig(Section):
    """The vLLM engine's child process."""

    python: str = Field("", description="interpreter that has vLLM; empty: the node's own")
    gpu_memory_utilization: float = Field(
        0.4, gt=0, le=1, description="the part of a GPU that vLLM has; it sleeps in the update if both do not fit"
    )


def _is_address_of_server(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and parts.port != 0
            and not re.search(r"[\s@]", text)
        )
    except ValueError:  # a port that is none
        return False


PLACES = '"same" for the trainer\'s own device, [1] for a GPU, or "http://HOST:PORT" for a server'


class EngineConfig(Section):
    """The engine that generates the rollouts, its place, and how it samples."""

    kind: Literal["hf", "vllm", "server"] = Field(
        "hf", description="'hf': transformers, in the trainer; 'vllm': a child process; 'server': vLLM at placement"
    )
    placement: list[int] | list[str] = Field(
        [],
        description="GPUs by number, for vLLM, on each of which it has an engine, unless the model needs several; or "
        "vLLM servers, 'http://HOST:PORT'; each gets parts of a round's questions; default: the trainer's own device",
    )
    timeout: float = Field(1800.0, gt=0, description="seconds that a start, a batch or a weight update may take")
    ahead: int = Field(
        0, ge=0, le=1, description="1: the next round is generated while this one trains, by the weights before it"
    )
    temperature: float = Field(1.0, gt=0, le=10)
    top_p: float = Field(1.0, gt=0, le=1)
    max_prompt_length: int = Field(
        256, ge=1, description="tokens; a longer question is skipped, and one that leaves no room for the completion"
    )
    max_completion_length: int = Field(16, ge=1, description="tokens")
    vllm: VllmConfig = VllmConfig()

    @field_validator("placement", mode="before")
    @classmethod
    def _one_or_several(cls, placement: Any) -> Any:
        if isinstance(placement, str | int):
            placement = [] if placement == "same" else [placement]
        if not isinstance(placement, list) or {type(place) for place in placement} not in (set(), {int}, {str}):
            raise ValueError(f"write {PLACES}")
        return placement

    @field_validator("placement")
    @classmethod
    def _places_that_can_be(cls, placement: list[int] | list[str]) -> list[int] | list[str]:
        for place in placement:
            if isinstance(place, str) and not _is_address_of_server(place):
                raise ValueError(f"{place!r} is no address of a server: write {PLACES}")
        # OpenAI's clients want an address with /v1; weights are handed over beside it.
        places = [place.rstrip("/").removesuffix("/v1") if isinstance(place, str) else place for place in placement]
        if any(isinstance(place, int) and place < 0 for place in places) or len(set(places)) < len(places):
            raise ValueError("GPUs have different numbers, from 0 on, and servers different addresses")
        return places  # type: ignore[return-value]

    @model_validator(mode="after")
    def _placement_of_the_kind(self) -> "EngineConfig":
        if (self.kind == "server") != bool(self.servers):
            raise ValueError("engine.kind='server' and servers in engine.placement go together: set both or neither")
        if self.devices and self.kind != "vllm":
            raise ValueError(f"GPUs in engine.placement are for engine.kind='vllm', which is {self.kind!r}")
        return self

    @property
    def devices(self) -> list[int]:
        """The GPUs of vLLM; empty where it has the trainer's."""
        return [place for place in self.placement if isinstance(place, int)]

    def beside(self, processes: int) -> "EngineConfig":
        """Return this configuration for a node that trains on so many GPUs: each has an engine of vLLM."""
        if self.kind != "vllm" or self.placement or processes == 1:
            return self
        return self.model_copy(update={"placement": list(range(processes))})

    @property
    def servers(self) -> list[str]:
        """The addresses of vLLM servers."""
        return [place for place in self.placement if isinstance(place, str)]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence: a prompt and its completion."""
        return self.max_prompt_length + self.max_completion_length

    def longest_prompt(self, positions: int | None) -> int:
        """Return how many tokens a prompt may have, so that the longest completion still has positions after it.

        `positions` are the policy's; None if it has no bound.

        Raises:
            UserError: the completions leave no room for a question.
        """
        if positions is None:
            return self.max_prompt_length
        room = positions - self.max_completion_length
        if room < 1:
            raise UserError(
                f"engine.max_completion_length={self.max_completion_length} leaves no room for a question: "
                f"the policy has {positions} positions"
            )
        return min(self.max_prompt_length, room)

    @property
    def own_weights(self) -> bool:
        """Whether the tokens come from the very weights that are then trained on them."""
        return self.kind == "hf" and not self.ahead


class TaskConfig(Section):
    """One task that this node asks and can verify."""

    name: str
    weight: float = Field(1.0, gt=0, description="relative frequency of its questions")
    examples: int = Field(0, ge=0, le=16, description="solved questions of the same kind before each question")
    answer: AnswerMode | None = Field(None, description="where a completion's answer is; default: the task's own way")
    instruction: str | None = Field(
        None, max_length=1024, description="what the model is told before the question; default: the task's own"
    )
    options: dict[str, Any] = {}

    @property
    def prompting(self) -> dict[str, Any]:
        """What is set of how the task is asked and read, whatever its kind."""
        return self.model_dump(include={"examples", "answer", "instruction"}, exclude_defaults=True)


FILE_OPTIONS = ("path", "test", "tokenizer")  # of a task, which name a file on this machine
FUNCTION_FILE = re.compile(
    r"(.+?\.py)(:)(.*)", re.DOTALL
)  # a function or class that is named by a file on this machine
HUB_OPTIONS = ("hub", "subset", "split", "test_split")  # of a task, which name a data set elsewhere


def is_file_task(name: str) -> bool:
    """Tell whether a task of this name may have one of `FILE_OPTIONS`."""
    return name.partition("/")[0] in ("dataset", "environment", "file", "rewards")


class SamplingConfig(Section):
    """The groups that a round generates, and those that it trains on (I and J of the paper)."""

    local: int = Field(2, ge=0, description="own groups a round, I")
    external: int = Field(16, ge=0, description="peers' groups a round, J, or fewer where there are not as many")
    source: Literal["peers", "self"] = Field(
        "peers",
        description="whose groups the external ones are; 'self': this node's own of earlier rounds, the control that "
        "tells what peers are worth from what replay is worth",
    )
    completions: int = Field(
        8, ge=2, le=128, description="completions a question, L; of a larger external group as many are drawn"
    )
    questions: int | None = Field(None, ge=1, description="questions a round; default: as many as local")
    rule: Literal["sapo", "positive", "rft"] = Field(
        "positive",
        description="what a round takes of own and of peers' groups; 'positive': the best answer of each peer's group; "
        "'sapo': the paper's, whole groups, best with local = external = 4; 'rft': supervised learning on right "
        "answers alone: docs/sharing.md",
    )
    max_surprise: float = Field(
        3.0,
        ge=0,
        le=700,
        description="nats: a peer's completion is left out if its least likely token is rare here, and this policy "
        "would say one as rare in less than exp(-max_surprise) of such completions; 3 leaves out at most a twentieth "
        "of what this policy says itself, and other manners more often; costs a forward pass; 0: no bound",
    )
    max_length_ratio: float = Field(
        2.0,
        ge=0,
        description="a peer's completion is left out if it has more tokens than so many times this node's own right "
        "answers to the task, or its answers, where none is right; 0: no bound",
    )
    max_signer_share: float = Field(
        2.0,
        ge=0,
        description="a round draws of each signer at most so many times external / signers in the buffer; 0: no bound",
    )

    @model_validator(mode="after")
    def _some_groups(self) -> "SamplingConfig":
        if self.local + self.external == 0:
            raise ValueError("local and external cannot both be 0")
        return self

    @property
    def questions_per_round(self) -> int:
        """Questions that a round generates for."""
        return self.questions if self.questions is not None else max(self.local, 1)

    @property
    def from_peers(self) -> int:
        """Peers' groups that a round draws."""
        return self.external if self.source == "peers" else 0


_WITHOUT_ADVANTAGE = "it pulls at completions without an advantage too, and a round without signal is no step"
LEFT_OUT = {
    "beta": "no reference model is kept",
    "gradient_accumulation_steps": "tokens_per_batch splits a round",
    "entropy_coef": _WITHOUT_ADVANTAGE,
    "use_adaptive_entropy": _WITHOUT_ADVANTAGE,
    "top_entropy_quantile": "its quantile is of a micro-batch, and gradients must not depend on how a round is split",
}


_OF_UPDATE = {
    *("lr_scheduler_type", "optim", "adam_beta2", "loss_type", "importance_sampling_level"),
    *("epsilon_high", "off_policy_mask_threshold"),
}
NotNegative, Positive = Annotated[float, Field(ge=0)], Annotated[float, Field(gt=0)]
_TYPES: Mapping[str, Any] = {
    **dict.fromkeys(
        ("weight_decay", "vespo_k_pos", "vespo_k_neg", "vespo_lambda_pos", "vespo_lambda_neg"), NotNegative
    ),
    **dict.fromkeys(("max_grad_norm", "adam_epsilon", "epsilon", "delta"), Positive),
    **dict.fromkeys(("sapo_temperature_neg", "sapo_temperature_pos"), Positive),
    "adam_beta1": Annotated[float, Field(ge=0, lt=1)],
    "lr_scheduler_kwargs": dict[str, Any],
}
_Passed = create_model(
    "_Passed",
    __config__=ConfigDict(allow_inf_nan=False),
    **{name: (type_, None) for name, type_ in _TYPES.items()},
)  # type: ignore[call-overload]
PASSED = tuple(_TYPES)
"""The options of `trainer.trl` that go to TRL's `GRPOConfig` as they are, which also has their defaults."""


class TrlOptions(Section):
    """The options of `trainer.trl`, beside `PASSED`, by the names of TRL's `GRPOConfig`: the node reads them itself, or
    has another default.
    """

    lr_scheduler_type: Schedule = "constant"
    warmup_steps: int = Field(0, ge=0, description="rounds")
    optim: Literal["adamw_torch_fused", "adamw_8bit"] = Field(
        "adamw_torch_fused", description="'adamw_8bit': Adam's moments take 2 bytes a weight and not 8, by bitsandbytes"
    )
    adam_beta2: float = Field(0.99, ge=0, lt=1)
    loss_type: Literal["dapo", "grpo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"] = Field(
        "dapo",
        description="each over the whole round, however it is split into micro-batches; 'sapo' is Soft Adaptive "
        "Policy Optimization, not the sharing of rollouts; 'luspo' wants importance_sampling_level='sequence'",
    )
    importance_sampling_level: Literal["token", "sequence"] = Field(
        "token", description="of the ratio that is clipped; 'sequence' is GSPO, whose epsilons are some 3e-4"
    )
    mask_truncated_completions: bool = Field(
        False, description="do not train on completions that reached the limit without an end-of-text"
    )
    epsilon_high: float = Field(0.28, gt=0, description="for 'cispo', as in TRL, the largest ratio itself: 5, say")
    scale_rewards: Literal["none", "group"] = "none"
    vllm_importance_sampling_correction: bool = Field(
        True,
        description="weight each token by the trainer's probability over its sampler's, if the sampler has other "
        "weights or rounding: vLLM, or engine.ahead",
    )
    vllm_importance_sampling_mode: ImportanceMode = Field(
        "token_truncate", description="of a token or of its whole completion; a larger weight is cut, or made 0"
    )
    vllm_importance_sampling_clip_max: float = Field(2.0, ge=1, description="the largest such weight")
    off_policy_mask_threshold: float | None = Field(
        None, gt=0, description="nats a token between sampler and trainer above which a poor completion does not train"
    )
    save_total_limit: int = Field(2, ge=1, description="checkpoints to keep, beside the best by evaluation")
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        [], description="trackers that each round's metrics go to; each decides what it sends where"
    )

    @model_validator(mode="after")
    def _level_of_the_loss(self) -> "TrlOptions":
        wanted = {"luspo": "sequence", "vespo": "token"}.get(self.loss_type, self.importance_sampling_level)
        if self.importance_sampling_level != wanted:
            raise ValueError(f"loss_type={self.loss_type!r} wants importance_sampling_level={wanted!r}")
        return self


class TrainerConfig(Section):
    """The update, by TRL's option names."""

    learning_rate: float = Field(5e-4, gt=0)
    num_iterations: int = Field(1, ge=1, description="updates on each batch")
    trl: dict[str, Any] = Field(
        {}, description='further options of TRL\'s GRPOConfig, such as { loss_type = "grpo", epsilon = 0.1 }'
    )
    tokens_per_batch: int = Field(
        2048,
        ge=1,
        description="tokens, padding included, that go through the model at once: a round is split so, to bound memory "
        "(SmolLM2-135M in bfloat16: 4.9 GiB in all at 2048); halved where the memory does not suffice",
    )
    gradient_checkpointing: bool = False
    bf16: bool | Literal["auto"] = Field(
        "auto",
        description="products in bfloat16, weights as they are; 'auto': over 10 million weights, if the machine has it",
    )
    stop_grace: float = Field(
        30.0,
        ge=0,
        description="seconds that a round in progress may still take after a signal to stop; then it is abandoned, and "
        "done again at the next start",
    )
    save_steps: int = Field(20, ge=1, description="rounds between checkpoints, or more, to write 1 TB a day at most")
    save_minutes: float | None = Field(
        None, gt=0, description="minutes between checkpoints at most, for long rounds; default: as save_steps says"
    )
    save_full: int = Field(
        2,
        ge=0,
        description="how many of them, the newest, keep the optimiser's state; others keep weights alone, or adapters "
        "where those are trained; 0: the optimiser begins anew at each start",
    )

    @field_validator("trl")
    @classmethod
    def _of_trl(cls, given: dict[str, Any]) -> dict[str, Any]:
        try:
            TrlOptions.model_validate(_without_passed(given))
            _Passed.model_validate({name: value for name, value in given.items() if name in _TYPES})
        except ValidationError as error:
            raise ValueError(_trl_complaint(error)) from None
        return given

    @property
    def options(self) -> TrlOptions:
        """The options of `trl` that the node reads, with the defaults of those that are not in it."""
        return TrlOptions.model_validate(_without_passed(self.trl))

    @property
    def of_update(self) -> dict[str, Any]:
        """The options of `trl` that say how a step is computed, in the words and the meaning of `GRPOConfig`."""
        passed = {name: value for name, value in self.trl.items() if name in _TYPES}
        return self.options.model_dump(include=_OF_UPDATE) | passed


def _without_passed(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in _TYPES}


def _trl_complaint(error: ValidationError) -> str:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if name in LEFT_OUT:
        return f"{name} of TRL is left out: {LEFT_OUT[name]}"
    if name in TrainerConfig.model_fields:
        return f"{name} is a setting of its own: set trainer.{name}"
    if first["type"] != "extra_forbidden":
        return f"{name}: {first['msg']}" if name else first["msg"].removeprefix("Value error, ")
    close = difflib.get_close_matches(name, TRL_OPTIONS, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{name!r} is no option of it: {hint}there are {', '.join(TRL_OPTIONS)}"


def _endpoint_to_bind(text: str) -> str:
    return _parsed(text, lambda records: records.Endpoint.parse(text, bind=True)) if text else text


def _endpoint(text: str) -> str:
    return _parsed(text, lambda records: records.Endpoint.parse(text))


def _address(text: str) -> str:
    return _parsed(text, lambda records: records.Address.parse(text))


def _parsed(text: str, parse: Callable[[Any], object]) -> str:
    from protocol.credentials import records  # here: what prints help or a default need not import zmq
    from protocol.errors import BadAddress

    try:
        parse(records)
    except BadAddress as error:
        raise ValueError(str(error)) from None
    return text


def _swarm_id(text: str) -> str:
    if not re.fullmatch("([0-9a-fA-F]{32})?", text):
        raise ValueError("a swarm's id has 32 hex digits")
    return text


class NetworkConfig(Section):
    """How the node meets its peers."""

    enabled: bool = True
    listen: Annotated[str, AfterValidator(_endpoint_to_bind)] = Field(
        "tcp://127.0.0.1:0",
        validate_default=False,
        description="on loopback only this machine can dial it, and a node with seeds elsewhere listens nowhere",
    )
    advertise: list[Annotated[str, AfterValidator(_endpoint)]] = Field(
        [], description="endpoints to tell peers instead of where it listens, for a port that is forwarded"
    )
    seeds: list[Annotated[str, AfterValidator(_address)]] = Field(
        [], description="addresses of nodes already in the swarm"
    )
    swarm: Annotated[str, AfterValidator(_swarm_id)] = Field(
        "", description="swarm id, 32 hex digits; empty: the isolated default"
    )
    upload_limit: int = Field(
        0, ge=0, description="bytes a second that it sends peers at most, shared fairly among them; 0: no limit"
    )
    local: Literal["all", "port", "peers", "off"] = Field(
        "all",
        description="what a node that listens, and not on loopback only, says in its own network; 'port': it asks the "
        "router to forward its port (UPnP or NAT-PMP); 'peers': it looks for nodes of its swarm (mDNS)",
    )


class WeightsConfig(Section):
    """Averaging weights with peers that train the same architecture, in the background."""

    mode: Literal["off", "average", "diloco", "async-diloco"] = "off"
    every: int = Field(20, ge=1, description="rounds between two exchanges, H")
    listen: str = Field(
        "", description="where the group's members dial this node; empty: network.listen's host, any port"
    )
    codec: CodecName = Field(Codec.NONE.value, description="how weights travel: `collectives.types.Codec`")


class ObserveConfig(Section):
    """The node's own HTTP server: its page for a browser, /status, /metrics for Prometheus, /healthz."""

    enabled: bool | Literal["private"] = Field(
        True, description="false: neither a page nor reports to a swarm that asks for them; 'private': no reports"
    )
    host: str = Field("127.0.0.1", description="on any other than loopback, who asks has to know the token")
    token: str = Field("", max_length=128, description="default: drawn at the start; observe.json holds it")
    port: int = Field(0, ge=0, le=65535, description="0: any free one; observe.json in the node's folder names it")


class EvalConfig(Section):
    """Scoring the policy, while it trains, on questions that training never asks; `evaluations.jsonl` keeps it.

    The policy with the highest score is kept: `checkpoints/best` in the node's folder.
    """

    every: Annotated[int, Field(ge=0)] | Literal["hour", "ends", "marks"] = Field(
        "hour",
        description="rounds between two evaluations, with one before the first round and one after the last; 'hour': "
        "an hour between them, or more where one takes over three minutes, and greedy answers alone; 'ends': the first "
        "and the last alone; 'marks': also, of greedy answers alone, when 1/16 of the run is done, and each time that "
        "the part done has grown by the root of 2; in a swarm of one machine its first node only; 0: none",
    )
    count: int = Field(32, ge=1, description="questions of each task")
    skip: int = Field(
        0, ge=0, description="questions of each task that are passed over: a choice was made on them, say"
    )
    completions: int = Field(
        8, ge=0, le=128, description="sampled answers to each question, for pass@k, beside the greedy one; 0: none"
    )
    tasks: list[TaskConfig] = Field([], description="whose questions; default: the node's tasks")


class BudgetConfig(Section):
    """The tokens that a node may spend before it ends, beside `rounds`; `node.training.budget` says how they are
    counted.
    """

    generated_tokens: int | None = Field(
        None, ge=1, description="the node ends with the round in which it has generated so many; default: no bound"
    )
    compute: int | None = Field(
        None,
        ge=1,
        description="likewise, tokens generated, scored or read as prompts, plus three times those trained on",
    )


class BufferConfig(Section):
    """Bounds of the group buffer, which holds peers' groups."""

    max_age: float = Field(
        3600.0, gt=0, description="seconds; a swarm that this node founds takes no older groups at any node"
    )
    max_groups: int = Field(4096, ge=1)
    max_bytes: int = Field(64 << 20, ge=1 << 16, description="in memory, and on disk as much again")


class NodeConfig(Section):
    """Everything that decides what a node does."""

    seed: int | None = Field(None, ge=0, lt=2**63, description="default: drawn once and kept in the node's folder")
    role: Literal["train", "relay"] = Field(
        "train", description="'relay': introduces peers, relays and serves the manifest; loads no model, trains nothing"
    )
    rounds: int | None = Field(None, ge=1, description="default: until it is stopped; `gossamer swarm`: 300")
    threads: int = Field(0, ge=0, description="CPU threads for tensors; 0: torch's choice")
    policy: PolicyConfig = PolicyConfig()
    engine: EngineConfig = EngineConfig()
    tasks: list[TaskConfig] = Field([TaskConfig(name="builtin")], min_length=1)
    sampling: SamplingConfig = SamplingConfig()
    trainer: TrainerConfig = TrainerConfig()
    network: NetworkConfig = NetworkConfig()
    weights: WeightsConfig = WeightsConfig()
    observe: ObserveConfig = ObserveConfig()
    buffer: BufferConfig = BufferConfig()
    budget: BudgetConfig = BudgetConfig()
    eval: EvalConfig = EvalConfig()

    @property
    def last_round(self) -> int:
        """The round after which the node ends; one that no node reaches where `rounds` is not set."""
        return ENDLESS if self.rounds is None else self.rounds

    @property
    def ends(self) -> bool:
        """Whether the node ends by itself: at a last round, or at a budget."""
        return self.rounds is not None or self.budget != BudgetConfig()

    @model_validator(mode="after")
    def _steps_reach_the_weights(self) -> "NodeConfig":
        if self.policy.dtype == "nf4" and self.policy.lora.r == 0:
            raise ValueError("policy.dtype='nf4' is for weights beneath adapters: set policy.lora.r=16")
        if self.policy.dtype != "float32" and self.policy.lora.r == 0:
            raise ValueError(
                f"policy.dtype={self.policy.dtype!r} rounds away what a small learning rate adds to a weight: leave it "
                "at 'float32' (trainer.bf16 computes in bfloat16 all the same), or set policy.lora.r, whose adapters "
                "are float32"
            )
        return self

    @model_validator(mode="after")
    def _engine_has_these_weights(self) -> "NodeConfig":
        if self.policy.dtype == "nf4" and self.engine.kind != "hf":
            raise ValueError(
                f"engine.kind={self.engine.kind!r} would generate with other weights than the 4-bit ones that adapters "
                "are trained on: set engine.kind='hf', or policy.dtype='bfloat16'"
            )
        return self

    @model_validator(mode="after")
    def _ratio_is_of_one_distribution(self) -> "NodeConfig":
        corrected = not self.engine.own_weights and self.trainer.options.vllm_importance_sampling_correction
        if corrected and self.engine.top_p < 1:
            raise ValueError(
                f"engine.top_p={self.engine.top_p} cuts the distribution that the engine's probabilities are of: leave "
                "it at 1, or set trainer.trl.vllm_importance_sampling_correction=false"
            )
        return self

    @model_validator(mode="after")
    def _decay_has_an_end(self) -> "NodeConfig":
        schedule = self.trainer.options.lr_scheduler_type
        if self.rounds is None and schedule in DECAYING:
            raise ValueError(
                f"trainer.trl.lr_scheduler_type={schedule!r} comes down until the last round: "
                "set rounds, or choose a constant one"
            )
        return self


TRL_OPTIONS = (*TrlOptions.model_fields, *PASSED)
"""What `trainer.trl` may hold."""
TRL_KEYS = tuple(f"trainer.trl.{name}" for name in TRL_OPTIONS)


class OtherVersionError(UserError):
    """A node's settings in `path` are of another version than this program's; `tree` is what they say."""

    def __init__(self, path: Path, version: object, tree: Mapping[str, Any]) -> None:
        super().__init__(f"{path} has settings of version {version!r}, and this is version {SETTINGS_VERSION}")
        self.tree = tree


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> NodeConfig:
    """Read a TOML file or a node's config.json, and apply `key.path=value` overrides in order."""
    return parse_config(read_tree(path, overrides))


def read_tree(path: Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return what a file and `key.path=value` overrides say, unchecked; `UserError` for what cannot be read."""
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            text = path.read_text()
            tree = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        except FileNotFoundError:
            raise UserError(f"no configuration file {path}: check the path") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {path}: {error}") from None
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"{path} is not valid TOML: {error}") from None
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} is no configuration: it holds {tree!r:.20}, not a table")
    if path is not None and path.suffix == ".json":
        version = tree.pop("version", SETTINGS_VERSION)
        if version != SETTINGS_VERSION:
            raise OtherVersionError(path, version, tree)
    if "arms" in tree:
        raise UserError(f"{path} is an experiment and no node's configuration: gossamer lab run {path}")
    if path is not None:
        anchor_files(tree, path.parent)
    for override in overrides:
        apply_override(tree, override)
    anchor_files(tree, Path())
    return tree


def anchor_files(tree: Mapping[str, Any], folder: Path) -> None:
    """Make the paths of tasks' files absolute, in whatever table the tasks stand; relative ones begin at `folder`."""
    tasks = tree.get("tasks")
    for task in tasks if isinstance(tasks, list) else []:
        options = task.get("options") if isinstance(task, dict) else None
        if isinstance(options, dict) and is_file_task(str(task.get("name"))):
            for name in FILE_OPTIONS:
                if isinstance(options.get(name), str):
                    options[name] = str((folder / options[name]).absolute())
            if "factory" in options:
                options["factory"] = _anchored(options["factory"], folder)
            functions = options.get("functions")
            if isinstance(functions, list):
                options["functions"] = [_anchored(function, folder) for function in functions]
    for table in tree.values():
        if isinstance(table, Mapping):
            anchor_files(table, folder)


def _anchored(function: object, folder: Path) -> object:
    match = FUNCTION_FILE.fullmatch(function) if isinstance(function, str) else None
    return function if match is None else f"{(folder / match[1]).absolute()}:{match[3]}"


def fill(config: NodeConfig, values: Mapping[str, Any]) -> NodeConfig:
    """Return `config` with `values`, by dotted key, for what is not set in it; they do not count as set.

    A setting counts as set if `model_dump(exclude_unset=True)` gives it.
    """
    tree = config.model_dump(exclude_unset=True)
    missing = [key for key in values if not is_set(config, key)]
    for key in missing:
        put(tree, key, values[key])
    filled = parse_config(tree)
    for key in missing:
        *tables, last = key.split(".")
        functools.reduce(getattr, tables, filled).model_fields_set.discard(last)
    return filled


def is_set(config: NodeConfig, key: str) -> bool:
    """Tell whether dotted `key` was set, rather than left to its default or filled in."""
    *tables, last = key.split(".")
    return last in functools.reduce(getattr, tables, config).model_fields_set


OPEN_TABLES = ("policy.template", "trainer.trl")
"""Settings whose value is a table, with keys that are no settings."""


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tree of both, `over` before `under`, table by table."""
    merged = dict(under)
    for key, value in over.items():
        before = merged.get(key)
        merged[key] = merge(before, value) if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    return merged


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a tree by dotted key; a list is a value, and so is one of `OPEN_TABLES`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        is_table = isinstance(value, Mapping) and prefix + key not in OPEN_TABLES
        flat |= flatten(value, f"{prefix}{key}.") if is_table else {prefix + key: value}
    return flat


def all_keys(section: type[Section] = NodeConfig, prefix: str = "") -> Iterator[str]:
    """Yield the dotted key of every setting and of every table."""
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from all_keys(field.annotation, f"{prefix}{name}.")


def is_key(key: str) -> bool:
    """Tell whether there is a setting, or a table, of dotted `key`, or an option of `trainer.trl`."""
    return key in all_keys() or key in TRL_KEYS


def unknown_key(key: str) -> str:
    """Return what to say of an unknown dotted key: which one may have been meant."""
    table, _, last = key.rpartition(".")
    if table == "trainer" and last in LEFT_OUT:
        return f"{last} of TRL is left out: {LEFT_OUT[last]}"
    known = [*all_keys(), *TRL_KEYS]
    close = difflib.get_close_matches(key, known, n=1)
    close = close or [key for key in known if key.rpartition(".")[2] == last]
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"unknown configuration key {key!r}: {hint}see `gossamer node --dry-run --all` for all keys"


def _key_of(place: Sequence[int | str]) -> str:
    """Return the dotted key of a complaint's place, which ends with a type where the setting has several."""
    *above, last = map(str, place or ("",))
    key = ".".join(above)
    is_value = key in all_keys() and not any(known.startswith(f"{key}.") for known in all_keys())
    return key if is_value and not last.isdecimal() else ".".join((*above, last))


def refused_keys(tree: Mapping[str, Any]) -> list[str]:
    """Return the dotted keys of what `parse_config` refuses in `tree`; an empty one if settings do not agree."""
    try:
        NodeConfig.model_validate(tree)
    except ValidationError as error:
        return list(dict.fromkeys(_key_of(mistake["loc"]) for mistake in error.errors()))
    return []


def without(tree: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return `tree` without dotted `key`, or without the value that the key leads into."""
    name, _, rest = key.partition(".")
    inner = tree.get(name)
    kept = {other: value for other, value in tree.items() if other != name}
    return {**kept, name: without(inner, rest)} if rest and isinstance(inner, Mapping) else kept


def understood(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return `tree` without what `parse_config` refuses in it."""
    left = dict(tree)
    while keys := refused_keys(left):
        before, left = left, functools.reduce(without, keys, left)
        if left == before:  # settings that do not agree
            return {}
    return left


def parse_config(tree: Mapping[str, Any]) -> NodeConfig:
    """Validate a configuration tree; `UserError` names the first bad key."""
    try:
        return NodeConfig.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = _key_of(first["loc"])
        mistakes = [
            mistake["msg"].removeprefix("Value error, ")
            for mistake in error.errors()
            if _key_of(mistake["loc"]) == where
        ]
        what = ", or ".join(dict.fromkeys(mistakes))  # several where the setting has several types
        if first["type"] == "extra_forbidden":
            raise UserError(unknown_key(where)) from None
        if not where:
            raise UserError(f"configuration: {what}") from None
        raise UserError(f"configuration key {where!r}: {what} (got {first['input']!r})") from None


def put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set dotted `key` in `tree`; `UserError` where a part of it is no table."""
    *tables, last = key.split(".")
    for name in tables:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise UserError(f"cannot set {key}: {name!r} is not a table")
    tree[last] = value


def apply_override(tree: dict[str, Any], override: str, flag: str = "--set") -> None:
    """Change `tree` by `key.path=value`, given as `flag`; `UserError` for what is no such thing."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.strip().split(".")):
        raise UserError(f"{flag} wants KEY=VALUE such as sampling.local=4, got {override!r}")
    put(tree, key.strip(), _parse_value(text.strip()))


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
