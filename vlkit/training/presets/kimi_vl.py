"""The stages of Kimi-VL and Kimi-VL-Thinking: 4.4 T tokens of pre-training in four stages, and post-training.

Sources: Kimi-VL, arXiv:2504.07491; Moonlight, arXiv:2502.16982, whose optimizer and language model it takes; Kimi k1.5,
arXiv:2501.12599, whose reinforcement learning it takes.
"""

from __future__ import annotations

from vlkit.training.presets.fact import Fact, Facts, Stage, Unknown, unknown

PAPER = "Kimi-VL, arXiv:2504.07491"
VIT, JOINT = f"{PAPER}, 'ViT Training Stages'", f"{PAPER}, 'Joint Pre-training Stage'"
COOLDOWN, LONG = f"{PAPER}, 'Joint Cooldown Stage'", f"{PAPER}, 'Joint Long-context Activation Stage'"
SFT, COT = f"{PAPER}, 'Joint Supervised Fine-tuning (SFT)'", f"{PAPER}, 'Long-CoT Supervised Fine-Tuning'"
RL, K15 = f"{PAPER}, 'Reinforcement Learning'", "Kimi k1.5, arXiv:2501.12599, section 2.3"
TABLE = f"{PAPER}, table of the pre-training stages"
FIGURE = f"{PAPER}, figure of the pre-training stages"
MUON = f"{PAPER}, 'Muon Optimizer'"

ALL = ("vision", "projector", "llm")
NO_SHAPE = unknown("the shape of the decay is not stated; fine-tuning studies of Moonlight used linear and cosine")
NO_WARMUP = unknown("not stated")
NO_PACKS = unknown("sequences per step are not stated; Moonlight's pre-training had 2048, then 4096 of 8,192 tokens")
NO_DECAY = unknown("not restated for Kimi-VL; Moonlight, arXiv:2502.16982, from which the optimizer is, had 0.1")
NO_BALANCE = unknown("not restated for Kimi-VL; Moonlight had 1e-3, and 0 in its cooldown")
ALL_TEXT = Fact({"on": "all"}, PAPER, "recalled", "next-token prediction of all text; which tokens is not spelt out")
ANSWERS = Fact(
    {"on": "answers", "special": "answers"}, SFT, note="answers and special tokens, no system or user prompts"
)
NEXT_TOKEN = Fact(
    "next-token", PAPER, "recalled", "the objective of a language model; not spelt out for the joint stages"
)


def _steps(tokens: str, length: int) -> Unknown:
    return unknown(f"{tokens} tokens; with p packs of {length:,} tokens these are {tokens} / ({length:,} p) steps")


def _optimizer(lr: Fact | Unknown, warmup: Fact | Unknown, shape: Fact | Unknown, final: Fact | Unknown) -> Facts:
    return {
        "optimizer.kind": Fact("muon", MUON, note="for all parts, throughout the training"),
        "optimizer.adjust_lr": Fact("match_rms_adamw", f"{MUON}; Moonlight, arXiv:2502.16982, section 2.2"),
        "optimizer.lr": lr,
        "optimizer.weight_decay": NO_DECAY,
        "schedule.warmup": warmup,
        "schedule.shape": shape,
        "schedule.final": final,
    }


def _joint(
    name: str, title: str, *, length: int, tokens: Fact, optimizer: Facts, about: Facts, sets: Facts | None = None
) -> Stage:
    """A stage of pre-training in which everything trains on text and images."""
    amount = f"{tokens.value / 1e12:g} T"
    return Stage(
        name,
        title,
        about={"tokens": tokens, **about},
        sets={
            "objective.kind": NEXT_TOKEN,
            "train": Fact(ALL, TABLE, "summary"),
            "steps|epochs": _steps(amount, length),
            "batch|packs": NO_PACKS,
            "data.pack_tokens": Fact(
                length, TABLE if length < 131_072 else LONG, "summary" if length < 131_072 else "read"
            ),
            "data.labels": ALL_TEXT,
            **(sets or {}),
            **optimizer,
            "balance_rate": NO_BALANCE,
        },
    )


_LONG_MIX: Facts = {
    "rope_theta": Fact(800_000.0, LONG, note="from 50,000"),
    "data.streams": Fact(
        ({"name": "long", "share": 0.25}, {"name": "replay", "share": 0.75}),
        LONG,
        note="of the tokens of each sub-stage",
    ),
}
_LONG_RATE = _optimizer(unknown("not stated"), NO_WARMUP, unknown("not stated"), unknown("not stated"))
_LONG_TOKENS = Fact(0.3e12, TABLE, "summary", "both sub-stages together")
_LONG_DATA = Fact(
    "long text, interleaved data, videos and documents, a few questions and answers; shorter data replayed", LONG
)


def _sft(name: str, title: str, *, length: int, peak: float, low: float, about: Facts, warmup: Unknown) -> Stage:
    return Stage(
        name,
        title,
        about={
            "tokens": unknown("one epoch; its tokens are not stated"),
            "data": Fact("text and vision-language instructions in ChatML, packed", SFT),
            "lowest rate": Fact(low, SFT),
            **about,
        },
        sets={
            "objective.kind": Fact("next-token", SFT),
            "train": Fact(ALL, SFT),
            "epochs": Fact(1.0, SFT),
            "batch|packs": unknown("not stated"),
            "data.pack_tokens": Fact(length, SFT, note="32k tokens" if length == 32_768 else "128k tokens"),
            "data.labels": ANSWERS,
            **_optimizer(Fact(peak, SFT), warmup, NO_SHAPE, Fact(0.1, SFT, note=f"{low:g} / {peak:g}")),
            "balance_rate": NO_BALANCE,
        },
    )


STAGES = (
    Stage(
        "kimi-vl/vit-coca",
        "MoonViT alone, contrastive and captioning",
        about={
            "tokens": Fact(2e12, VIT),
            "sequence length": Fact(8192, TABLE, "summary"),
            "data": Fact("images with alt texts, synthetic captions, grounding boxes and OCR texts", VIT),
            "begins with": Fact("SigLIP SO-400M for both encoders, a tiny decoder-only language model", VIT),
            "loss": Fact("SigLIP + 2 x caption", VIT, note="lambda = 2, as CoCa adds them"),
        },
        sets={
            "objective.kind": Fact("contrast", VIT),
            "objective.caption_weight": Fact(2.0, VIT),
            "train": Fact(
                ("vision",), VIT, note="with the text encoder and the text decoder, which belong to the objective"
            ),
            "steps|epochs": unknown("2 T tokens; samples per step are not stated"),
            "batch": unknown("not stated"),
            "resolution.points": unknown("larger images are allowed step by step; the sizes are not stated"),
            **_optimizer(unknown("not stated"), NO_WARMUP, unknown("not stated"), unknown("not stated")),
        },
    ),
    Stage(
        "kimi-vl/alignment",
        "MoonViT and projector to a language model that rests",
        about={
            "tokens": Fact(0.1e12, VIT),
            "data": Fact("as before", TABLE, "summary"),
            "aim": Fact("a lower perplexity of image features in the language model, for a smooth joint stage", VIT),
        },
        sets={
            "objective.kind": NEXT_TOKEN,
            "train": Fact(("vision", "projector"), VIT),
            "steps|epochs": _steps("0.1 T", 8192),
            "batch|packs": unknown("not stated"),
            "data.pack_tokens": Fact(8192, TABLE, "summary"),
            "data.labels": ALL_TEXT,
            **_optimizer(unknown("not stated"), NO_WARMUP, unknown("not stated"), unknown("not stated")),
            "balance_rate": Fact(0.0, VIT, note="the language model is frozen"),
        },
    ),
    _joint(
        "kimi-vl/joint",
        "Joint pre-training of everything, images joining text bit by bit",
        length=8192,
        tokens=Fact(1.4e12, JOINT),
        optimizer=_optimizer(
            unknown(
                "that of the language model's schedule, which goes on: Moonlight had come to 4.2e-5 after its 5.2 T tokens"
            ),
            Fact(0, JOINT, note="the language model's schedule goes on"),
            unknown("the language model's schedule, which goes on; Moonlight's was a cosine to 5.2 T"),
            unknown("not stated"),
        ),
        about={
            "begins with": Fact(
                "the checkpoint of Moonlight after 5.2 T tokens of text, 8,192 positions",
                f"{PAPER}, 'MoE Language Model'",
            ),
            "multimodal share": Fact(
                "0 in the first steps, then rising, to at most 0.4",
                f"{JOINT}; {FIGURE}",
                "summary",
                "the rise is read, the 0.4 is of a summary",
            ),
        },
        sets={"data.streams": unknown("text alone first, then a rising share of images; where it rises is not stated")},
    ),
    _joint(
        "kimi-vl/cooldown",
        "Joint cooldown on data of high quality",
        length=8192,
        tokens=Fact(0.6e12, TABLE, "summary"),
        optimizer=_optimizer(
            unknown("warmed up again to a higher rate, which is not stated; Moonlight's cooldown had 1e-4"),
            unknown("a warm-up, whose length is not stated; Moonlight's cooldown had 100 steps"),
            unknown("not stated; Moonlight's cooldown fell linearly"),
            unknown("not stated; Moonlight's cooldown fell to 0"),
        ),
        about={
            "data": Fact(
                "high-fidelity text, synthetic questions on math, knowledge and code, academic data as questions",
                COOLDOWN,
            ),
            "share of questions": Fact("low", COOLDOWN),
        },
        sets={"data.streams": unknown("text and images; their shares are not stated")},
    ),
    _joint(
        "kimi-vl/long-32k",
        "Joint long-context activation, 8,192 to 32,768 tokens",
        length=32_768,
        tokens=_LONG_TOKENS,
        optimizer=_LONG_RATE,
        about={"data": _LONG_DATA},
        sets=_LONG_MIX,
    ),
    _joint(
        "kimi-vl/long-128k",
        "Joint long-context activation, 32,768 to 131,072 tokens",
        length=131_072,
        tokens=_LONG_TOKENS,
        optimizer=_LONG_RATE,
        about={"data": _LONG_DATA},
        sets=_LONG_MIX,
    ),
    _sft(
        "kimi-vl/sft-32k",
        "Joint supervised fine-tuning at 32,768 tokens",
        length=32_768,
        peak=2e-5,
        low=2e-6,
        about={},
        warmup=NO_WARMUP,
    ),
    _sft(
        "kimi-vl/sft-128k",
        "Joint supervised fine-tuning at 131,072 tokens",
        length=131_072,
        peak=1e-5,
        low=1e-6,
        about={"rate": Fact("warmed up again", SFT)},
        warmup=unknown("warmed up again to 1e-5, in how many steps is not stated"),
    ),
    Stage(
        "kimi-vl/long-cot",
        "Supervised fine-tuning on a few long chains of thought",
        about={
            "data": Fact("small, of verified paths by prompting: planning, evaluation, reflection, exploration", COT),
            "tokens": unknown("'lightweight'; not stated"),
        },
        sets={
            "objective.kind": Fact("next-token", COT, note="a supervised fine-tuning"),
            "train": unknown("not stated; the stages around it train everything"),
            "steps|epochs": unknown("not stated"),
            "batch|packs": unknown("not stated"),
            "data.pack_tokens": unknown("not stated"),
            "data.labels": unknown("not stated; the fine-tuning before it: {on = 'answers', special = 'answers'}"),
            **_optimizer(unknown("not stated"), NO_WARMUP, NO_SHAPE, unknown("not stated")),
            "balance_rate": NO_BALANCE,
        },
    ),
    Stage(
        "kimi-vl/rl",
        "Reinforcement learning by online policy mirror descent",
        about={
            "reward": Fact("1 for a correct answer, else 0", RL),
            "length reward": Fact(
                "penalises responses that are too long; first without, then with a constant weight", f"{RL}; {K15}"
            ),
            "prompts": Fact(
                "from easy to hard, and those that fail more often", RL, note="curriculum and prioritised sampling"
            ),
        },
        sets={
            "objective.kind": Fact("mirror-descent", RL),
            "objective.verifier": unknown(
                "how answers are compared is yours: 'exact', 'number', 'boxed' or a function"
            ),
            "objective.tau": unknown("a strength above 0 that is not stated"),
            "objective.group": unknown("answers to a prompt, not stated"),
            "objective.max_new_tokens": unknown("not stated"),
            "objective.length_weight": unknown("of the reward for short answers, not stated"),
            "objective.length_from": unknown("training begins without it; until when is not stated"),
            "data.draws": unknown(
                "'curriculum' and 'prioritised' are both stated; a stage draws in one of the two ways"
            ),
            "train": unknown("not stated; the stages around it train everything"),
            "steps|epochs": unknown("not stated"),
            "batch": unknown("prompts per iteration are not stated"),
            **_optimizer(unknown("not stated"), NO_WARMUP, unknown("not stated"), unknown("not stated")),
            "balance_rate": NO_BALANCE,
        },
    ),
)
