"""Telemetry: what a node and a run of nodes tell of themselves.

metrics_file    one JSON object a round
summary         what came of a run, in figures
evaluations     what a policy scored on held-out questions as it trained
round_metrics   what a round's groups and samples come to, in figures
rollout_log     what the model says: a few rollouts of each round
logs            structured events
round_log       a line now and then on how training goes
status_server   a running node over HTTP
same_site       whom a request asks, and whether a page of another site has made it
refusals        the reasons by which a node refuses, and what each tells a person
plots           the figures of a report
names           short names for node ids
dashboard/      what the pages look like in a browser
"""
