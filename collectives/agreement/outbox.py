"""Where the parts of the agreement core put what they ask for, while one event is handled."""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

from collectives.agreement.events import Action, Send
from collectives.agreement.messages import Message, OperationMessage
from protocol.identity import NodeId


@dataclass
class Outbox:
    """Actions in order. A member's message to itself never leaves it: it waits in `inward` to be handled next."""

    own: NodeId
    actions: list[Action] = field(default_factory=list)
    inward: deque[OperationMessage] = field(default_factory=deque)
    spoken_to: dict[NodeId, float] = field(default_factory=dict)  # when each link last carried something
    now: float = 0.0

    def send(self, member: NodeId, message: Message) -> None:
        """Say something to a member, perhaps to this one."""
        if member == self.own:
            if isinstance(message, OperationMessage):
                self.inward.append(message)
        else:
            self.spoken_to[member] = self.now
            self.actions.append(Send(member, message))

    def forget(self, but: Collection[NodeId]) -> None:
        """Forget when others than these were spoken to."""
        self.spoken_to = {member: at for member, at in self.spoken_to.items() if member in but}

    def do(self, action: Action) -> None:
        """Ask the owner or its driver for something."""
        self.actions.append(action)

    def take(self) -> list[Action]:
        """Return what was asked for since the last time."""
        actions, self.actions = self.actions, []
        return actions
