"""Policies: text to tokens and back, end-of-text, hostile text, and clear errors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from node.config import LoraConfig, PolicyConfig
from node.errors import UserError
from node.policy.load import Policy, load_policy
from node.policy.prompt import plain_text
from node.tasks import Item
from tests.policies import CHARACTERS, CHAT_MODELS, tiny_policy, write_chat_policy, write_tiny_policy

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"


@pytest.fixture
def policy(tmp_path) -> Policy:
    return tiny_policy(tmp_path)


def test_text_survives_encoding_and_decoding(policy):
    ids = policy.encode_completion(CHARACTERS, finished=True)
    assert ids[-1] == policy.eos_token_ids[0]
    assert policy.decode(ids) == CHARACTERS
    assert policy.encode_completion(CHARACTERS, finished=False) == ids[:-1]
    assert policy.encode_completion("", finished=False) == []
    assert policy.encode_completion("", finished=True) == ids[-1:]


def test_decoding_stops_at_the_first_end_of_text_and_shows_no_special_tokens(policy):
    one, two = policy.encode_completion("12", finished=False)
    assert policy.decode([one, policy.pad_token_id, two, policy.eos_token_ids[0], one]) == "12"


def test_special_tokens_spelt_out_in_a_peers_text_are_only_letters(policy):
    ids = policy.encode_completion("1<eos>2<bos><pad>", finished=False)
    assert not {*ids} & {*policy.tokenizer.all_special_ids}
    assert policy.decode(ids) == "1<eos>2<bos><pad>"


EXAMPLES = (("2+3=", "5"), ("4-1=", "3"))


def test_a_plain_tokenizer_is_asked_the_bare_question(policy):
    ids = policy.encode_prompt(Item("1+1=", ""))
    assert ids == policy.tokenizer("1+1=")["input_ids"]
    assert ids[0] == policy.tokenizer.bos_token_id


def test_what_others_asked_of_the_tokenizer_is_not_done_to_a_prompt(policy):
    ids = policy.encode_prompt(Item("1+1=", ""))
    policy.tokenizer(["1+1=", "1<eos>"], padding="max_length", truncation=True, max_length=3, split_special_tokens=True)
    assert policy.encode_prompt(Item("1+1=", "")) == ids
    assert policy.eos_token_ids[0] in policy.encode_prompt(Item("1<eos>", ""))


def test_plain_text_shows_the_instruction_and_the_examples_before_the_question(policy):
    def asked(*args, **kwargs) -> str:
        return policy.tokenizer.decode(policy.encode_prompt(Item(*args, **kwargs)), skip_special_tokens=True)

    assert asked("1+1=", "", system="Be brief.") == "Be brief.\n\n1+1=".replace("\n", "")  # it knows no line breaks
    assert plain_text(Item("1+1=", "", system="Be brief.")) == "Be brief.\n\n1+1="
    assert plain_text(Item("1+1=", "", examples=EXAMPLES)) == "2+3=5\n4-1=3\n1+1="
    assert plain_text(Item("1 + 1 =", "", examples=(("2 + 3 =", "5"),))) == "2 + 3 = 5\n1 + 1 ="
    assert (
        plain_text(Item("Who?", "", "Hm.", EXAMPLES[:1]))
        == "Hm.\n\nQuestion: 2+3=\nAnswer: 5\n\nQuestion: Who?\nAnswer:"
    )
    assert plain_text(Item("Flip", "", examples=(("Grid", "0 1\n1 0"),))) == (
        "Question: Grid\nAnswer:\n0 1\n1 0\n\nQuestion: Flip\nAnswer:"
    )


def test_a_chat_tokenizer_is_asked_in_its_template(policy):
    policy.tokenizer.chat_template = TEMPLATE
    decode = policy.tokenizer.decode
    assert decode(policy.encode_prompt(Item("1+1=", "", system="Brief."))) == "<system>Brief.<user>1+1=>"
    assert decode(policy.encode_prompt(Item("1+1=", ""))) == "<user>1+1=>"
    assert decode(policy.encode_prompt(Item("1+1=", "", "Brief.", EXAMPLES[:1]))) == (
        "<system>Brief.<user>2+3=<assistant>5<user>1+1=>"
    )


@pytest.mark.parametrize(
    "template",
    [
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TEMPLATE,
        TEMPLATE.replace("<{{ m.role }}>", "{% if m.role == 'system' %}{% continue %}{% endif %}<{{ m.role }}>"),
    ],
    ids=["refuses", "drops"],
)
def test_without_a_system_role_the_instruction_opens_the_first_user_turn(policy, template):
    policy.tokenizer.chat_template = template
    text = policy._chat(Item("1+1=", "", "Brief.", EXAMPLES[:1]))
    assert text == "<user>Brief.\n\n2+3=<assistant>5<user>1+1=>"
    assert policy._chat(Item("1+1=", "", "Brief.")) == "<user>Brief.\n\n1+1=>"
    assert policy._chat(Item("1+1=", "")) == "<user>1+1=>"


def test_the_variables_of_the_configuration_reach_the_template(tmp_path):
    write_tiny_policy(tmp_path)
    switch = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{{ mood }}"
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE + switch)

    def asked(**variables: object) -> str:
        config = PolicyConfig(model=str(tmp_path), device="cpu", template=variables)
        policy = load_policy(config)
        return policy.tokenizer.decode(policy.encode_prompt(Item("1+1=", "")))

    assert asked() == asked(enable_thinking=True) == "<user>1+1=>"
    assert asked(enable_thinking=False) == "<user>1+1=><think></think>"
    assert asked(mood="!") == "<user>1+1=>!"
    assert asked(add_generation_prompt=False, tokenize=True) == "<user>1+1=>", "a question is asked all the same"


def test_a_template_that_refuses_every_turn_is_one_clear_line(policy):
    policy.tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(UserError, match=r"policy\.prompt to 'plain'"):
        policy.encode_prompt(Item("1+1=", ""))


@pytest.mark.parametrize("end", ["", "<eos>"])
def test_what_an_environment_says_stands_in_a_chat_as_a_users_turn(policy, end):
    policy.tokenizer.chat_template = TEMPLATE.replace("{{ m.content }}", "{{ m.content }}" + end)
    turns = [*policy.encode_completion("7", finished=True), *policy.observations()("more?")]
    assert policy.tokenizer.decode(turns) == f"7<eos><user>more?{end}>"


def load(folder, prompt: str = "auto") -> Policy:
    return load_policy(PolicyConfig(model=str(folder), device="cpu", prompt=prompt))


@pytest.mark.parametrize("family", CHAT_MODELS)
def test_an_answer_ends_in_what_the_template_writes_behind_one(tmp_path, family):
    """A tokenizer's end-of-text may end no turn, as with Gemma and Phi: their models hardly ever say it."""
    end = write_chat_policy(tmp_path, *CHAT_MODELS[family])
    policy = load(tmp_path)
    assert policy.eos_token_ids == (2, end)
    assert policy.encode_completion("7", finished=True) == [*policy.encode_completion("7", finished=False), end]
    assert policy.turn_end([2, 2, 2]) == end, "what the template says goes before what was sampled"


@pytest.mark.parametrize("family", CHAT_MODELS)
def test_a_second_turn_follows_an_answer_as_the_template_has_it(tmp_path, family):
    end, template = CHAT_MODELS[family]
    write_chat_policy(tmp_path, end, template)
    policy = load(tmp_path)
    turns = [*policy.encode_prompt(Item("1+1=", "")), *policy.encode_completion("7", finished=True)]
    turns += policy.observations()("more?")
    told = [("user", "1+1="), ("assistant", "7"), ("user", "more?")]
    chat = [{"role": role, "content": content} for role, content in told]
    whole = policy.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert policy.tokenizer.decode(turns) == whole
    assert turns == policy.tokenizer(whole, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("gap", ["", " "])
@pytest.mark.parametrize("end", ["<eos>", "<|end|>"])
def test_what_a_template_writes_before_the_end_of_a_turn_is_no_part_of_the_next(tmp_path, end, gap):
    """Llama 2 has a space there."""
    other = write_chat_policy(tmp_path, "<|end|>", TEMPLATE.replace("{{ m.content }}", "{{ m.content }}" + gap + end))
    policy = load(tmp_path)
    assert policy.turn_end() == (2 if end == "<eos>" else other)
    turns = [*policy.encode_completion("7", finished=True), *policy.observations()("more?")]
    assert policy.tokenizer.decode(turns) == f"7{end}<user>more?{gap}{end}>"


def test_a_turn_may_end_in_what_opens_the_users(tmp_path):
    """As with GLM-4, whose model says `<|user|>` once it is through."""
    marked = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
    end = write_chat_policy(tmp_path, "<|user|>", marked)
    policy = load(tmp_path)
    assert policy.turn_end() == end
    turns = [*policy.encode_completion("7", finished=True), *policy.observations()("more?")]
    assert policy.tokenizer.decode(turns) == "7<|user|>more?<|assistant|>"


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        (None, "auto"),
        (CHAT_MODELS["Phi"][1], "plain"),
        (TEMPLATE, "chat"),
        (TEMPLATE.replace("{{ m.content }}", "{{ m.content }}<|no-end|>"), "chat"),
        ("{{ messages[0].content }}", "chat"),
        ("{% if messages | length > 1 %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}", "chat"),
        ("{{ messages[0].content }}{{ messages[1].content + 1 }}", "chat"),
    ],
    ids=["no-template", "plain", "no-end", "another-end", "no-second-turn", "refuses", "fails"],
)
def test_where_no_template_tells_an_answer_ends_in_what_most_own_answers_end_in(tmp_path, template, prompt):
    other = write_chat_policy(tmp_path, "<|end|>", template)
    policy = load(tmp_path, prompt)
    assert [policy.turn_end(sampled) for sampled in ([], [other, 2, other], [2, other, 2])] == [2, other, 2]
    assert policy.encode_completion("7", True)[-1] == 2
    assert policy.encode_completion("7", True, other)[-1] == other
    assert policy.encode_completion("7", False, other) == policy.encode_completion("7", True)[:-1]


TOOLS = TEMPLATE.replace("<{{ m.role }}>", "{% if m.role == 'tool' %}[result]{% else %}<{{ m.role }}>{% endif %}")


def test_what_tools_return_stands_in_turns_of_their_role_if_the_template_knows_it(policy):
    one, two = (f"<tool_response>\n{text}\n</tool_response>" for text in ("7", "<eos>"))
    shown = {
        (TOOLS, f"{one}\n{two}"): "[result]7[result]<eos>>",
        (TOOLS, one): "[result]7>",
        (TOOLS, "7"): "<user>7>",
        (TOOLS, f"{one}, and more"): f"<user>{one}, and more>",
        (TEMPLATE, one): f"<user>{one}>",
        (TOOLS.replace("[result]", "{{ raise_exception('no') }}"), one): f"<user>{one}>",
    }
    for (template, said), text in shown.items():
        policy.tokenizer.chat_template = template
        ids = policy.observations()(said)
        assert policy.tokenizer.decode(ids).replace("<unk>", "\n") == text, "whose tokenizer has no line breaks"
        assert not {*ids} & {*policy.eos_token_ids, policy.pad_token_id}


def test_an_environment_cannot_end_or_begin_a_turn_by_what_it_says(policy):
    for template in (TEMPLATE, None):
        policy.tokenizer.chat_template = template
        ids = policy.observations()("1<eos>2<bos><pad>")
        assert not {*ids} & {*policy.tokenizer.all_special_ids}
    assert ids == policy.encode_completion("1<eos>2<bos><pad>", finished=False), "plain text has it as it is"


def test_a_template_that_shows_no_second_turn_is_one_clear_line_where_a_task_has_several(policy):
    for template in (
        "{{ messages[0].content }}",
        "{% if messages | length > 1 %}{{ raise_exception('no') }}{% endif %}",
    ):
        policy.tokenizer.chat_template = template
        with pytest.raises(UserError, match=r"shows no second turn.*policy\.prompt"):
            policy.observations()
        assert policy.observations(chats=False)("ab") == policy.encode_completion("ab", finished=False)


def test_the_prompt_style_can_be_chosen(tmp_path):
    write_tiny_policy(tmp_path)
    with pytest.raises(UserError, match="no chat template"):
        load_policy(PolicyConfig(model=str(tmp_path), device="cpu", prompt="chat"))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    item = Item("1+1=", "")
    asked = {
        style: load_policy(PolicyConfig(model=str(tmp_path), device="cpu", prompt=style)).encode_prompt(item)
        for style in ("auto", "chat", "plain")
    }
    assert asked["auto"] == asked["chat"] != asked["plain"] == tiny_policy(tmp_path / "plain").encode_prompt(item)


def test_the_name_tells_the_kind_of_model_and_no_folder(policy):
    assert policy.name == "llama-6.78k"


def test_the_configured_type_is_used_and_no_dropout(tmp_path):
    policy = tiny_policy(tmp_path, dtype="bfloat16")
    assert policy.model.dtype == torch.bfloat16
    assert policy.model.config.attention_dropout == 0


@pytest.mark.parametrize(
    ("targets", "adapted"),
    [([], {"q_proj", "v_proj"}), (["q_proj", "k_proj"], {"q_proj", "k_proj"}), (".*mlp.up_proj", {"up_proj"})],
)
def test_adapters_are_on_the_layers_that_are_named_or_on_pefts_choice(
    tmp_path: Path, targets: str | list[str], adapted: set[str]
) -> None:
    tiny_policy(tmp_path)
    lora = LoraConfig(r=2, target_modules=targets)
    model = load_policy(PolicyConfig(model=str(tmp_path), device="cpu", lora=lora)).model
    names = [name.split(".lora_")[0] for name, _ in model.named_parameters() if "lora" in name]
    assert {name.rpartition(".")[2] for name in names} == adapted
    for absent in "no_such_layer", ["no_such_layer"]:
        lora = LoraConfig(r=2, target_modules=absent)
        with pytest.raises(UserError, match=r"policy.lora.target_modules=.*no_such_layer"):
            load_policy(PolicyConfig(model=str(tmp_path), device="cpu", lora=lora))


def test_adapters_start_as_the_model_itself_and_the_same_everywhere(tmp_path):
    plain = tiny_policy(tmp_path)
    config = PolicyConfig(model=str(tmp_path), device="cpu", lora=LoraConfig(r=2))
    torch.manual_seed(1)
    one = load_policy(config)
    state = torch.random.get_rng_state()
    other = load_policy(config)
    assert torch.equal(torch.random.get_rng_state(), state)
    ids = torch.tensor([plain.encode_prompt(Item("1+1=", ""))])
    with torch.no_grad():
        assert torch.equal(plain.model(input_ids=ids).logits, one.model(input_ids=ids).logits)
    for (name, weight), again in zip(one.model.named_parameters(), other.model.parameters(), strict=True):
        assert torch.equal(weight, again)
        assert weight.requires_grad == ("lora" in name)
    assert one.name == plain.name


def refused(path, match: str) -> None:
    with pytest.raises(UserError, match=match) as raised:
        load_policy(PolicyConfig(model=str(path), device="cpu"))
    assert "\n" not in str(raised.value)
    assert "policy.model" in str(raised.value)


def test_what_is_no_model_is_one_clear_line(tmp_path):
    refused("no/such/model", "no such folder here: check the path")
    refused("no-such/model", "no such folder here, and not to be had")
    refused(tmp_path, "cannot load")
    refused("../up", "no such folder")


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_damaged_weights_are_one_clear_line(tmp_path, content):
    write_tiny_policy(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    refused(tmp_path, "cannot load|lacks weights")


def test_missing_weights_are_not_made_up(tmp_path):
    write_tiny_policy(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refused(tmp_path, r"lacks weights \(model.layers.1.mlp.up_proj.weight\)")


def test_weights_of_another_shape_are_one_clear_line(tmp_path):
    write_tiny_policy(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 64}))
    refused(tmp_path, "cannot load|lacks weights")


@pytest.mark.parametrize(
    "text", ["{", '{"model_type": "no-such"}', "{}", '{"model_type": "clip"}', '{"model_type": 3}']
)
def test_a_config_that_is_no_language_model_is_one_clear_line(tmp_path, text):
    write_tiny_policy(tmp_path)
    (tmp_path / "config.json").write_text(text)
    refused(tmp_path, "cannot load")


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path):
    write_tiny_policy(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "eos_token"}))
    refused(tmp_path, "no end-of-text token")


def test_a_gpu_that_is_not_there_is_one_clear_line(tmp_path, monkeypatch):
    write_tiny_policy(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="no GPU"):
        load_policy(PolicyConfig(model=str(tmp_path), device="cuda"))
