"""Muon with AdamW inside, the routing of parameters between them, and learning-rate schedules."""

from vlkit.optim.groups import ParamGroups, freeze, muon_param_groups
from vlkit.optim.muon import Muon
from vlkit.optim.newton_schulz import orthogonalize, polar_coefficients
from vlkit.optim.qk_clip import qk_clip_, record_max_logits, reduce_max_logits_
from vlkit.optim.schedule import warmup_decay
from vlkit.optim.state import load_state, save_state

__all__ = [
    "Muon",
    "ParamGroups",
    "freeze",
    "load_state",
    "muon_param_groups",
    "orthogonalize",
    "polar_coefficients",
    "qk_clip_",
    "record_max_logits",
    "reduce_max_logits_",
    "save_state",
    "warmup_decay",
]
