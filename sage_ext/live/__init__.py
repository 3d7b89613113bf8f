"""A trained run on a live stream: `sage-ext stream`. Frames from a pipe or a growing file, one JSON line a frame, a page.

frames     bytes -> frames of features, and what is wrong with those that are not
estimator  a frame -> an estimate; latency, quality and trace of the session
command    the command itself: input, signals, output, summary
page       the live page, page.html
"""
