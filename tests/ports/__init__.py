"""Ports: the authors' modules in our words, one file a system, built from a golden's `source` (never from its name).

    build(golden) -> Port(module, rename, inputs, outputs)
"""
