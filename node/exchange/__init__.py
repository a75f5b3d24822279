"""One path to a swarm and from it, for a node's loop and for any other trainer: `from gossamer import Exchange`.

member     `Exchange`: join, ask, score, publish, draw, from any program
opening    what stands between a node's folder and its peers: the network, what is shared, the group buffer
rounds     a node's rounds with its swarm: ask, score, publish, receive, draw; lies are reported, uses remembered
answering  a member that only answers: the swarm's questions, an endpoint's answers, and budgets
endpoint   a model behind an OpenAI-compatible URL

A node's run opens its part of the swarm by `opening`, and its loop goes by `rounds`, as `Exchange` does. Nothing here
needs torch: no model, no tokenizer, no engine.
"""

from node.exchange.member import AskedQuestion, DrawnGroup, Exchange

__all__ = ["AskedQuestion", "DrawnGroup", "Exchange"]
