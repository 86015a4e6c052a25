"""Functions on tensors, without parameters: what the mixers compute with."""

from saccade.ops.choice import explain_choice, prefer

__all__ = ["explain_choice", "prefer"]
