"""Telemetry: what a node and a run of nodes tell of themselves.

metrics         one JSON object a round, and how far a node is
logs            structured events
status_server   a running node over HTTP
live_table      a running swarm in a terminal
summary         summary.json
report          report.html, with the figures of `plots`
"""
