"""A page in the browser on 127.0.0.1: plan a run, start it, watch it, compare runs.

    server.py      which requests are answered, and the start and end of the server
    page.py        the HTML around the scripts of assets/, also for a page in one offline file
    planning.py    the Plan view: predictions by a process of its own (planner.py)
    processes.py   runs that are started, stopped and resumed, each a process of its own
    runs.py        the Runs view: runs live, overlaid and compared

The server holds no torch. What it answers is read by scripts of this package alone: no build step,
no framework, nothing from the network but plotly's bundle, which the package contains.
"""
