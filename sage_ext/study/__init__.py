"""The study: fusion methods trained alike, scored clean and under every corruption, compared with intervals.

plan         what is asked: methods, data, seeds, rates, conditions; which data answer it, and where its files lie
methods      what can be compared: SAGE, its variants, single modalities, and every registered fusion
corruptions  the protocol of failures: plain NumPy, of use on your own arrays without anything else here
run          `compare`: trains and scores what is missing, then reports
slurm        the script that hands its phases to a cluster
score        finished runs under one condition
controls     what a model would predict if it trusted as in another clip, in another order, or always alike
streams      modalities that are of no use, and one that drifts after training
results      what was measured, read from its files
report       tables and pictures of it
statistics   bootstrap over videos and seeds, agreement of labellings
jobs         independent jobs on a few processes

docs/study.md says what is compared and how, docs/robustness.md what the corruptions are.
"""
