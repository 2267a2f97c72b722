"""The stages of UI-TARS: continual pre-training of Qwen2-VL on graphical interfaces, annealing, DPO.

Source: UI-TARS, arXiv:2501.12326; about 50 B tokens in all. The code of bytedance/UI-TARS has no training in it.
"""

from __future__ import annotations

from vlkit.training.presets.fact import Fact, Facts, Stage, unknown

PAPER = "UI-TARS, arXiv:2501.12326"
TRAINING, ONLINE = f"{PAPER}, section 4.6", f"{PAPER}, section 4.5"
NOT_STATED = unknown("not stated")
FROZEN = unknown("what is frozen is not stated")
TOKENS = Fact(50e9, TRAINING, note="about; the three stages together")
BASE = Fact("Qwen2-VL with 2, 7 or 72 B parameters", TRAINING)
HISTORY = Fact(
    "the last 5 observations, all thoughts and actions, in about 32k tokens", f"{PAPER}, section 4.1", "summary"
)

_LENGTH: Facts = {
    "train": FROZEN,
    "steps|epochs": NOT_STATED,
    "batch|packs": NOT_STATED,
    "optimizer.kind": NOT_STATED,
    "optimizer.lr": NOT_STATED,
    "optimizer.weight_decay": NOT_STATED,
    "schedule.warmup": NOT_STATED,
}
_FALL: Facts = {"schedule.shape": NOT_STATED, "schedule.final": NOT_STATED}

STAGES = (
    Stage(
        "ui-tars/continual",
        "Continual pre-training on everything but reflection",
        about={
            "begins with": BASE,
            "tokens": TOKENS,
            "data": Fact("perception, grounding, tutorials and action traces, without reflection tuning", TRAINING),
            "history": HISTORY,
        },
        sets={
            "objective.kind": Fact("next-token", TRAINING),
            **_LENGTH,
            "schedule.decay": Fact(0, TRAINING, note="a constant learning rate"),
            "data.pack_tokens": NOT_STATED,
            "data.labels": NOT_STATED,
        },
    ),
    Stage(
        "ui-tars/sft",
        "Annealing on the best data, with reflection",
        about={
            "tokens": TOKENS,
            "data": Fact(
                "subsets of high quality of perception, grounding and traces, and reflection tuning", TRAINING
            ),
            "reflection pairs": Fact(
                "error correction: the same beginning with the right step; post-reflection: after the wrong step a step that "
                "sees and repairs it. Only the corrected ones are learnt from",
                ONLINE,
            ),
            "loss on reflection": Fact(
                "on the corrected step alone", ONLINE, note='"loss": true on that message, false on the others'
            ),
            "history": HISTORY,
        },
        sets={
            "objective.kind": Fact("next-token", TRAINING),
            **_LENGTH,
            **_FALL,
            "data.pack_tokens": NOT_STATED,
            "data.labels": unknown(
                "not stated for other data; with {on = 'answers', turns = 'last'} the last step alone is learnt"
            ),
        },
    ),
    Stage(
        "ui-tars/dpo",
        "Direct preference optimisation on reflection pairs",
        about={
            "tokens": TOKENS,
            "data": Fact("pairs of the corrected and the wrong step, of traces that earlier models made", ONLINE),
            "reference": Fact("the model of the stage before", ONLINE),
        },
        sets={
            "objective.kind": Fact("dpo", TRAINING),
            "objective.beta": unknown("not stated"),
            **_LENGTH,
            **_FALL,
        },
    ),
)
