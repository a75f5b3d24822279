"""The dashboard: a page that a node, or a swarm on one machine, serves of itself.

feed      what there is to show, read from the nodes' folders
app       the paths, who may read them, and the stream of events
server    HTTP in a thread of its own
static/   the page: no build step, nothing from the internet; uPlot (MIT, its licence beside it) draws the curves

To draw one more metric: give it `Display.DASHBOARD` in node/metrics.py.
"""
