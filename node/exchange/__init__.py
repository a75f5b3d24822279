"""One path to a swarm and from it, for a node's loop and for any other trainer: `from gossamer import Exchange`.

member     `Exchange`: join, ask, score, publish, draw, from any program
opening    what stands between a node's folder and its peers: the network, what is shared, the group buffer
answering  a member that only answers: the swarm's questions, an endpoint's answers, and budgets
endpoint   a model behind an OpenAI-compatible URL

A node's run opens its part of the swarm by `opening`, as `Exchange` does. Both draw by `node.rollouts.draw`. Nothing
here needs torch: no model, no tokenizer, no engine.
"""

from node.exchange.member import AskedQuestion, DrawnGroup, Exchange

__all__ = ["AskedQuestion", "DrawnGroup", "Exchange"]
