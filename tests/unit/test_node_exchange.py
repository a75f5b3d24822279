"""`from gossamer import Exchange`: members without a model, over sockets of this machine."""

import asyncio
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from gossamer import Exchange, UserError

from node.config import parse_config
from node.exchange.member import GRACE_S, AskedQuestion, DrawnGroup, Messages
from node.rollouts.group import Group, one_turn
from node.state_folder import is_held
from node.swarm.founding import found
from node.swarm.inviting import make_invite
from node.swarm.peering import open_network
from node.swarm.sharing import NetworkExchange
from node.tasks import load_tasks
from node.tasks.questions import DEFAULT_SPLIT
from node.telemetry.logs import log_by_logging
from protocol.credentials.manifest import JoinPolicy
from protocol.credentials.records import Address
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("own_log_setup")
ROOT = Path(__file__).parents[2]
SUMS = {"tasks": ["builtin/sums"], "sampling": {"max_length_ratio": 0.0}}


@pytest.fixture
def teacher(tmp_path: Path) -> Iterator[Exchange]:
    with Exchange(tmp_path / "teacher", policy="teacher", **SUMS) as member:
        yield member


@pytest.fixture
def pupil(teacher: Exchange, tmp_path: Path) -> Iterator[Exchange]:
    with Exchange(tmp_path / "pupil", network={"seeds": [teacher.address]}, **SUMS) as member:
        yield member


def teach(member: Exchange, count: int) -> list[AskedQuestion]:
    """Publish a right and a wrong answer to each of so many questions, no two of the same words."""
    asked: dict[str, AskedQuestion] = {}
    while len(asked) < count:  # two seeds may make the same sum, whose answers are drawn once
        asked |= {question.text: question for question in member.ask(count - len(asked))}
    questions = list(asked.values())
    for one in questions:
        assert member.publish(one, [one.item.answer, "no"], [True, False])
    return questions


def group_of(question: AskedQuestion, rewards: tuple[float, float]) -> Group:
    """Return a right and a wrong answer to a question, with these rewards as a peer may claim them."""
    made = [one_turn(text, True, reward) for text, reward in zip((question.item.answer, "no"), rewards, strict=True)]
    return Group(question.task, question.seed, question.text, tuple(made), "peer", 0)


def texts(groups: list[DrawnGroup]) -> list[str]:
    return sorted(group.question.text for group in groups)


@pytest.mark.real
def test_a_member_joins_by_an_invite_and_draws_what_another_published_as_it_is_scored_here(tmp_path: Path) -> None:
    config = parse_config({"tasks": [{"name": "builtin/sums"}, {"name": "builtin/weekdays"}]})
    found(config, tmp_path / "first", "club", JoinPolicy.OPEN, [])
    with Exchange(tmp_path / "first", policy="a model") as first:
        invite = str(make_invite(tmp_path / "first", [], own=[Address.parse(first.address or "")]))
        with Exchange.join(invite, state=tmp_path / "second") as second:
            questions = teach(first, 2)
            groups = second.draw(4, least=2)
            assert {group.question.task.name for group in groups} == {"builtin/sums", "builtin/weekdays"}
            assert {group.question for group in groups} == set(questions)
            for group in groups:
                assert group.texts == (group.question.item.answer, "no") and group.finished == (True, False)
                assert list(group.rewards) == second.score(group.question, group.texts) == [1.0, 0.0]
                assert group.advantages == (0.5, -0.5)
                assert (group.signer, group.policy) == (first.node, "a model") != (second.node, "")
        with Exchange(tmp_path / "second") as second:  # without the invite: the folder remembers
            more = teach(first, 1)
            assert texts(second.draw(4, least=1)) == [more[0].text]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lives", "size", "line"), [(6, 0, 0), (1, 120_000, 60_000)]
)  # the last on a slow line, bytes/s
def test_a_member_that_lives_for_one_question_leaves_its_answers_with_others(
    teacher: Exchange, tmp_path: Path, lives: int, size: int, line: int
) -> None:
    network, asked = {"seeds": [teacher.address], "upload_limit": line}, []
    for life in range(lives):
        with Exchange(tmp_path / f"{life}", network=network, **SUMS) as member:
            (question,) = member.ask(1)
            wrong = [f"no {os.urandom(size // 2).hex()}" for _ in range(2)]
            member.publish(question, [question.item.answer, *wrong], [True, False, False])
            asked.append(question)
    assert texts(teacher.draw(2 * lives, least=lives)) == sorted(question.text for question in asked)


@pytest.mark.slow
def test_a_member_whose_groups_nobody_takes_leaves_in_time_and_says_so(tmp_path: Path) -> None:
    with structlog.testing.capture_logs() as logs, Exchange(tmp_path / "m", **SUMS) as member:
        structlog.get_logger()
        teach(member, 2)
    assert [line["groups"] for line in logs if line["event"] == "nobody took the last groups"] == [2]


@pytest.mark.slow
def test_no_question_is_held_out_or_asked_again_after_another_start(tmp_path: Path) -> None:
    with Exchange(tmp_path / "m", **SUMS) as member:
        first = member.ask(40)
        node = member.node
    with Exchange(tmp_path / "m") as member:
        second = member.ask(40)
        assert member.node == node
    assert {question.seed for question in first}.isdisjoint(question.seed for question in second)
    assert not any(DEFAULT_SPLIT.holds_out("builtin/sums", question.text) for question in first + second)
    assert first[0].messages == [{"role": "user", "content": first[0].text}] and first[0].prompt == first[0].text


@pytest.mark.slow
def test_only_what_may_teach_is_sent(teacher: Exchange, pupil: Exchange) -> None:
    all_wrong, all_right, mixed = teacher.ask(3)
    right = mixed.item.answer
    assert not teacher.publish(all_wrong, ["no", "nor this"], [True, True])
    assert teacher.publish(all_right, [all_right.item.answer] * 2, [True, True])  # to those who ask for such
    assert teacher.publish(mixed, [right, "no", "no"], [True, True, False])
    (group,) = pupil.draw(4, least=1)
    assert (group.question, group.texts, group.finished) == (mixed, (right, "no", "no"), (True, True, False))
    assert group.rewards == (1.0, 0.0, 0.0) and sum(group.advantages) == pytest.approx(0)


@pytest.mark.slow
def test_what_cannot_be_sent_is_an_error_and_says_why(teacher: Exchange) -> None:
    (question,) = teacher.ask(1)
    with pytest.raises(ValueError, match="2 texts have 1 values of finished"):
        teacher.publish(question, ["1", "2"], [True])
    for few in ("12", ["12", 5], None):
        for call in (teacher.score, lambda *given: teacher.publish(*given, [True, True])):
            with pytest.raises(TypeError, match=r"^texts: give a list with a text for each answer$"):
                call(question, few)
    for ended in (True, ["yes", "no"]):
        with pytest.raises(TypeError, match=r"^finished: give a list with True or False for each answer$"):
            teacher.publish(question, ["1", "2"], ended)
    with pytest.raises(ValueError, match="a draw of at most 2 groups cannot have least=3"):
        teacher.draw(2, least=3, timeout=0.1)
    for call in (teacher.ask, teacher.draw):
        for count in (-1, 2.5, "2"):
            with pytest.raises(ValueError, match=f"^count has to be a whole number of 0 or more, and not {count!r}$"):
                call(count)
    with pytest.raises(ValueError, match="least has to be a whole number of 0 or more, and not -1"):
        teacher.draw(2, least=-1)
    with pytest.raises(UserError, match="an answer has at most 131072 bytes, and one has 131073: send shorter ones"):
        teacher.publish(question, [question.item.answer, "n" * 131073], [True, True])
    with pytest.raises(
        UserError, match=r"a group of this swarm has at most 16777216 bytes, and this one \d+: send less"
    ):
        teacher.publish(question, [question.item.answer.rjust(131072), *["n" * 131072] * 127], [True] * 128)
    with pytest.raises(UserError, match="at most 128 answers"):
        teacher.publish(question, [str(number) for number in range(129)], [True] * 129)
    other = question._replace(task=question.task._replace(name="builtin/riddles"))
    for call in (teacher.score, lambda *given: teacher.publish(*given, [True])):
        with pytest.raises(UserError, match="of task 'builtin/riddles', which is none here"):
            call(other, ["1"])
    with pytest.raises(UserError, match=r"an answer has half of a character \(U\+D83D\): leave it out, or replace it"):
        teacher.publish(question, [question.item.answer, "hm \ud83d"], [True, True])
    task = load_tasks(parse_config({"tasks": [{"name": "builtin/sums"}]}).tasks)
    item = next(task.evaluation(task.tasks[0], 0, 1))
    with pytest.raises(UserError, match="a held-out question is not published"):
        teacher.publish(question._replace(item=item), [item.answer, "no"], [True, True])


@pytest.mark.slow
def test_a_liar_is_reported_and_its_other_groups_are_not_drawn(
    teacher: Exchange, pupil: Exchange, tmp_path: Path
) -> None:
    config = parse_config({"tasks": [{"name": "builtin/sums"}], "network": {"seeds": [pupil.address]}})
    tasks = load_tasks(config.tasks)
    (tmp_path / "liar").mkdir()
    with open_network(config, tmp_path / "liar") as network:
        liar = NetworkExchange(network.host, tasks, max_completions=4, external=0)
        lies = [group_of(question, (0.0, 1.0)) for question in pupil.ask(2)]
        true = [group_of(question, (1.0, 0.0)) for question in pupil.ask(2)]
        wait_until(lambda: network.host.counters().peers, 20, "the liar to be linked")
        assert liar.publish([*lies, *true]) == 4
        wait_until(lambda: pupil.statistics()["swarm/items_received"] >= 4, 20, "the liar's groups")
        questions = teach(teacher, 2)
        assert texts(pupil.draw(8, least=2)) == sorted(question.text for question in questions)
        wait_until(lambda: pupil.statistics()["swarm/rejected"].get("false_reward"), 20, "the report of a lie")
        assert pupil.draw(8) == []


@pytest.mark.slow
def test_a_draw_that_has_not_enough_in_time_says_so_and_has_used_nothing(teacher: Exchange, pupil: Exchange) -> None:
    questions = teach(teacher, 2)
    wait_until(lambda: pupil.statistics()["swarm/items_received"] >= 2, 20, "both groups")
    with pytest.raises(TimeoutError, match=r"2 of 3 groups came from 1 peers in 0\.3 s"):
        pupil.draw(3, least=3, timeout=0.3)
    assert texts(pupil.draw(3)) == sorted(question.text for question in questions)
    assert pupil.draw(3) == []


@pytest.mark.slow
def test_a_draw_that_waits_lets_others_through(teacher: Exchange, pupil: Exchange) -> None:
    drawn: list[DrawnGroup] = []
    waiting = threading.Thread(target=lambda: drawn.extend(pupil.draw(1, least=1, timeout=60)))
    waiting.start()
    (question,) = pupil.ask(1)
    assert pupil.score(question, [question.item.answer, "no"]) == [1.0, 0.0]
    (taught,) = teach(teacher, 1)
    waiting.join(60)
    assert texts(drawn) == [taught.text]


@pytest.mark.slow
def test_calls_may_wait_without_an_end(teacher: Exchange, pupil: Exchange) -> None:
    (question,) = teacher.ask(1, timeout=math.inf)
    answers = [question.item.answer, "no"]
    assert teacher.score(question, answers, timeout=math.inf) == [1.0, 0.0]
    assert teacher.publish(question, answers, [True, True], timeout=math.inf)
    assert texts(pupil.draw(1, least=1, timeout=math.inf)) == [question.text]


@pytest.mark.slow
def test_what_does_not_end_in_time_says_what_was_waited_for(tmp_path: Path) -> None:
    goes_on = threading.Event()
    with Exchange(tmp_path / "m", fits=lambda messages: goes_on.wait(60), **SUMS) as member:
        try:
            with pytest.raises(TimeoutError, match=r"waited 0\.1 s for 2 questions"):
                member.ask(2, timeout=0.1)
        finally:
            goes_on.set()
        assert len(member.ask(1)) == 1
    assert GRACE_S <= 1


@pytest.mark.slow
def test_questions_that_do_not_fit_are_neither_asked_nor_drawn(teacher: Exchange, tmp_path: Path) -> None:
    def adds(messages: Messages) -> bool:
        return "+" in messages[-1]["content"]

    with Exchange(tmp_path / "pupil", fits=adds, network={"seeds": [teacher.address]}, **SUMS) as pupil:
        assert all("+" in question.text for question in pupil.ask(5))
        taught = teach(teacher, 24)
        sums = sorted(question.text for question in taught if "+" in question.text)
        wait_until(lambda: pupil.statistics()["swarm/items_received"] >= 24, 20, "all groups")
        assert texts(pupil.draw(24)) == sums and 0 < len(sums) < 24
        refused = "prompt_too_long"
        wait_until(lambda: pupil.statistics()["swarm/rejected"].get(refused) == 24 - len(sums), 20, "reports")


@pytest.mark.slow
def test_much_longer_answers_than_ones_own_are_left_out(teacher: Exchange, tmp_path: Path) -> None:
    with Exchange(tmp_path / "pupil", tasks=["builtin/sums"], network={"seeds": [teacher.address]}) as pupil:
        teach(pupil, 1)
        (question,) = teacher.ask(1)
        teacher.publish(question, [question.item.answer, "no" * 50, "no"], [True] * 3)
        (group,) = pupil.draw(1, least=1)
        assert group.texts == (question.item.answer, "no")
        assert group.advantages == pytest.approx((2 / 3, -1 / 3))


@pytest.mark.slow
def test_a_member_with_an_event_loop(tmp_path: Path) -> None:
    async def both() -> list[DrawnGroup]:
        async with Exchange(tmp_path / "a", **SUMS) as first:
            seeds = {"network": {"seeds": [first.address]}}
            async with Exchange(tmp_path / "b", **SUMS, **seeds) as second:
                waiting = asyncio.create_task(second.adraw(1, least=1))
                (question,) = await first.aask(1)
                answers = [question.item.answer, "no"]
                assert await first.ascore(question, answers) == [1.0, 0.0]
                assert await first.apublish(question, answers, [True, True])
                return await waiting

    (group,) = asyncio.run(both())
    assert group.rewards == (1.0, 0.0)
    assert not is_held(tmp_path / "a") and not is_held(tmp_path / "b")


@pytest.mark.slow
def test_one_process_holds_a_folder_until_it_closes(tmp_path: Path) -> None:
    with Exchange(tmp_path / "m", **SUMS) as member:
        with pytest.raises(UserError, match="another node is running in"):
            Exchange(tmp_path / "m")
        assert is_held(tmp_path / "m")
    assert not is_held(tmp_path / "m")
    member.close()
    with pytest.raises(UserError, match="is closed: open it again"):
        member.ask(1)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, r"has joined no swarm: Exchange\.join"),
        ({"network": {"enabled": False}, "tasks": ["builtin/sums"]}, "an exchange needs its network"),
        ({"tasks": ["builtin/guess"]}, "no tasks"),
        ({"tasks": ["builtin/sums"], "policy": "x" * 300}, "the policy's name has to have 1 to 256 bytes, and not 300"),
        ({"tasks": ["builtin/sums"], "sampling": {"locall": 1}}, "did you mean 'sampling.local'"),
    ],
)
def test_what_is_of_no_use_is_one_line(settings: dict[str, object], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        Exchange(tmp_path / "m", **settings)  # type: ignore[arg-type]
    wait_until(lambda: not is_held(tmp_path / "m"), 20, "the folder to be free")


@pytest.mark.slow
def test_a_task_with_an_environment_is_left_out(tmp_path: Path) -> None:
    with Exchange(tmp_path / "m", tasks=["builtin/guess", "builtin/sums"]) as member:
        assert {question.task.name for question in member.ask(6)} == {"builtin/sums"}


PROGRAM = """
import os, signal, sys
from gossamer import Exchange

with Exchange(sys.argv[1], tasks=["builtin/sums"], network={"seeds": [sys.argv[2]]}) as pupil:
    (question,) = pupil.ask(1)
    print(question.seed)
    for group in pupil.draw(2, least=2, timeout=60):
        print(group.question.text)
    assert not {"torch", "transformers", "trl", "numpy"} & set(sys.modules)
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, (ROOT, ROOT / "node" / "public")))
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=100)


@pytest.mark.slow
def test_what_was_drawn_before_kill_9_is_not_drawn_again_and_what_was_asked_is_not_asked_again(
    teacher: Exchange, tmp_path: Path
) -> None:
    taught = teach(teacher, 3)
    done = run(PROGRAM, tmp_path / "pupil", teacher.address)
    assert done.returncode == -signal.SIGKILL, done.stderr
    seed, *drawn = done.stdout.splitlines()
    assert len(drawn) == 2
    with Exchange(tmp_path / "pupil") as pupil:
        assert str(pupil.ask(1)[0].seed) != seed
        (left,) = pupil.draw(4, least=1)
        assert sorted([*drawn, left.question.text]) == sorted(question.text for question in taught)
        assert pupil.draw(4) == []


FORGETFUL = """
import sys
from gossamer import Exchange

member = Exchange(sys.argv[1], tasks=["builtin/sums"])
print(len(member.ask(1)))
"""


@pytest.mark.slow
def test_a_program_that_forgets_to_close_ends_all_the_same(tmp_path: Path) -> None:
    done = run(FORGETFUL, tmp_path / "m")
    assert (done.returncode, done.stdout) == (0, "1\n") and "sqlite" not in done.stderr


def test_events_of_a_members_program_go_to_pythons_logging(caplog: pytest.LogCaptureFixture) -> None:
    before = structlog.get_config()
    try:
        structlog.reset_defaults()
        log_by_logging()
        structlog.get_logger("node.exchange").warning("unscorable", task="sums")
        assert caplog.messages == ["event='unscorable' task='sums'"]
        log_by_logging()  # what a program has set up stays
    finally:
        structlog.configure(**before)
