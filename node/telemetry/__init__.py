"""Telemetry: what a node and a run of nodes tell of themselves.

metrics         one JSON object a round, and how far a node is
evaluations     what a policy scored on held-out questions as it trained
rollout_log     what the model says: a few rollouts of each round
logs            structured events
round_log       a line now and then on how training goes
status_server   a running node over HTTP
live_table      a running swarm in a terminal
summary         summary.json
swarm_page      the page of a swarm on this machine
refusals        the reasons by which a node refuses, and what each tells a person
report          report.html, with the figures of `plots`
dashboard/      what the pages look like in a browser
"""
