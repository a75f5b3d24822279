"""The engine over vLLM's servers, against stand-ins that speak its interface over real sockets."""

import json
import socket
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from structlog.testing import capture_logs

from node.config import EngineConfig, parse_config
from node.engines import EngineError, SamplingParams, make_engine
from node.engines.missing import missing
from node.engines.server import ServerEngine
from node.errors import UserError
from node.policy.load import load_policy
from tests.policies import tiny_policy

pytestmark = pytest.mark.slow

SAMPLING = SamplingParams(temperature=1.0, top_p=1.0, max_completion_length=6)


class StandIn(ThreadingHTTPServer):
    """Answers as vLLM's server does, with the weights that it was last told to load."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.calls, self.paths, self.fault, self.model = [], [], "", None
        self.seeds = []  # of each prompt that it completed
        self.ended = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def logprobs(self, tokens):
        with torch.no_grad():
            return self.model.model(torch.tensor([tokens])).logits[0].log_softmax(-1)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.reply({"data": [{"id": "policy"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.calls.append(self.path)
        if self.server.fault == "fails":
            self.send_error(500, "out of luck")
            return
        if self.server.fault == "hangs" and self.path == "/v1/completions":
            self.server.ended.wait()
            return
        if self.server.fault == "odd" and "prompt" in body:
            self.reply({"choices": [{"index": 0}]})
            return
        if self.path == "/v1/load_lora_adapter":
            self.server.paths.append(body["lora_path"])
        if self.path == "/collective_rpc":
            self.server.paths.append(body["kwargs"]["weights_path"])
            weights = load_file(next(Path(body["kwargs"]["weights_path"]).glob("*.safetensors")))
            if self.server.fault != "stale":
                self.server.model.model.load_state_dict(weights, strict=False)
        self.reply(self.completions(body) if self.path == "/v1/completions" else {})

    def completions(self, body):
        if "prompt_logprobs" in body:
            tokens = body["prompt"]
            rows = self.server.logprobs(tokens)
            entries = [
                {str(token): {"logprob": float(row[token])}} for token, row in zip(tokens[1:], rows, strict=False)
            ]
            return {"choices": [{"index": 0, "prompt_logprobs": [None, *entries]}]}
        assert body["ignore_eos"] and body["return_token_ids"] and body["max_tokens"] == 6
        assert (body["top_k"], body["min_p"], body["repetition_penalty"]) == (0, 0, 1), "not the model's own defaults"
        self.server.seeds.append((tuple(body["prompt"]), body["seed"]))
        row = self.server.logprobs(body["prompt"])[-1]
        token = int(row.argmax())
        likelihood = {"token_logprobs": [float(row[token])]}
        choices = [{"index": index, "token_ids": [token], "logprobs": likelihood} for index in range(body["n"])]
        return {"choices": choices[::-1]}

    def reply(self, body):
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def servers(tmp_path):
    tiny_policy(tmp_path / "policy")
    started = [StandIn(), StandIn()]
    for server in started:
        server.model = load_policy(parse_config({"policy": {"model": str(tmp_path / "policy")}}).policy)
        server.model.model.eval()
    yield started
    for server in started:
        server.ended.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def engine(servers, tmp_path, monkeypatch):
    monkeypatch.setattr("node.engines.server.DTYPE", "float32")
    policy = tiny_policy(tmp_path / "policy")
    urls = [server.url for server in servers]
    config = EngineConfig(kind="server", placement=urls, timeout=20, max_completion_length=6)
    made = make_engine(config, policy, tmp_path)
    made.policy = policy
    return made


PROMPTS = [[1, 5, 6], [1, 7], [1, 8, 9], [1, 10], [1, 11]]


def test_a_round_is_divided_and_comes_back_in_order_with_todays_weights(engine, servers):
    engine.load(0)
    for version in (1, 2):
        with torch.no_grad():
            engine.policy.model.lm_head.weight.mul_(-0.5)
        engine.load(version)
        groups = engine.generate(PROMPTS, 2, SAMPLING, seed=3)
        for prompt, group in zip(PROMPTS, groups, strict=True):
            with torch.no_grad():
                row = engine.policy.model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
            assert [completion.token_ids for completion in group] == [(int(row.argmax()),)] * 2
            assert group[0].logprobs[0] == pytest.approx(float(row.max()), abs=1e-4)
    asked = [server.calls.count("/v1/completions") for server in servers]
    assert asked == [1 + 2 * (1 + 3), 1 + 2 * (1 + 2)], "both were probed, and asked for three prompts and for two"
    assert not list(engine._folder.glob("weights-*"))


def test_each_question_has_a_seed_of_its_own_whatever_server_answers(engine, servers):
    """With one seed for all, number i of every question was drawn by the same random numbers."""
    engine.load(0)
    prompts, seen = [*PROMPTS, PROMPTS[0]], []
    for seed, fault in ((3, ""), (3, "fails"), (4, "")):
        servers[1].fault = fault
        engine.load(0)
        engine.generate(prompts, 1, SAMPLING, seed=seed)
        seen.append(sorted(servers[0].seeds + servers[1].seeds))
        servers[0].seeds, servers[1].seeds = [], []
    assert seen[0] == seen[1] != seen[2]
    seeds = sorted(seed for round_of in (seen[0], seen[2]) for _, seed in round_of)
    assert min(later - seed for seed, later in pairwise(seeds)) > 128, "vLLM takes the next ones, too"
    assert seeds[0] >= 0 and seeds[-1] + 128 < 2**63


def test_nothing_is_handed_over_when_nothing_changed(engine, servers):
    engine.load(0)
    engine.load(1)
    assert [server.calls.count("/collective_rpc") for server in servers] == [1, 1]


@pytest.mark.parametrize("fault", ["fails", "odd"])
def test_a_server_that_fails_is_left_out_once_and_tried_again(engine, servers, fault):
    engine.load(0)
    whole = engine.generate(PROMPTS, 2, SAMPLING, seed=3)
    assert engine.generate(PROMPTS, 1, SAMPLING, seed=3) == [group[:1] for group in whole]
    servers[0].fault = fault
    with capture_logs() as said:
        assert engine.generate(PROMPTS, 2, SAMPLING, seed=3) == whole
        assert engine.generate(PROMPTS, 2, SAMPLING, seed=3) == whole
        servers[0].fault = ""
        engine.load(1)
        assert engine.generate(PROMPTS, 2, SAMPLING, seed=3) == whole
    assert [line["event"] for line in said] == ["a server is left out", "a server is back"]


def test_where_no_server_answers_the_reasons_are_told(engine, servers):
    engine.load(0)
    for server in servers:
        server.fault = "fails"
    with pytest.raises(EngineError, match=r"no server answers: .*answers 500.*out of luck"):
        engine.generate(PROMPTS, 2, SAMPLING, seed=3)


def test_a_server_whose_engine_hangs_is_left_out_for_longer_each_time(servers, tmp_path, monkeypatch):
    quick = 1.0
    monkeypatch.setattr("node.engines.server.QUICK_S", quick)
    monkeypatch.setattr("node.engines.server.DTYPE", "float32")
    policy, now = tiny_policy(tmp_path / "policy"), 0.0
    urls = [server.url for server in servers]
    config = EngineConfig(kind="server", placement=urls, timeout=3, max_completion_length=6)
    engine = ServerEngine(policy, config, tmp_path, clock=lambda: now)
    engine.load(0)
    whole = engine.generate(PROMPTS, 2, SAMPLING, seed=3)
    servers[0].fault = "hangs"
    assert engine.generate(PROMPTS, 2, SAMPLING, seed=3) == whole, "the other one answers for both"
    tried, seen = [], 2 + 1  # its completions so far, with those in vain
    for step in range(30):
        now = step * quick / 2
        engine.load(1 + step)
        if len(asked := [call for call in servers[0].calls if call == "/v1/completions"]) > seen:
            tried, seen = [*tried, step], len(asked)
    assert tried == [0, 4, 16]
    servers[0].fault, now = "", 50 * quick
    with capture_logs() as said:
        engine.load(100)
    assert [line["event"] for line in said] == ["a server is back"]
    assert engine.generate(PROMPTS, 2, SAMPLING, seed=3) == whole


def test_where_all_servers_are_left_out_all_are_tried(servers, engine):
    engine.load(0)
    whole = engine.generate(PROMPTS, 2, SAMPLING, seed=3)
    for server in servers:
        server.fault = "fails"
    with pytest.raises(EngineError):
        engine.generate(PROMPTS, 2, SAMPLING, seed=3)
    engine.load(1)
    for server in servers:
        server.fault = ""
    engine.load(2)
    assert engine.generate(PROMPTS, 2, SAMPLING, seed=3) == whole


def test_weights_that_did_not_arrive_are_noticed(engine, servers):
    engine.load(0)
    servers[1].fault = "stale"
    with torch.no_grad():
        engine.policy.model.lm_head.weight.mul_(-1)
    engine.load(1)
    with capture_logs() as said:
        made = engine.generate(PROMPTS, 2, SAMPLING, seed=3)
    [line] = said
    assert line["event"] == "a server is left out" and "does not have policy version 1" in line["reason"]
    before = servers[1].calls.count("/v1/completions")
    assert engine.generate(PROMPTS, 2, SAMPLING, seed=3) == made
    assert servers[1].calls.count("/v1/completions") == before


def take_a_step(policy):
    """Move all weights by as much as an update does: less than rounding changes probabilities."""
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.mul_(1 + 1e-3)


def test_a_small_update_that_did_not_arrive_is_noticed(engine, servers):
    engine.load(0)
    whole = engine.generate(PROMPTS, 2, SAMPLING, seed=3)
    servers[1].fault = "stale"
    for version in (1, 2):
        take_a_step(engine.policy)
        engine.load(version)
        with capture_logs() as said:
            assert engine.generate(PROMPTS, 2, SAMPLING, seed=3) != whole
        assert f"does not have policy version {version}: it says of a text what" in said[0]["reason"]


def test_after_a_small_update_a_server_that_was_started_again_is_noticed(engine, servers):
    start = {name: weight.clone() for name, weight in servers[1].model.model.state_dict().items()}
    for version in range(4):
        engine.load(version)
        engine.generate(PROMPTS, 2, SAMPLING, seed=3)
        take_a_step(engine.policy)
    assert not engine._servers[1].failed
    servers[1].model.model.load_state_dict(start)
    engine.generate(PROMPTS, 2, SAMPLING, seed=3)
    assert "it says of a text what it said before" in engine._servers[1].failed
    engine.load(3)
    engine.generate(PROMPTS, 2, SAMPLING, seed=3)
    assert not engine._servers[1].failed


def test_a_server_that_was_started_again_is_given_the_weights_again(engine, servers):
    start = {name: weight.clone() for name, weight in servers[1].model.model.state_dict().items()}
    with torch.no_grad():
        engine.policy.model.lm_head.weight.mul_(-1)
    engine.load(1)
    whole = engine.generate(PROMPTS, 2, SAMPLING, seed=3)
    servers[1].model.model.load_state_dict(start)
    assert engine.generate(PROMPTS, 2, SAMPLING, seed=3) == whole
    assert engine._servers[1].failed
    engine.load(2)
    assert not engine._servers[1].failed
    assert servers[1].calls.count("/collective_rpc") == 2
    assert engine.generate(PROMPTS, 2, SAMPLING, seed=3) == whole


def test_adapters_lie_in_the_nodes_folder_and_what_a_killed_node_left_there_goes(servers, tmp_path):
    policy, node = tiny_policy(tmp_path / "policy", lora=2), tmp_path / "node"
    (node / "weights-3-abc").mkdir(parents=True)
    config = EngineConfig(kind="server", placement=servers[0].url, timeout=20, max_completion_length=6)
    for _ in range(2):  # the first one is killed, as far as the second one can tell
        engine = make_engine(config, policy, node)
        assert not list(node.iterdir())
        engine.load(0)
        [folder] = node.iterdir()
        assert (folder / "adapter_config.json").exists()


def test_a_server_that_runs_in_another_folder_is_told_whole_paths(servers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "node").mkdir()
    config = EngineConfig(kind="server", placement=servers[0].url, timeout=20, max_completion_length=6)
    for lora in (0, 2):  # weights, then adapters
        make_engine(config, tiny_policy(tmp_path / "policy", lora=lora), Path("node")).load(0)
    assert [Path(path).parent for path in servers[0].paths] == [tmp_path / "node"] * 2


def test_the_end_of_a_process_does_not_wait_for_a_server(engine):
    engine.load(0)

    def ask_in_vain():
        with suppress(EngineError):
            engine.generate(PROMPTS, 2, SAMPLING, seed=3)

    with socket.create_server(("127.0.0.1", 0)) as silent:
        for server in engine._servers:
            server.url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        asking = threading.Thread(target=ask_in_vain, daemon=True)
        asking.start()
        held = [silent.accept()[0] for _ in engine._servers]
        assert [thread.daemon for thread in threading.enumerate() if thread.name == "server"] == [True, True]
        for connection in held:
            connection.close()
    asking.join(20)


def test_a_server_that_is_not_there_is_told_before_anything_is_loaded():
    config = EngineConfig(kind="server", placement="http://127.0.0.1:9")
    assert "127.0.0.1:9" in missing("server", config)


@pytest.mark.parametrize(
    ("engine", "complaint"),
    [
        ({"kind": "server"}, "go together"),
        ({"placement": "http://a:1"}, "go together"),
        ({"placement": [1]}, "are for engine.kind='vllm'"),
        ({"placement": "elsewhere"}, 'no address of a server: write "same"'),
        ({"kind": "vllm", "placement": [1, 1]}, "different numbers"),
        ({"kind": "server", "placement": "box:8000"}, 'no address of a server: write "same"'),
        ({"kind": "vllm", "placement": [1.5]}, 'write "same"'),
        ({"kind": "server", "placement": "http://a:99999"}, "no address of a server"),
        ({"kind": "server", "placement": "http://me:secret@a:1"}, "no address of a server"),
        ({"kind": "server", "placement": ["http://a:1", "http://a:1/"]}, "different addresses"),
        ({"kind": "vllm", "placement": {"devices": [1]}}, 'write "same" for'),
    ],
)
def test_a_placement_that_cannot_be_is_refused_in_a_line(engine, complaint):
    with pytest.raises(UserError, match=complaint):
        parse_config({"engine": engine})
    assert parse_config({"engine": {"placement": "same"}}) == parse_config({})


def test_a_server_may_be_named_as_openais_clients_name_it():
    for written in ("http://a:1/v1", "http://a:1/v1/", "http://a:1/", "http://a:1"):
        assert parse_config({"engine": {"kind": "server", "placement": written}}).engine.servers == ["http://a:1"]
