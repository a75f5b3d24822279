"""Refusals by reason: the names under which they are counted, and what each tells a person.

`gossamer status`, the dashboard and the reference show these words; `/metrics` and a node's rows have the names.
"""

from collections.abc import Mapping
from types import MappingProxyType

MEANINGS: Mapping[str, str] = MappingProxyType(
    {
        # Peers' groups and reports, on arrival or once a round drew them.
        "false_reward": "a group's reward is not what its text earns here: a lie, or another version of the task",
        "false_question": "a group's question is not the one that its seed makes here",
        "other_content": "a group of another edition of the same data set; nobody's fault",
        "unknown_task": "a group of a task that this node does not run; nobody's fault",
        "held_out": "a group on a question that is held out for evaluation here; nobody's fault",
        "turns": "a group with several turns, of a task that has one",
        "false_topic": "a group under another topic than its own",
        "unverifiable": "this node's task failed to make a group's question; nobody's fault",
        "unscorable": "this node could not score a group's text in time, or at all; nobody's fault",
        "slow_signer": "a group of a signer whose texts twice took too long to score here: none is scored for 64 "
        "rounds; counted as nobody's fault",
        "prompt_too_long": "a group's question leaves this node's model no room; nobody's fault",
        "too_long": "a group's right answers are longer than this node lets its own be; nobody's fault",
        "over_long": "a group's right answers are far longer than this node's (sampling.max_length_ratio); "
        "nobody's fault",
        "too_surprising": "this node's policy would hardly say a group's right answers (sampling.max_surprise); "
        "nobody's fault",
        "quotes_held_out": "a group's right answers give away a held-out question with its answer; nobody's fault",
        "group_size": "a group of more completions than the swarm allows",
        "own_oversized": "a group of this node's own that has more bytes than the swarm allows",
        "own_group_size": "a group of this node's own that has more completions than the swarm allows",
        "own_malformed": "a group of this node's own that has a text over 128 KiB or a name over 256 bytes",
        "own_turns": "a group of this node's own that has several turns, of a task that has one",
        "self_praise": "a report by which a node learned from itself",
        "early_report": "a node's report too soon after its last, as after a restart; nobody's fault",
        # Items on their way.
        "unwanted": "items of topics that this node does not want; some may be on their way when it says so",
        "unasked": "outlines of large items that this node had not asked for",
        "unanswered": "items announced and asked for, and not answered",
        "false_have": "items announced and asked for, of a peer that does not have them",
        "no_room": "a large item while all room for downloads is taken",
        "false_chunk": "a part of a large item that is not what its outline says",
        "unasked_item": "an item, or a part of one, that this node had not asked for",
        "queue_full": "messages that a slow peer did not take in time",
        "inbox_full": "items dropped since the training fell behind",
        "outbox_full": "own items dropped since the network thread fell behind",
        # Messages.
        "stale": "dated too long ago, or ahead of this machine's clock: compare the clocks",
        "flood": "messages for which a peer's network has no processor time left",
        "oversized": "larger than anything may be",
        "malformed": "not of the form that the protocol has",
        "forged": "a signature that does not hold",
        "impostor": "signed by another node than the connection's",
        "wrong_swarm": "of another swarm",
        "other_version": "of another version of the protocol: one of the two needs an update",
        "no_hello": "a connection that did not say who it is",
        "graylisted": "from a peer that is refused for a while, for what it did before",
        "too_many_asks": "a peer asks to be dialled back too often",
        "too_many_hellos": "a peer says hello too often; now and then is nothing",
        "unasked_answer": "a peer answers what it was not asked",
        "false_manifest": "a seed gives another manifest than the invite names",
        # Connections.
        "handshake_unfinished": "a connection that ended, or was too slow, before it was encrypted",
        "handshake_malformed": "a connection that did not begin as a node's does",
        "handshake_flood": "a network that opens connections too fast",
        "too_many_connections": "more connections than this node holds",
        "superseded": "a newer connection of the same node took its place",
        "endless_message": "a connection with a message that never ends",
        "backlog": "a connection whose network, or all together, held more than may wait",
        # Admission.
        "clock_behind": "a node whose clock is a day or more behind this machine's",
        "clock_ahead": "a node whose clock is days ahead of this machine's",
        "not_admitted": "a node that is neither listed nor invited",
        "invite_used": "an invite that was used as often as it may be",
        "invite_expired": "an invite whose time is over",
        "invite_revoked": "an invite that the swarm's owner revoked",
        "revoked": "a node that the swarm's owner revoked",
        "too_many_uses": "more uses of invites than this node remembers",
        # This node.
        "internal": "a defect of this program, which the log shows: please report it",
    }
)


def meaning(reason: str) -> str:
    """Return what a reason tells a person; "" for one that is new."""
    return MEANINGS.get(reason, "")
