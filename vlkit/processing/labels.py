"""LabelRule: which tokens of a conversation a model learns to write.

    pieces, rule, "loss" of the messages --labelled--> pieces that know whether they are learnt --encode_pieces--> labels

Answers are never looked for in a text: every piece knows who wrote it. Placeholders of images and the first token of a sequence
are never learnt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from vlkit.config import Config
from vlkit.errors import ConfigError, TemplateError
from vlkit.processing.chat import IGNORED, FilledPiece, Label, Message, Text
from vlkit.processing.tokenizer import Tokenizer


class LabelRule(Config):
    """Which tokens of a conversation are learnt. The default is what labels=True means.

    A message may say "loss": false, and nothing of it is learnt; an answer may say "loss": true, and it is, whatever `turns`
    says. Where a jinja template writes the conversation, only answers are known by their message.

    Attributes:
        on: "answers": what the assistant says, and what closes its turns. "all": every token of text, for pre-training.
        special: Control tokens too: "answers" adds what opens the assistant's turns, such as "<|im_start|>assistant\\n" (as
            Kimi-VL's instruction tuning is described, arXiv:2504.07491). "everywhere" adds the special tokens and line breaks
            that the format writes around the turns of all roles. A jinja template's line breaks cannot be told from a
            person's; of those, only the special tokens are added.
        turns: Every answer, or the "last" one, as in UI-TARS, arXiv:2501.12326.
        anywhere: Names of special tokens, or texts of one token, that are learnt wherever they stand, also in what a person
            wrote. The published code of Aguvis, arXiv:2412.04454, is special = "everywhere" with anywhere = ("\\n",).
    """

    on: Literal["answers", "all"] = "answers"
    special: Literal["none", "answers", "everywhere"] = "none"
    turns: Literal["all", "last"] = "all"
    anywhere: tuple[str, ...] = ()

    def check(self) -> None:
        if self.on == "all" and (self.special != "none" or self.turns != "all" or self.anywhere):
            raise ConfigError("LabelRule: on='all' learns all text; special, turns and anywhere choose among answers")
        if "" in self.anywhere:
            raise ConfigError("LabelRule.anywhere: an empty text is no token")


def rule_of(labels: bool | LabelRule) -> LabelRule | None:
    """The rule that `labels` means: True is the default rule, False none.

    Raises:
        ConfigError: Something else.
    """
    if isinstance(labels, bool):
        return LabelRule() if labels else None
    if not isinstance(labels, LabelRule):
        raise ConfigError(f"labels is True, False or a LabelRule, found {type(labels).__name__}")
    return labels


def names_answers(rule: LabelRule, messages: Sequence[Message]) -> bool:
    """Whether it matters which message an answer belongs to, for a template that knows no other messages.

    Raises:
        TemplateError: It matters of another message.
    """
    for index, message in enumerate(messages):
        others = rule.on == "all" or rule.special == "everywhere"
        if others and message["role"] != "assistant" and message.get("loss") is False:
            raise TemplateError(
                f"message {index}: 'loss': false, but in what a jinja template writes only answers can be left out; for the "
                "family's own format, Processor(processor.config.replace(template=None), processor.tokenizer)"
            )
    return rule.turns == "last" or any(message.get("loss") is not None for message in messages)


def labelled(pieces: Sequence[FilledPiece], rule: LabelRule, messages: Sequence[Message]) -> list[FilledPiece]:
    """The pieces, each knowing whether it is learnt.

    Raises:
        TemplateError: Nothing is.
    """
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=-1)

    def label(piece: Text) -> Label:
        message = None if piece.message is None else messages[piece.message]
        loss = None if message is None else message.get("loss")
        if loss is False:
            return False
        if rule.on == "all":
            return True
        control: Label = "control" if piece.mark and rule.special == "everywhere" else False
        if piece.learn or (piece.mark and message is not None and message["role"] == "assistant"):
            wanted = rule.turns == "all" or piece.message == last or loss is True
            return True if wanted and (piece.learn or rule.special != "none") else control
        return control

    result = [piece._replace(label=label(piece)) if isinstance(piece, Text) else piece for piece in pieces]
    if not any(isinstance(piece, Text) and piece.label is True for piece in result):
        raise TemplateError("labels are asked for, but every answer says 'loss': false: there is nothing to learn")
    return result


def learn_anywhere(
    ids: Sequence[int], labels: Sequence[int], rule: LabelRule, tokenizer: Tokenizer, placeholders: Sequence[int]
) -> list[int]:
    """The labels, with the tokens that the rule names learnt wherever they stand.

    Raises:
        ConfigError: A text is not one token, or is a placeholder.
    """
    wanted = set()
    for text in rule.anywhere:
        found = [tokenizer.special[text]] if text in tokenizer.special else tokenizer.encode(text)
        if len(found) != 1 or found[0] in placeholders:
            what = "stands for an image or a video" if len(found) == 1 else f"is {len(found)} tokens"
            raise ConfigError(f"LabelRule.anywhere: {text!r} {what}; expected the text of one token")
        wanted.add(found[0])
    chosen = [id if id in wanted else label for id, label in zip(ids, labels, strict=True)]
    return [IGNORED, *chosen[1:]]
