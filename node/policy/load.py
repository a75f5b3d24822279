"""A policy: a causal language model with its tokenizer, loaded and placed on its device."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from node.config import LoraConfig, PolicyConfig
from node.errors import UserError, one_line
from node.policy.completion_text import INCOMPLETE, CompletionText
from node.policy.detection import check_bits, computes_in_bf16, find_model
from node.policy.prompt import chat_turns, plain_text, tells_of_calls, with_tools_told
from node.tasks import Item
from node.tasks.environments.tool_calls import results_in

BUILTIN = Path(__file__).with_name("builtin")
"""The policy that ships with the node: a tiny Llama-style model over characters, as `transformers` saves it."""

_MARKS = ("THE-ANSWER", "WHAT-IS-TOLD", "WHAT-ELSE-IS-TOLD")  # stand for turns while a template is looked at
_TOOL_ROLE = re.compile(r"""["']tool["']""")  # in a template that treats this role otherwise than others
LARGE = 10_000_000  # weights; below, a round is mostly overhead, and neither bfloat16 nor shared prompts save time


@dataclass(frozen=True, slots=True)
class Policy:
    """A model being trained.

    `name` says what it is ("llama-51k": architecture and parameters) and travels in groups;
    it tells nothing about folders or accounts. `prompt` is the style of its prompts, as configured, and `template`
    holds variables for its chat template. `source` is the folder or the model id that it was loaded from.
    A completion is finished once it ends in one of `eos_token_ids`; the first of them is the tokenizer's own.
    `bf16`: training and generation compute products in bfloat16, with the weights as they are.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    eos_token_ids: tuple[int, ...]
    prompt: Literal["auto", "chat", "plain"] = "auto"
    template: Mapping[str, Any] = field(default_factory=dict)
    bf16: bool = False
    source: str = ""
    _completion_text: CompletionText = field(init=False, repr=False, compare=False)
    _template_end: int | None = field(init=False, repr=False, compare=False)  # what the chat template ends a turn with

    def __post_init__(self) -> None:
        object.__setattr__(self, "_completion_text", CompletionText(self.tokenizer, self.eos_token_ids))
        behind_answer = ((self._around("user", 1) if self._chats else None) or [[]])[0]
        end = self._first_end(behind_answer)
        object.__setattr__(self, "_template_end", None if end is None else behind_answer[end])

    def autocast(self) -> torch.autocast:
        """Return the context in which this policy computes: products in bfloat16 where `bf16` says so."""
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16)

    @property
    def positions(self) -> int | None:
        """How many tokens a sequence may have; None for an architecture that sets no bound."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def pad_token_id(self) -> int:
        """The token in the unused places of a batch; always masked."""
        return self.tokenizer.pad_token_id

    def encode_prompt(self, item: Item) -> list[int]:
        """Return the tokens that ask `item`: a chat by the template, or plain text; see `node.policy.prompt`.

        Raises `UserError` where the template refuses the turns.
        """
        text, special = (self._chat(item), False) if self._chats else (plain_text(with_tools_told(item)), True)
        return _tokens(self.tokenizer, text, special)

    @property
    def _chats(self) -> bool:
        return self.prompt == "chat" or (self.prompt == "auto" and self.tokenizer.chat_template is not None)

    def _chat(self, item: Item) -> str:
        if item.tools:
            told = self._render(chat_turns(item, system_role=True), json.loads(item.tools))
            if told is not None and tells_of_calls(told, item):
                return told
            item = with_tools_told(item)
        text = self._render(chat_turns(item, system_role=True))
        if text is None or item.system.strip() not in text:  # it refuses the system's role, or drops what that says
            text = self._render(chat_turns(item, system_role=False))
        if text is None:
            raise UserError("the chat template of policy.model refuses these turns: set policy.prompt to 'plain'")
        return text

    def _render(self, turns: Sequence[Mapping[str, str]], tools: list[Any] | None = None) -> str | None:
        told = {"tools": tools} if tools else {}
        try:
            return self.tokenizer.apply_chat_template(
                turns, **{**self.template, **told, "add_generation_prompt": True, "tokenize": False}
            )
        except (TemplateError, TypeError):  # a template is other people's program
            return None

    def turn_end(self, sampled: Iterable[int] = ()) -> int:
        """Return the token that ends a turn of this policy.

        It is the token that the chat template writes after an answer. If the template writes none, or prompts are plain
        text, it is the most frequent one in `sampled`, the last tokens of the policy's own finished turns. Without
        these it is the tokenizer's end-of-text. Some models (Gemma, Phi) end their turns in another token than that,
        and would hardly ever say it.
        """
        if self._template_end is not None:
            return self._template_end
        most_frequent = Counter(sampled).most_common(1)
        return most_frequent[0][0] if most_frequent else self.eos_token_ids[0]

    def encode_completion(self, text: str, finished: bool, end: int | None = None) -> list[int]:
        """Return the tokens of a completion, with `end`, or else `turn_end()`, only where it really `finished`.

        A special token spelt out in `text` is encoded letter by letter: a peer's text must
        not be able to end, or begin, a turn.
        """
        ids = self._completion_text.encode(text)
        return [*ids, self.turn_end() if end is None else end] if finished else ids

    def observations(self, *, chats: bool = True) -> Callable[[str], list[int]]:
        """Return what encodes a text that an environment says between two turns of this policy.

        A chat has it as a user's turn, up to where the policy's next one begins; plain text has it as it is. Results of
        tagged calls (`node.tasks.environments.tool_calls.told`) stand in turns of the role `tool`, if the template
        knows it. Special tokens that are spelt out are encoded letter by letter. What this returns may be called on any
        thread.

        Args:
            chats: whether a chat may come; without it the template is not tried.

        Raises:
            UserError: the template refuses a second turn.
        """
        encode = self._completion_text.encode
        if not (chats and self._chats):
            return encode
        asking, returning = self._around("user", 1), None
        if asking is None:
            raise UserError(
                "the chat template of policy.model shows no second turn, and a task has several: set policy.prompt to "
                "'plain'"
            )
        if _TOOL_ROLE.search(str(self.tokenizer.chat_template)):
            returning = self._around("tool", 2)
        for parts in filter(None, (asking, returning)):
            end = self._first_end(parts[0])
            if end is not None:  # the policy's turn has its own
                del parts[0][: end + 1]

        def encoded(said: str) -> list[int]:
            results = results_in(said)
            if returning is None or not results:
                return [*asking[0], *encode(said), *asking[1]]
            before, between, behind = returning
            ids = list(before)
            for at, result in enumerate(results):
                ids += [*(between if at else ()), *encode(result)]
            return [*ids, *behind]

        return encoded

    def _around(self, role: str, count: int) -> list[list[int]] | None:
        """Return the tokens before, between and behind `count` turns of a role that follow one of the policy.

        The first part begins with what ends the policy's turn. None if the template does not show such turns.
        """
        answer, *told = _MARKS[: count + 1]
        turns = [("user", "What now?"), ("assistant", answer), *((role, text) for text in told)]
        text = self._render([{"role": role, "content": content} for role, content in turns]) or ""
        _, found, rest = text.partition(answer)
        parts = []
        for mark in told:
            part, again, rest = rest.partition(mark)
            found = found and again
            parts.append(part)
        if not found:
            return None
        return [_tokens(self.tokenizer, part, special=False) for part in (*parts, rest)]

    def _first_end(self, ids: Sequence[int]) -> int | None:
        return next((at for at, token in enumerate(ids) if token in self.eos_token_ids), None)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a completion's `ids` up to the first end-of-text, without special tokens.

        If the completion was cut off inside a character, the part of that character is left out.
        """
        end = self._first_end(ids)
        text = self._completion_text.decode(ids[:end])
        return text.rstrip(INCOMPLETE) if end is None else text


def load_policy(
    config: PolicyConfig,
    bf16: bool | Literal["auto"] = "auto",
    adapters: Path | None = None,
    checkpoint: Path | None = None,
) -> Policy:
    """Load a policy and place it on its device, ready to be trained and evaluated.

    Args:
        config: of the policy.
        bf16: as `trainer.bf16`.
        adapters: a checkpoint of LoRA adapters for `config.model`, to load in place of new ones.
        checkpoint: the one that training goes on from. The built-in policy is loaded from it, as its size is that of
            the release that began the training.

    Raises:
        UserError: there is no such model, it is not a causal language model that
            transformers knows, its weights are incomplete, the adapters do not fit it,
            or there is no such device.
    """
    disable_progress_bar()  # a bar a load and a checkpoint would drown a node's own output
    device = device_of(config.device)
    source = config.model
    if source == "builtin":
        began = checkpoint is not None and (checkpoint / "config.json").exists()
        source = str(checkpoint if began else BUILTIN)
    if config.model != "builtin":
        find_model(config.model)
    check_bits(config.dtype)
    is_folder = Path(source).is_dir()  # then nobody is asked for anything
    packed = config.dtype == "nf4"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=is_folder)
        architecture = _without_dropout(AutoConfig.from_pretrained(source, local_files_only=is_folder))
        model, loading = AutoModelForCausalLM.from_pretrained(
            source,
            config=architecture,
            dtype=_half_of(device) if packed else getattr(torch, config.dtype),
            **(_in_four_bits(device) if packed else {}),
            output_loading_info=True,
            local_files_only=is_folder,
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise UserError(_complaint(config.model, error)) from error
    if loading["missing_keys"]:
        some = ", ".join(sorted(loading["missing_keys"])[:3])
        raise UserError(
            f"policy.model {config.model!r} lacks weights ({some}): it is damaged or no causal language model"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of policy.model {config.model!r} has no end-of-text token: choose another model"
        )
    if config.prompt == "chat" and tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer of policy.model {config.model!r} has no chat template: set policy.prompt to 'plain'"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    name = f"{model.config.model_type}-{_short(model.num_parameters())}"
    eos = _end_tokens(tokenizer.eos_token_id, model.generation_config.eos_token_id)
    # Sampling is decided by the engine's configuration alone: `generate` fills every option that it
    # is not given from here, and published models set penalties and cut-offs.
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=list(eos), pad_token_id=tokenizer.pad_token_id
    )
    if adapters is not None:
        model = _with_saved_adapters(model, adapters)
    elif config.lora.r > 0:
        model = _with_adapters(model, config.lora)
    model = _as_packed(model) if packed else model.to(device)
    gains = gains_by_bf16(model) if bf16 == "auto" else bf16
    return Policy(model, tokenizer, name, eos, config.prompt, config.template, gains, source)


def _in_four_bits(device: str) -> dict[str, Any]:
    """Return what loads the matrices of a model's layers with 4 bits a weight, as QLoRA has it (arXiv 2305.14314)."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=_half_of(device),
    )
    place = torch.cuda.current_device() if device == "cuda" else device  # accelerate compares numbers of GPUs
    return {"quantization_config": quantization, "device_map": {"": place}}


def _half_of(device: str) -> torch.dtype:
    """Return the numbers of 16 bits that a device computes with beside weights of 4 bits."""
    return torch.float16 if device == "cuda" and not computes_in_bf16(device) else torch.bfloat16


def _as_packed(model: Any) -> Any:
    """Keep bitsandbytes from laying weights out anew, with rounded scales, when a CPU first generates with them."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def gains_by_bf16(model: Any) -> bool:
    """Tell whether products in bfloat16 save time: the model is large, and the machine has instructions for them.

    Weights that are bfloat16 themselves need no conversion.
    """
    return model.num_parameters() > LARGE and model.dtype == torch.float32 and computes_in_bf16(model.device.type)


def _tokens(tokenizer: Any, text: str, special: bool) -> list[int]:
    """Return what `tokenizer(text)` does, with the tokens that open and close a text where `special`.

    For a short text that call takes three times as long as the encoding. Settings of an earlier call are undone.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])  # too long is no event
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return list(backend.encode(text, add_special_tokens=special).ids)


def device_of(choice: str) -> str:
    """Return where a policy goes whose `policy.device` is `choice`; `UserError` where there is no such device."""
    available = torch.cuda.is_available()
    if choice == "cuda" and not available:
        raise UserError("policy.device is 'cuda' but torch sees no GPU: use 'auto' or 'cpu', or install a CUDA build")
    if choice == "mps" and not torch.backends.mps.is_available():
        raise UserError("policy.device is 'mps' but torch sees no Apple GPU: use 'auto' or 'cpu'")
    if choice == "auto":
        return "cuda" if available else "cpu"
    return choice


def _without_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    """Set every dropout to 0: TRL's own option reaches layers, not the probabilities that attention keeps itself.

    With it, the ratio of the first update would not be 1, nor a resumed run equal to an undisturbed one.
    """
    text = config.get_text_config()
    for key, value in text.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(text, key, 0.0)
    return config


def _complaint(model: str, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if Path(model).exists():
        return f"cannot load policy.model {model!r}: {reason}"
    return f"cannot load policy.model {model!r}: no such folder here, and not to be had from the model hub ({reason})"


def _short(count: int) -> str:
    for unit, size in (("b", 10**9), ("m", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def _end_tokens(first: int, declared: int | list[int] | None) -> tuple[int, ...]:
    others = [declared] if isinstance(declared, int) else (declared or [])
    return tuple(dict.fromkeys([first, *others]))


def _with_saved_adapters(model: PreTrainedModel, folder: Path) -> Any:
    import peft

    try:
        return peft.PeftModel.from_pretrained(model, str(folder))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"cannot load the adapters in {folder} ({reason}): they are damaged or of another model"
        ) from error


def _with_adapters(model: PreTrainedModel, lora: LoraConfig) -> Any:
    import peft

    targets = lora.target_modules or None
    adapters = peft.LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)  # every node begins with the same adapters, and so does a node that starts again
        try:
            return peft.get_peft_model(model, adapters)
        except ValueError as error:  # no such layers, or none that peft knows of the architecture
            raise UserError(f"policy.lora.target_modules={lora.target_modules!r}: {one_line(error)}") from error
