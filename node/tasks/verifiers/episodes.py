"""Episodes of an environment of verifiers (0.4): its own `run`, with this node's policy as its agent.

In verifiers, an environment's `run` talks to an agent: a program beside a model's server, with tools served over HTTP.
Here the agent is a stand-in whose words come from the node, turn by turn, and tools are called in this process. An
environment and a task set see what they see there: `agent.run`, `agent.interaction`, `turn`, the trace and its state.

    turn(message)       the message is the policy's next observation; what it says is the reply
    a turn with calls   (`node.tasks.environments.tool_calls`) is answered by the tools, and the policy speaks again
    the end of run      pays the trace's reward

One agent and one conversation are all that there is: no containers, judges, second agents or servers elsewhere.
`refuse` says so in a line. Tool sets are made for each episode, also those that are shared in verifiers.

Only a worker process imports this (`node.tasks.verifiers.task_sets`).
"""

import asyncio
import inspect
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from verifiers import v1
from verifiers.v1.agent import Segment
from verifiers.v1.configs.agent import agent_config_fields
from verifiers.v1.mcp.toolset import Toolset
from verifiers.v1.session import hook_boundary
from verifiers.v1.state import state_cls
from verifiers.v1.trace import TraceTask
from verifiers.v1.types import ToolCall, ToolMessage, content_text
from verifiers.v1.utils.decorators import discover_decorated, invoke
from verifiers.v1.utils.loaders import load_environment, resolve_env_config

from node.tasks.environments.episodes import Done, Observation
from node.tasks.environments.tool_calls import (
    OPENED,
    CallError,
    SaidCall,
    SaidCalls,
    Schema,
    check_call,
    read_calls,
    told,
)


class TaskSetGame:
    """One episode of `env` on `task`, in progress; `told` is what its environment last said, if anything.

    `scale` makes a reward of a sum. Raises what the environment raises.
    """

    def __init__(self, env: Any, task: Any, scale: Callable[[float], float]) -> None:
        self.told: str | None = None
        self._scale = scale
        self._loop = asyncio.new_event_loop()
        self._asked = asyncio.Event()
        self._reply: asyncio.Future[str] = self._loop.create_future()
        self._running = self._loop.create_task(_run(env, task, self))
        self._go_on()

    async def ask(self, words: str | None) -> str:
        """Tell the policy something; return what it says."""
        self.told = words
        self._reply = self._loop.create_future()
        self._asked.set()
        return await self._reply

    def step(self, text: str) -> Observation | Done:
        """Take a turn of the policy."""
        self._reply.set_result(text)
        self._go_on()
        if not self._running.done():
            return Observation(self.told or "")
        return Done(self._scale(self._running.result()))

    def _go_on(self) -> None:
        """Run the environment until it asks the policy, or ends."""
        self._asked.clear()
        self._loop.run_until_complete(self._until_asked())
        if self._running.done():
            self._loop.close()
            self._running.result()

    async def _until_asked(self) -> None:
        asked = self._loop.create_task(self._asked.wait())
        await asyncio.wait([asked, self._running], return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()

    def close(self) -> None:
        """Give it up."""
        self._running.cancel()
        self._loop.run_until_complete(asyncio.wait([self._running]))
        self._loop.close()


async def _run(env: Any, task: Any, game: TaskSetGame) -> float:
    """Play one episode as `Env.run_episode` does; return its reward."""
    traces: list[Any] = []
    agents: Any = v1.Agents(env.config, lambda name, config: Agent(env, name, config, game, traces))
    await env.setup(agents)
    await env.run(task, agents)
    episode = v1.Episode(env=v1.EnvInfo(id=env.config.env_id), task=_named(task), traces=traces)
    await env.finalize(task, episode)
    if len(traces) != 1:
        raise ValueError(f"its environment held {len(traces)} conversations: here an episode is one")
    return float(traces[0].reward)


def _named(task: Any) -> Any:
    return TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash)


class Agent:
    """The policy, as an environment sees its agent."""

    def __init__(self, env: Any, name: str, config: Any, game: TaskSetGame, traces: list[Any]) -> None:
        self.name = name
        self.config = config
        self.trainable = True
        self._env = env
        self._game = game
        self._traces = traces

    async def run(self, task: Any, **_: Any) -> Any:
        """Let the policy answer the task; return the trace."""
        async with self.interaction(task) as conversation:
            await conversation.turn()
        return conversation.trace

    @asynccontextmanager
    async def interaction(self, task: Any, **_: Any) -> "AsyncIterator[Conversation]":
        """Hold a conversation on the task; it is paid when it ends."""
        tools = list(task.toolsets(task.config))
        own = isinstance(task, type(self._env.taskset).task_type())
        shared = self._env.taskset.toolsets(self._env.taskset.config) if own else []
        conversation = Conversation(self, task, self._game, await Tools.of(tools, shared, task))
        yield conversation
        conversation.trace.stop("user_closed")
        conversation.trace.ok = True
        await task.score(conversation.trace)
        self._traces.append(conversation.trace)


class Conversation:
    """An `Interaction` of verifiers, as far as an environment uses one: `turn` and `trace`."""

    def __init__(self, agent: Agent, task: Any, game: TaskSetGame, tools: "Tools") -> None:
        info = v1.AgentInfo(config=agent.config, name=agent.name)
        self.trace: Any = v1.Trace(task=_named(task), state=state_cls(type(task))(), agent=info)
        self._task = task
        self._game = game
        self._tools = tools
        self._most = agent.config.max_turns
        self._speaks_first = task.data.prompt is not None
        self._called = 0
        tools.state = self.trace.state
        for message in _opening(task.data):
            self._add(message)

    async def turn(self, message: Any = None) -> Segment:
        """Tell the policy something, and return what it says and does until it calls no tool."""
        if (message is None) != self._speaks_first:
            raise ValueError("a turn has a message, but for the first one of a task with a prompt")
        self._speaks_first = False
        words = None if message is None else _text(message)
        if words is not None:
            self._add(v1.UserMessage(content=words))
        before = len(self.trace.nodes)
        while not await self._is_over():
            turn = await self._says(words)
            if not turn.calls:
                break
            words = told(turn, [await self._result(call) for call in turn.calls])
        messages = [node.message for node in self.trace.nodes[before:]]
        return Segment(messages=messages, terminated=not messages)

    async def _is_over(self) -> bool:
        """Tell whether the policy speaks no more: by the agent's limit, or by what the task says."""
        if self.trace.stop_condition is None:
            if self._most is not None and self.trace.num_turns >= self._most:
                self.trace.stop("max_turns")
            for stops in self._task.hooks("stop"):
                stop = invoke(stops, {v1.Trace: self.trace, "trace": self.trace, "task": self._task.data})
                if await stop if inspect.isawaitable(stop) else stop:
                    self.trace.stop(stops.__name__)
        return self.trace.stop_condition is not None

    async def _says(self, words: str | None) -> SaidCalls:
        text = await self._game.ask(words)
        turn = read_calls(text) if self._tools.schemas else SaidCalls([], tagged=False)
        calls = [
            ToolCall(id=f"call_{self._called + at}", name=call.name, arguments=json.dumps(call.arguments))
            for at, call in enumerate(call for call in turn.calls if isinstance(call, SaidCall))
        ]
        content = text.partition(OPENED)[0] if turn.tagged else text
        self._add(v1.AssistantMessage(content=content, tool_calls=calls or None), sampled=True)
        return turn

    async def _result(self, call: SaidCall | CallError) -> str:
        text = await self._tools.call(call)
        if isinstance(call, SaidCall):
            self._add(ToolMessage(tool_call_id=f"call_{self._called}", content=text))
            self._called += 1
        return text

    def _add(self, message: Any, *, sampled: bool = False) -> None:
        parent = len(self.trace.nodes) - 1 if self.trace.nodes else None
        self.trace.nodes.append(v1.MessageNode(message=message, parent=parent, sampled=sampled))


class Tools:
    """The tools of an episode, by the names under which they are told; `state` is what they share with the rewards."""

    def __init__(self) -> None:
        self.state: Any = None
        self.schemas: dict[str, Schema] = {}
        self.told: list[dict[str, Any]] = []
        self._servers: dict[str, tuple[MCPServer, str]] = {}

    @classmethod
    async def of(cls, own: list[Any], shared: list[Any], task: Any) -> "Tools":
        """Return the tools of tool sets, ready: those of the `task`, and those `shared` by all tasks."""
        tools = cls()
        for toolset in [*own, *shared]:
            await tools._add(toolset)
        for toolset in own:
            await toolset.setup_task(task.data)
        return tools

    async def _add(self, toolset: Any) -> None:
        server = MCPServer(toolset.server_name or type(toolset).__name__)
        toolset._pull_state = self._pull  # over HTTP from another process, otherwise
        toolset._push_state = _push
        await toolset.setup()
        toolset.register(server)
        for tool in await server.list_tools():
            name = f"{toolset.server_name}_{tool.name}" if toolset.server_name else tool.name
            if name in self.schemas:
                raise ValueError(f"two of its tools are called {name}")
            schema = dict(tool.input_schema)
            schema["properties"] = {
                key: {"description": "", **parameter} for key, parameter in schema.get("properties", {}).items()
            }
            self.schemas[name] = schema
            self._servers[name] = server, tool.name
            described = {"name": name, "description": tool.description or "", "parameters": schema}
            self.told.append({"type": "function", "function": described})

    async def _pull(self) -> Any:
        return self.state

    async def call(self, call: SaidCall | CallError) -> str:
        """Return what a call returns, or what is wrong with it."""
        try:
            if isinstance(call, CallError):
                raise call
            check_call(call, self.schemas)
            server, name = self._servers[call.name]
            result: Any = await server.call_tool(name, call.arguments)
        except (CallError, ToolError) as error:
            return f"error: {error}"
        return "\n".join(part.text if part.type == "text" else str(part) for part in result.content)


async def _push(before: bytes) -> None:
    """Do nothing: the state is at hand."""


def _opening(data: Any) -> list[Any]:
    """Return the messages that a row begins with."""
    messages = [v1.UserMessage(content=data.prompt)] if isinstance(data.prompt, str) else list(data.prompt or [])
    return [v1.SystemMessage(content=data.system_prompt), *messages] if data.system_prompt else messages


def _text(message: Any) -> str:
    """Return a user's turn, a text or messages, as a text."""
    if isinstance(message, str):
        return message
    contents = [part["content"] if isinstance(part, dict) else part.content for part in message]
    return "\n\n".join(content_text(content) for content in contents)


def environment_of(name: str, config: dict[str, Any]) -> Any:
    """Return the environment of the task set `name`, with its task set under `config`."""
    return load_environment(resolve_env_config({"taskset": {**config, "id": name}}))


def refuse(env: Any, task: Any) -> str:
    """Return why an environment's episodes on a task cannot be played here; nothing if they can."""
    if len(agent_config_fields(env.config)) != 1:
        return "it has several agents, of which one would be another model"
    if type(env).start is not v1.Env.start:
        return "its environment starts something that all episodes share"
    if discover_decorated(task, "intercept") or any(
        hook_boundary(hook, allow_trace=True) is not v1.Trace for hook in task.hooks("stop")
    ):
        return "it looks at a model server's requests"
    for toolset in toolsets_of(env, task):
        config = toolset.config
        elsewhere = getattr(config, "url", None) or getattr(config, "colocated", False)
        if elsewhere or getattr(getattr(config, "runtime", None), "type", "subprocess") != "subprocess":
            return f"its tools {type(toolset).__name__} need a container, or are elsewhere"
    return ""


def toolsets_of(env: Any, task: Any) -> list[Toolset[Any, Any]]:
    """Return all tool sets of a task."""
    return [*task.toolsets(task.config), *env.taskset.toolsets(env.taskset.config)]


async def tools_told(env: Any, task: Any) -> str:
    """Return the tools of a task as `Item.tools` has them; nothing if there are none."""
    tools = await Tools.of(task.toolsets(task.config), env.taskset.toolsets(env.taskset.config), task)
    return json.dumps(tools.told) if tools.told else ""
