"""A swarm's tasks on this machine: described by the founder, built and checked by who joins."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from node.config import NodeConfig, TaskConfig, parse_config
from node.errors import UserError
from node.swarm import joining, revoking
from node.swarm.agreed_tasks import WordNeededError, adopt_tasks, check_rules, describe_tasks, words_needed
from node.swarm.founding import found
from node.swarm.inviting import make_invite, reach
from node.swarm.joining import join
from node.swarm.swarm_folder import load_grant, load_manifest, save_grant, save_manifest, save_revocations, split_of
from node.tasks import load_tasks, task_names
from node.tasks.builtin.families import FAMILIES
from node.tasks.questions import DEFAULT_SPLIT, Split
from protocol.credentials.grants import REFUSALS, make_pass
from protocol.credentials.invite import Invite
from protocol.credentials.manifest import JoinPolicy, ManifestTask, SwarmManifest, make_manifest
from protocol.credentials.records import Address, Endpoint, make_record
from protocol.credentials.revocations import make_revocations
from protocol.errors import JoinError
from protocol.identity import Identity
from protocol.joiner import FALSE_MANIFEST, FetchedManifest
from protocol.limits.networks import Scope
from protocol.refusals import CLOCK_BEHIND, GRAYLISTED
from protocol.storage import save_peers

FOUNDER = Identity(bytes(32))
DAY_MS = 24 * 3600 * 1000


def manifest(tasks: list[ManifestTask]) -> SwarmManifest:
    return make_manifest(FOUNDER, "s", 1, JoinPolicy.OPEN, tasks)


def sums(**changes: object) -> ManifestTask:
    (task,) = describe_tasks([TaskConfig(name="builtin/sums", options={"difficulty": 2})])
    return task._replace(**changes)


def riddles(path: Path, answer: str = "4") -> TaskConfig:
    return TaskConfig(name="dataset", weight=3.0, options={"path": written(path, "2 and 2?", answer)})


def written(path: Path, question: str, answer: str) -> str:
    path.write_text(json.dumps({"question": question, "answer": answer}) + "\n")
    return str(path)


def test_a_group_of_tasks_is_described_one_by_one() -> None:
    described = describe_tasks([TaskConfig(name="builtin", options={"difficulty": 3})])
    assert [task.name for task in described] == [f"builtin/{name}" for name in FAMILIES]
    assert {task.options for task in described} == {'{"difficulty":3}'}
    adopted = load_tasks(adopt_tasks(manifest(described), [TaskConfig(name="builtin")]))
    assert [task.key for task in adopted.tasks] == [(task.name, task.version, task.config) for task in described]


def test_a_joiner_keeps_its_weights_and_takes_the_swarms_options() -> None:
    own = [TaskConfig(name="builtin/sums", weight=5.0, options={"difficulty": 9})]
    (adopted,) = adopt_tasks(manifest([sums()]), own)
    assert adopted == TaskConfig(name="builtin/sums", weight=5.0, options={"difficulty": 2})


@pytest.mark.slow
def test_a_reasoning_gym_task_is_built_from_the_manifest() -> None:
    described = describe_tasks([TaskConfig(name="reasoning-gym/gcd", options={"max_numbers": 3})])
    (adopted,) = adopt_tasks(manifest(described), [])
    assert adopted.options == {"max_numbers": 3}


@pytest.mark.parametrize(
    ("task", "says"),
    [
        (sums(version=7), f"'builtin/sums' has version 7 in the swarm and {sums().version} here"),
        (
            sums(config="00ff"),
            rf"'builtin/sums' version {sums().version} has another configuration here \([0-9a-f]{{16}}\) .* \(00ff\)",
        ),
        (sums(options='{"difficulty":3}'), "another configuration"),
        (sums(options='{"speed":3}'), "'builtin/sums' has no option 'speed'"),
        (sums(options="[1]"), "options that cannot be read"),
        (sums(options="{" * 1000), "options that cannot be read"),
        (sums(name="riddles"), "unknown task 'riddles'"),
        (sums(name="reasoning-gym/none"), "no safe scorer"),
    ],
)
def test_a_task_that_is_another_here_is_named(task: ManifestTask, says: str) -> None:
    with pytest.raises(UserError, match=says):
        adopt_tasks(manifest([task]), [])


def test_a_file_of_questions_stays_at_home_and_must_be_the_same(tmp_path: Path) -> None:
    theirs, mine = riddles(tmp_path / "theirs.jsonl"), riddles(tmp_path / "mine.jsonl")
    described = describe_tasks([theirs])
    assert described[0].options == "{}"
    assert adopt_tasks(manifest(described), [mine]) == [mine]
    with pytest.raises(UserError, match="needs a file of yours"):
        adopt_tasks(manifest(described), [])
    with pytest.raises(UserError, match="another configuration"):
        adopt_tasks(manifest(described), [riddles(tmp_path / "other.jsonl", answer="5")])


def test_no_founder_chooses_a_file_on_another_machine(tmp_path: Path) -> None:
    theirs = riddles(tmp_path / "theirs.jsonl")
    (task,) = describe_tasks([theirs])
    swarm = manifest([task._replace(options=json.dumps(theirs.options))])
    with pytest.raises(UserError, match="needs a file of yours"):
        adopt_tasks(swarm, [])
    mine = riddles(tmp_path / "mine.jsonl")
    assert adopt_tasks(swarm, [mine]) == [mine]


def test_a_file_of_test_questions_stays_at_home_and_must_be_the_same(tmp_path: Path) -> None:
    theirs, mine = (
        TaskConfig(
            name="dataset",
            options={
                "path": riddles(tmp_path / f"{whose}.jsonl").options["path"],
                "test": written(tmp_path / f"{whose}-test.jsonl", "3 and 3?", "6"),
            },
        )
        for whose in ("theirs", "mine")
    )
    described = describe_tasks([theirs])
    assert described[0].options == "{}"
    assert adopt_tasks(manifest(described), [mine]) == [mine]
    without = riddles(tmp_path / "mine.jsonl")
    hostile = described[0]._replace(options=json.dumps({"test": theirs.options["test"]}))
    for task in (described[0], hostile):
        with pytest.raises(UserError, match="another configuration"):
            adopt_tasks(manifest([task]), [without])


def test_a_set_on_the_hub_needs_no_file_of_ours_and_takes_none_of_the_founders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [{"question": "2 and 2?", "answer": "4"}])
    (task,) = describe_tasks([TaskConfig(name="dataset", options={"hub": "some/riddles", "split": "train"})])
    named = {"hub": "some/riddles", "split": "train"}
    hostile = task._replace(options=json.dumps({**named, "path": "/etc/passwd", "test": "/etc/passwd"}))
    for own in ([], [TaskConfig(name="dataset", options={"hub": "another/set"})]):
        with pytest.raises(WordNeededError, match=r'with its founder.s options .*"hub": "some/riddles"'):
            adopt_tasks(manifest([hostile]), own)
    same = TaskConfig(name="dataset", weight=2.0, options=named)
    assert adopt_tasks(manifest([hostile]), [same]) == [same]
    other = TaskConfig(name="dataset", weight=2.0, options={"hub": "another/set"})
    assert adopt_tasks(manifest([hostile]), [other], ["dataset"]) == [same]
    mine = riddles(tmp_path / "mine.jsonl").model_copy(update={"name": "dataset"})
    assert adopt_tasks(manifest([hostile]), [mine]) == [mine], "the same rows in a file are as good"


SPELL = "reasoning-gym/spell_backward"


@pytest.mark.parametrize("options", [None, {}, {"data_file": "words.txt"}, {"max_word_len": 20}])
def test_a_founder_does_not_say_which_file_is_read(options: dict[str, Any] | None) -> None:
    task = ManifestTask(SPELL, 1, "ab", '{"data_file":"/etc/hosts","max_word_len":20}')
    own = [] if options is None else [TaskConfig(name=SPELL, options=options)]
    with pytest.raises(WordNeededError, match=f"join with --allow-task {SPELL}, or list"):
        adopt_tasks(manifest([task]), own)


@pytest.mark.slow  # each is tried in a process of its own
def test_a_joiner_that_lists_the_same_file_or_allows_the_task_takes_it(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("\n".join(f"secret{letter}" for letter in "abcdefghij"))
    named = {"data_file": str(tmp_path / "words.txt")}
    listed = TaskConfig(name=SPELL, options={**named, "min_word_len": 1, "max_word_len": 20})
    swarm = manifest(describe_tasks([listed]))
    for own in ([listed], [TaskConfig(name=SPELL, options=named)]):  # numbers are the founder's to choose
        assert adopt_tasks(swarm, own) == [listed]
    assert adopt_tasks(swarm, [], [SPELL]) == [listed]


def test_a_founder_does_not_say_which_of_our_columns_is_asked(tmp_path: Path) -> None:
    mine = riddles(tmp_path / "mine.jsonl")
    (task,) = describe_tasks([mine])
    columns = manifest([task._replace(options=json.dumps({"question": "answer"}))])
    with pytest.raises(WordNeededError, match='"question": "answer"'):
        adopt_tasks(columns, [mine])
    briefly = mine.model_copy(update={"options": {**mine.options, "system": "Be brief."}})
    (task,) = describe_tasks([briefly])
    (adopted,) = adopt_tasks(manifest([task]), [mine])  # an instruction is a founder's to choose
    assert adopted == briefly


@pytest.mark.parametrize("options", ['{"min_words":1000000000}', '{"min_words":1e999}', '{"min_words":[[[]]]}'])
def test_a_founders_number_that_would_take_all_memory_is_refused_before_anything_is_built(options: str) -> None:
    task = ManifestTask("reasoning-gym/word_sorting", 1, "ab", options)
    with pytest.raises(WordNeededError, match="min_words"):
        adopt_tasks(manifest([task]), [])


def install(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install a package with a task of this name; return a file that is there once the package's code has run."""
    ran = folder / "ran"
    (folder / "leaky_tasks.py").write_text(
        "from pathlib import Path\nfrom node.tasks import Item, TaskKey\n"
        f"class Leaky:\n key = TaskKey({name!r}, 1, 'ab')\n def make(self, seed): return Item(f'{{seed}}?', '1')\n"
        " def verify(self, item, text): return float(text == '1')\n"
        f"def make(options):\n with Path({str(ran)!r}).open('a') as file: file.write(f'{{options}}\\n')\n"
        " return Leaky()\n"
    )
    info = folder / "leaky-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: leaky\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[gossamer.tasks]\n{name} = leaky_tasks:make\n")
    monkeypatch.syspath_prepend(str(folder))
    return ran


@pytest.mark.parametrize("name", ["builtin/", "builtin/leaky", "reasoning-gym/", "reasoning-gym/leaky"])
def test_no_package_runs_under_a_name_of_our_own_kinds(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = install(name, tmp_path, monkeypatch)
    swarm = manifest([ManifestTask(name, 1, "ab", "{}")])
    for own, allowed in (([], ()), ([TaskConfig(name=name)], ()), ([], (name,))):
        with pytest.raises(UserError, match=f"unknown task '{name}'|no safe scorer"):
            adopt_tasks(swarm, own, allowed)
    assert not ran.exists() and name not in task_names()


def test_code_of_an_installed_package_runs_by_the_joiners_word_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = install("leaky", tmp_path, monkeypatch)
    options = {"path": "/etc/passwd", "rows": 3}
    swarm, plain = (
        manifest([ManifestTask("leaky", 1, "ab", json.dumps(one))]) for one in (options, {"rows": 3, "more": [1, 2]})
    )
    says = r"'leaky' runs code of the package leaky \(leaky_tasks:make\) with its founder's options .*\"/etc/passwd\""
    for own in ([], [TaskConfig(name="leaky")], [TaskConfig(name="leaky", options={"path": "/etc/hosts"})]):
        with pytest.raises(WordNeededError, match=says):
            adopt_tasks(swarm, own)
    with pytest.raises(WordNeededError):
        adopt_tasks(plain, [])
    assert not ran.exists() and "--allow-task leaky" in words_needed(plain)[0]
    listed = TaskConfig(name="leaky", options=options)
    assert adopt_tasks(swarm, [listed]) == [listed]
    assert adopt_tasks(plain, [TaskConfig(name="leaky")])[0].options == {"rows": 3, "more": [1, 2]}
    ran.unlink()
    with capture_logs() as said:
        assert adopt_tasks(swarm, [], ["leaky"]) == [listed]
    assert ran.exists() and [event["task"] for event in said if "by your word" in event["event"]] == ["leaky"]
    assert "/etc/passwd" in said[0]["what"]


def test_all_that_needs_a_joiners_word_is_said_in_one_line_and_is_what_a_founder_is_told(tmp_path: Path) -> None:
    hidden = '{"data_file":"/etc/\\u001b[2J\\u007f\\u202epasswd"}'
    tasks = [sums(), *describe_tasks([riddles(tmp_path / "mine.jsonl")])]
    tasks += [ManifestTask("reasoning-gym/spell_backward", 1, "ab", hidden)]
    with pytest.raises(WordNeededError) as error:
        adopt_tasks(manifest(tasks), [])
    file, gym = words_needed(manifest(tasks))
    assert str(error.value) == f"{file}; {gym}" and str(error.value).isprintable()
    assert "needs a file of yours" in file and "--allow-task reasoning-gym/spell_backward" in gym
    missing = manifest([ManifestTask("not-installed", 1, "ab", '{"path":"/etc/passwd"}')])
    for allowed in ([], ["not-installed"]):
        with pytest.raises(UserError, match="unknown task 'not-installed'"):
            adopt_tasks(missing, [], allowed)
    with pytest.raises(UserError, match=r"swarm 's' has no task 'spell': it has builtin/sums, dataset, reasoning-gym"):
        adopt_tasks(manifest(tasks), [], ["spell"])
    assert words_needed(manifest([sums()])) == []


def test_a_task_that_the_swarm_does_not_have_is_refused() -> None:
    tasks = load_tasks([TaskConfig(name="builtin/sums"), TaskConfig(name="builtin/logic")])
    swarm = manifest(describe_tasks([TaskConfig(name="builtin/sums")]))
    check_rules(swarm, load_tasks([TaskConfig(name="builtin/sums")]), 128)
    with pytest.raises(UserError, match=r"'builtin/logic'.* is none of swarm 's'"):
        check_rules(swarm, tasks, 8)


def test_larger_groups_than_the_swarm_allows_are_refused() -> None:
    swarm = manifest(describe_tasks([TaskConfig(name="builtin/sums")]))
    with pytest.raises(UserError, match="set it to at most 128"):
        check_rules(swarm, load_tasks([TaskConfig(name="builtin/sums")]), 129)


def test_what_a_folder_keeps(tmp_path: Path) -> None:
    assert load_manifest(tmp_path) is None
    assert load_grant(tmp_path) == b""
    save_manifest(tmp_path, manifest([sums()]))
    save_grant(tmp_path, b"grant")
    save_grant(tmp_path, b"")
    assert load_manifest(tmp_path) == manifest([sums()])
    assert load_grant(tmp_path) == b"grant"


@pytest.mark.parametrize("damage", [b"", b"x", bytes(100), bytes(1 << 20)])
def test_a_damaged_manifest_is_one_clear_line(damage: bytes, tmp_path: Path) -> None:
    (tmp_path / "manifest.bin").write_bytes(damage)
    with pytest.raises(
        UserError, match=r"manifest\.bin is damaged .*: copy it from another node of the swarm, or delete"
    ):
        load_manifest(tmp_path)


def test_an_invite_names_peers_in_the_order_of_the_nodes_links_and_one_of_each_network(tmp_path: Path) -> None:
    """A record says itself how long it holds, up to a week: whoever says so would be in every invite."""
    manifest = make_manifest(FOUNDER, "club", 1, JoinPolicy.OPEN, [ManifestTask("t", 1, "ab", "{}")])
    save_manifest(tmp_path, manifest)
    now_ms = int(time.time() * 1000)
    hosts = [
        ["192.168.0.7", "93.184.216.34"],
        ["93.184.216.35"],
        ["10.0.0.1"],
        ["10.0.0.2"],
        *([f"198.41.{network}.4"] for network in range(20)),
    ]
    keys = [Identity(bytes([number]) * 32) for number in range(1, len(hosts) + 1)]
    lives = [DAY_MS] * 4 + [7 * DAY_MS - 60_000] * 20
    records = [
        make_record(key, manifest.swarm, tuple(Endpoint(host, 4001) for host in some), 1, "", now_ms + life)
        for key, some, life in zip(keys, hosts, lives, strict=True)
    ]
    save_peers(tmp_path / "peers.json", [record.encoded for record in records])
    seeds = make_invite(tmp_path, [Address(Endpoint("203.0.113.1", 4001), FOUNDER.curve_key)]).seeds
    assert [seed.endpoint.host for seed in seeds] == ["203.0.113.1", "93.184.216.34", "10.0.0.1", "10.0.0.2"]
    save_revocations(tmp_path, make_revocations(FOUNDER, manifest, [keys[0].node_id, keys[2].node_id], 1).encoded)
    seeds = make_invite(tmp_path, [Address(Endpoint("203.0.113.1", 4001), FOUNDER.curve_key)]).seeds
    assert [seed.endpoint.host for seed in seeds] == ["203.0.113.1", "93.184.216.35", "10.0.0.2", "198.41.0.4"]


def test_an_invite_names_what_its_node_is_to_advertise_before_the_node_first_starts(tmp_path: Path) -> None:
    config = parse_config({"network": {"advertise": ["tcp://relay:4001"]}})
    found(config, tmp_path / "club", "club", JoinPolicy.OPEN, [])
    key = Identity.load(tmp_path / "club" / "identity.key").curve_key
    assert make_invite(tmp_path / "club", []).seeds == (Address(Endpoint("relay", 4001), key),)
    (tmp_path / "club" / "address").write_text(f"tcp://192.0.2.7:4001?key={key.hex()}\n")
    assert [seed.endpoint.host for seed in make_invite(tmp_path / "club", []).seeds] == ["192.0.2.7"]
    own = [Address(Endpoint(host, 4001), key) for host in ("198.41.0.4", "192.168.0.7")]
    assert make_invite(tmp_path / "club", [], own=own).seeds == tuple(own)  # what it says while it runs
    assert reach(make_invite(tmp_path / "club", [], own=own)) is Scope.PUBLIC
    assert reach(make_invite(tmp_path / "club", [], own=own[1:])) is Scope.PRIVATE


def test_which_questions_are_kept_apart_is_the_founders_to_say_and_every_nodes_to_find(tmp_path: Path) -> None:
    split = Split(0.25, 2**32 - 1)
    made = found(NodeConfig(), tmp_path / "a", "club", JoinPolicy.OPEN, [], split)
    assert split_of(made) == split_of(load_manifest(tmp_path / "a")) == split
    questions = [f"{number}+1=" for number in range(400)]
    held = {question for question in questions if split_of(made).holds_out("builtin/sums", question)}
    assert (
        held == {question for question in questions if split.holds_out("builtin/sums", question)}
        and 60 < len(held) < 140
    )
    assert held != {question for question in questions if DEFAULT_SPLIT.holds_out("builtin/sums", question)}
    assert split_of(None) == split_of(manifest([sums()])) == DEFAULT_SPLIT


@pytest.mark.parametrize("verb", ["found", "join"])
def test_a_node_that_has_trained_under_one_split_is_in_no_swarm_with_another(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def enter(folder: Path, split: Split) -> None:
        if verb == "found":
            found(NodeConfig(), folder, "club", JoinPolicy.OPEN, [], split)
            return
        swarm = found(NodeConfig(), tmp_path / f"founder {split.salt}", "club", JoinPolicy.OPEN, [], split)
        monkeypatch.setattr(joining, "fetch_manifest", lambda *_: FetchedManifest(swarm, b""))
        address = Address(Endpoint("203.0.113.1", 4001), FOUNDER.curve_key)
        with capture_logs():
            join(Invite("club", swarm.hash, (address,)), NodeConfig(), folder)

    for folder in ("same", "other"):
        (tmp_path / folder / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(
        UserError, match=r"has trained on questions that swarm 'club' holds out .*: choose a new folder"
    ):
        enter(tmp_path / "other", Split(salt=7))
    assert load_manifest(tmp_path / "other") is None and not (tmp_path / "other" / "config.json").exists()
    enter(tmp_path / "new", Split(salt=8))
    enter(tmp_path / "same", DEFAULT_SPLIT)


def as_invited(swarm: SwarmManifest) -> Invite:
    """Return an invite with a pass of the swarm's founder."""
    expiry_ms = int(time.time() * 1000) + DAY_MS
    address = Address(Endpoint("203.0.113.1", 4001), FOUNDER.curve_key)
    return Invite(swarm.name, swarm.hash, (address,), make_pass(FOUNDER, swarm.swarm, FOUNDER.node_id, expiry_ms))


@pytest.mark.parametrize(
    ("task", "allowed", "says"),
    [
        (sums(), ["builtin/sum"], "has no task 'builtin/sum'"),
        (sums(version=99), [], "has version 99 in the swarm"),
        (sums(options='{"name":"x"}'), [], "--allow-task builtin/sums"),
        (sums(name="riddles"), [], "unknown task 'riddles'"),
    ],
    ids=["typing error", "another version", "a word needed", "missing"],
)
def test_a_join_that_fails_once_it_has_a_grant_goes_on_with_it_when_it_is_run_again(
    task: ManifestTask, allowed: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The swarm has counted a use of the invite for this key: another key would find it used up."""
    swarm = make_manifest(FOUNDER, "club", 1, JoinPolicy.ALLOWLIST, [task])
    invite, folder, shown = as_invited(swarm), tmp_path / "new", []

    def fetch(identity: Identity, _: Invite, grant: bytes, __: float) -> FetchedManifest:
        shown.append((identity.node_id, grant))
        return FetchedManifest(swarm, b"")

    monkeypatch.setattr(joining, "fetch_manifest", fetch)
    with capture_logs():
        with pytest.raises(UserError, match=says):
            join(invite, NodeConfig(), folder, allowed)
        assert sorted(file.name for file in folder.iterdir()) == ["grant.bin", "identity.key", "lock"]
        join(invite, NodeConfig(role="relay"), folder)  # which needs no task
    assert shown[0] == shown[1] == (Identity.load(folder / "identity.key").node_id, load_grant(folder))


def test_an_invite_that_names_another_swarm_than_it_is_for_joins_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm = manifest([sums()])
    monkeypatch.setattr(joining, "fetch_manifest", lambda *_: FetchedManifest(swarm, b""))
    other = replace(as_invited(swarm), name="freinds", grant=None)
    with capture_logs():
        with pytest.raises(UserError, match=rf"^the invite is to swarm {swarm.name!r}, and not to 'freinds'"):
            join(other, NodeConfig(), tmp_path / "new")
        assert not (tmp_path / "new").exists()
        join(replace(other, name=swarm.name), NodeConfig(), tmp_path / "new")


def test_a_join_that_fails_leaves_no_folder_where_it_was_granted_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm = manifest([sums(options='{"name":"x"}')])
    monkeypatch.setattr(joining, "fetch_manifest", lambda *_: FetchedManifest(swarm, b""))
    with capture_logs(), pytest.raises(WordNeededError):
        join(replace(as_invited(swarm), grant=None), NodeConfig(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("reason", [*sorted(REFUSALS), CLOCK_BEHIND, GRAYLISTED, FALSE_MANIFEST, "speaks 2, not 3", ""])
def test_a_members_join_fails_by_a_refusal_of_the_swarm_and_goes_on_after_any_other_answer(
    reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm = manifest([sums()])
    save_manifest(tmp_path, swarm)
    save_grant(tmp_path, b"held")

    def fetch(*_: object) -> FetchedManifest:
        raise JoinError("what it says", reason, {"203.0.113.1:4001": reason} if reason else {})

    monkeypatch.setattr(joining, "fetch_manifest", fetch)
    with capture_logs() as said:
        if reason in REFUSALS:
            with pytest.raises(JoinError) as caught:
                join(as_invited(swarm), NodeConfig(), tmp_path)
            assert caught.value.reason == reason and not (tmp_path / "settings.json").exists()
        else:
            assert join(as_invited(swarm), NodeConfig(), tmp_path).tasks[0].options == {"difficulty": 2}
            (warned,) = [line for line in said if "going on without what the invite grants" in line["event"]]
            assert reason in warned["why"]
    assert load_grant(tmp_path) == b"held"


def test_a_node_of_a_swarm_of_an_earlier_release_is_told_that_it_is_alone_and_one_of_another_task_is_refused() -> None:
    tasks = load_tasks([TaskConfig(name="builtin/sums", options={"difficulty": 2})])
    version = tasks.tasks[0].key.version
    with capture_logs() as said:
        check_rules(manifest([sums()]), tasks, 8)
        assert said == []
        check_rules(manifest([sums(version=version - 1)]), tasks, 8)
    ((task, was, here),) = [(row["task"], row["version"], row["here"]) for row in said]
    assert (task, was, here) == ("builtin/sums", version - 1, version)
    for other in (sums(version=version + 1), sums(version=version - 1, config="00ff")):
        with pytest.raises(UserError, match="is none of swarm"):
            check_rules(manifest([other]), tasks, 8)


def test_a_founder_from_an_older_copy_goes_on_from_the_revocation_list_of_a_member(tmp_path: Path) -> None:
    founder, again = tmp_path / "founder", tmp_path / "again"
    found(parse_config({"tasks": [{"name": "builtin/sums"}]}), founder, "club", JoinPolicy.OPEN, [], DEFAULT_SPLIT)
    shutil.copytree(founder, again)
    first, second = (Identity.generate().node_id for _ in range(2))
    assert revoking.revoke(founder, [first]).sequence == 1
    shutil.copy(founder / "revocations.bin", again)  # as a relay has it
    made = revoking.revoke(again, [second])
    assert (made.sequence, made.revoked) == (2, {first, second})
