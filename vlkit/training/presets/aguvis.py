"""The stages of Aguvis: grounding, then planning and reasoning, on Qwen2-VL with 7 and 72 B parameters.

Sources: Aguvis, arXiv:2412.04454; xlang-ai/aguvis, the training scripts and stage lists.
"""

from __future__ import annotations

from vlkit.training.presets.fact import Fact, Stage

PAPER, CODE = "Aguvis, arXiv:2412.04454, training details", "xlang-ai/aguvis, the training scripts"
DATA = "Aguvis, arXiv:2412.04454, tables of the data"
ADAM = Fact("adamw", f"{PAPER}; {CODE}", note="Adam; without weight decay the two are one")
RATES = {"7b": 1e-5, "72b": 5e-6}
HOURS = {
    ("grounding", "7b"): "8 nodes of 8 H100 for 5 hours",
    ("planning", "7b"): "8 nodes of 8 H100 for 1 hour",
    ("grounding", "72b"): "16 nodes for 30 hours",
    ("planning", "72b"): "16 nodes for 6 hours",
}


def _stage(part: str, size: str) -> Stage:
    grounding = part == "grounding"
    samples = Fact(1.036e6, DATA) if grounding else Fact("35,000 traces", DATA)
    return Stage(
        f"aguvis/{part}-{size}",
        f"{'Grounding' if grounding else 'Planning and reasoning'}, Qwen2-VL-{size.upper()}",
        about={
            "begins with": Fact(f"Qwen2-VL-{size.upper()}" if grounding else "the model of the grounding stage", PAPER),
            "samples": samples,
            "took": Fact(HOURS[part, size], PAPER),
            **(
                {"packing": Fact("pairs of one screenshot in one conversation with many turns", PAPER)}
                if grounding
                else {
                    "inner monologue": Fact(
                        "thought and low-level instruction to 'all', then the action to 'os'", PAPER
                    )
                }
            ),
            "new tokens": Fact("<|recipient|> and <|diff_marker|>, rows at the mean of the others", CODE),
            "least pixels": Fact(256 * 28 * 28, CODE, note="of the processor's rule, whatever the image"),
            "precision": Fact("bf16", CODE),
            "memory": Fact("ZeRO-3", CODE),
        },
        sets={
            "objective.kind": Fact("next-token", CODE),
            "train": Fact(("projector", "llm"), f"{PAPER}; {CODE}", note="the tower is frozen, its merger is not"),
            "epochs": Fact(1.0, PAPER),
            "batch": Fact(128, PAPER),
            "data.max_tokens": Fact(8192, CODE),
            "data.labels": Fact(
                {"on": "answers", "special": "everywhere", "anywhere": ("\n",)},
                CODE,
                note="answers with their header, and turn marks, recipients and newlines wherever they stand",
            ),
            **({"data.join_groundings": Fact(True, f"{PAPER}; {CODE}")} if grounding else {}),
            "resolution.points": Fact(
                ((0.0, 46 * 26 * 28 * 28),), CODE, note="46 x 26 tokens of 28 x 28 pixels; the paper says 1280 x 720"
            ),
            "optimizer.kind": ADAM,
            "optimizer.lr": Fact(RATES[size], PAPER),
            "optimizer.weight_decay": Fact(0.0, CODE),
            "schedule.warmup": Fact(0.03, CODE, note="of the steps"),
            "schedule.shape": Fact("cosine", CODE),
            "schedule.final": Fact(0.0, CODE, note="where transformers' cosine ends"),
            "activation_checkpointing": Fact("full", CODE),
        },
    )


STAGES = tuple(_stage(part, size) for size in RATES for part in ("grounding", "planning"))
