"""Token mixers in their plain textbook form, one file a paper.

A function has the name of the mixer and takes the mixer itself: `form(mixer, x)` computes `mixer(x)` with the mixer's
own parameters the way one writes it from the paper (unfolded windows, materialised softmax, full masks): for readers,
for `tests/test_textbook.py`, which compares the two, and for `benchmarks/mixers.py`, which measures them side by side.
"""
