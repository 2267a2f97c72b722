"""ConversationWriter: messages -> pieces -> ids and labels, by a chat format or by a jinja template.

messages, what came beside them --written--> Written: images and videos, pieces
         what became of the images --encoded--> ids, labels
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vlkit.errors import SequenceTooLongError, TemplateError
from vlkit.processing import visuals
from vlkit.processing.chat import Message, Piece, Seen, Text, Visual, chat_pieces, check_messages, usual_parts
from vlkit.processing.chat_format import ChatFormat
from vlkit.processing.encoding import encode_pieces, fill_slots
from vlkit.processing.labels import LabelRule, labelled, learn_anywhere, names_answers, rule_of
from vlkit.processing.template import ChatTemplate, without_outer_marks
from vlkit.processing.template_answers import AnswerSearch
from vlkit.processing.tokenizer import Tokenizer


class Writing(NamedTuple):
    """How conversations are to be written; see `Processor.__call__`."""

    prompt: bool
    prefix: str
    rule: LabelRule | None
    thinking: bool | None
    tools: Sequence[Mapping[str, Any]] | None
    number_visuals: bool
    variables: dict[str, Any]


class Written(NamedTuple):
    """A conversation, the images and videos that it shows, and how it is written."""

    messages: Sequence[Message]
    visuals: list[Visual]
    pieces: list[Piece]


@dataclass(frozen=True)
class ConversationWriter:
    """Writes conversations for one model.

    Attributes:
        chat: How they are written.
        template: What writes them instead, or None.
        tokenizer: Its vocabulary.
        stop_ids: Ids that end an answer.
        max_length: Longest sequence in tokens, or None.
    """

    chat: ChatFormat
    template: ChatTemplate | None
    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]
    max_length: int | None

    def options(
        self,
        prompt: bool,
        prefix: str,
        labels: bool | LabelRule,
        thinking: bool | None,
        tools: Sequence[Mapping[str, Any]] | None,
        number_visuals: bool,
        variables: Mapping[str, Any] | None,
    ) -> Writing:
        """What was asked for, checked.

        Raises:
            TemplateError: What goes with no labels, or with a template alone.
            ConfigError: labels is neither a bool nor a LabelRule.
        """
        rule = rule_of(labels)
        if rule is not None and (prefix or thinking is not None):
            raise TemplateError(
                "answer_prefix and thinking begin an answer that is still to come; with labels it is there already"
            )
        if variables and self.template is None:
            raise TemplateError("template_variables are for a jinja template; this processor's chat format is not one")
        return Writing(prompt and rule is None, prefix, rule, thinking, tools, number_visuals, dict(variables or {}))

    def written(self, messages: Sequence[Message], images: list[Any], videos: list[Any], options: Writing) -> Written:
        """A conversation as pieces, and what it shows.

        Raises:
            TemplateError: A malformed conversation, or no answer where labels are asked for.
            PlaceholderMismatchError: Another number of images or videos than of parts without one.
        """
        messages = usual_parts(messages)
        found = visuals.filled(check_messages(messages, self.chat if self.template is None else None), images, videos)
        pieces = self._pieces(messages, options)
        if options.prefix:
            pieces.append(Text(options.prefix, special=self.chat.answer_tokens))
        no_answer = not any(isinstance(piece, Text) and piece.learn for piece in pieces)
        if options.rule is not None and options.rule.on == "answers" and no_answer:
            raise TemplateError("labels are asked for, but no message is the assistant's: there is nothing to learn")
        return Written(messages, found, pieces)

    def encoded(self, written: Written, seen: Sequence[Seen], rule: LabelRule | None) -> tuple[list[int], list[int]]:
        """Ids and labels, once it is known what became of the images.

        Raises:
            TemplateError: Nothing is written, or nothing is learned.
            SequenceTooLongError: More than max_length.
        """
        filled = fill_slots(written.pieces, self.chat, self.tokenizer.special, seen)
        if rule is not None:
            filled = labelled(filled, rule, written.messages)
        ids, labels = encode_pieces(filled, self.tokenizer)
        if not ids:
            raise TemplateError("nothing is written for this conversation: the template makes an empty text of it")
        if rule is not None and rule.anywhere:
            visual = (self.chat.image_token, self.chat.video_token)
            placeholders = [self.tokenizer.special[name] for name in visual if name is not None]
            labels = learn_anywhere(ids, labels, rule, self.tokenizer, placeholders)
        limit = self.max_length
        if limit is not None and len(ids) > limit:
            tokens = sum(sum(each.tokens) for each in seen)
            raise SequenceTooLongError(
                f"{len(ids)} tokens ({tokens} of them for {visuals.counted(written.visuals)}); at most {limit} fit. Shorten the "
                f"conversation, lower the limits of the image or video rule, or leave the sample out"
            )
        return ids, labels

    def _pieces(self, messages: Sequence[Message], options: Writing) -> list[Piece]:
        chat = self.chat
        if self.template is None:
            return chat_pieces(
                messages,
                chat,
                add_generation_prompt=options.prompt,
                thinking=options.thinking,
                tools=options.tools,
                number_visuals=options.number_visuals,
            )
        asked = {
            "tools": options.tools,
            "enable_thinking": options.thinking,
            "add_vision_id": options.number_visuals or None,
        }
        variables = {**options.variables, **{name: value for name, value in asked.items() if value is not None}}
        answers, rule = None, options.rule
        if rule is not None:
            by_message = names_answers(rule, messages)
            if rule.on == "answers" or by_message:
                stop = [name for name, id in self.tokenizer.special.items() if id in self.stop_ids]
                answers = AnswerSearch(stop, rule.special != "none" or (rule.on == "all" and by_message), by_message)
        pieces = self.template.pieces(
            [{key: value for key, value in message.items() if key != "loss"} for message in messages],
            self.tokenizer.special,
            chat.image_token,
            chat.video_token,
            answer_tokens=chat.answer_tokens,
            add_generation_prompt=options.prompt,
            variables=variables,
            answers=answers,
        )
        return without_outer_marks(pieces, chat)
