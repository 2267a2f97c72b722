"""ChatFormat: how a family writes a conversation, as data; and the formats that are known."""

from __future__ import annotations

import re
from typing import Literal

from vlkit.config import Config
from vlkit.errors import ConfigError


class Turn(Config):
    """What surrounds the content of one role.

    Attributes:
        role: The role as messages name it.
        prefix: Written before the content.
        suffix: Written after it. In an answer it is learned with the text.
    """

    role: str
    prefix: str
    suffix: str


class ChatFormat(Config):
    """How a conversation becomes one text. Strings may hold special tokens by name.

    Attributes:
        turns: The roles; "assistant" must be one of them, its prefix is the generation prompt.
        separator: Written between two turns, before the prefix of the second.
        image_token: Stands for one visual token; repeated as often as the projector gives tokens.
        image_prefix: Written before an image; "{number}" becomes 1, 2, ... over the conversation.
        image_suffix: Written after it.
        image_number: Written before an image if numbers are asked for, with "{number}".
        video_token: Stands for one visual token of a video, or None where videos are unknown.
        video_prefix: Written before a video; "{number}" as for images, counted apart.
        video_suffix: Written after it.
        video_number: Written before a video if numbers are asked for, with "{number}".
        frame_prefix: Written before every time step of a video, "{seconds}" is its time to one decimal. If it or
            frame_suffix is not empty, every time step is an item of its own for the model.
        frame_suffix: Written after every time step.
        default_system: Content of the system turn that a conversation without one gets, or None.
        stop: Tokens that end an answer.
        answer_tokens: Special tokens that are read as such inside an answer, if the tokenizer has them.
        answer_prompt: Written after the assistant's prefix where an answer is asked for.
        thinking_on: Written in its place if thinking is asked for; None where a model has no such switch.
        thinking_off: Written in its place if no thinking is asked for; None where a model has no such switch.
        thinking: What becomes of the thinking in answers. "text": it is text like any other. "cut": answers before the
            last question lose everything up to thinking_end. "qwen3": they lose what stands between "<think>" and
            "</think>"; later ones get both marks on lines of their own, and the thinking may come as the message's
            "reasoning_content".
        thinking_end: Where the thinking of an answer ends, for "cut".
        tools: Whether tools, calls of tools and their results are written, in Qwen's way.
    """

    turns: tuple[Turn, ...]
    separator: str = ""
    image_token: str
    image_prefix: str = ""
    image_suffix: str = ""
    image_number: str = "Picture {number}: "
    video_token: str | None = None
    video_prefix: str = ""
    video_suffix: str = ""
    video_number: str = "Video {number}: "
    frame_prefix: str = ""
    frame_suffix: str = ""
    default_system: str | None = None
    stop: tuple[str, ...] = ()
    answer_tokens: tuple[str, ...] = ()
    answer_prompt: str = ""
    thinking_on: str | None = None
    thinking_off: str | None = None
    thinking: Literal["text", "cut", "qwen3"] = "text"
    thinking_end: str | None = None
    tools: bool = False

    def check(self) -> None:
        roles = self.roles
        if len(set(roles)) != len(roles) or "assistant" not in roles:
            raise ConfigError(
                f"ChatFormat.turns: roles must differ and include 'assistant', found {', '.join(roles) or 'none'}"
            )
        if (self.default_system is not None or self.tools) and "system" not in roles:
            raise ConfigError("ChatFormat.default_system and tools need a turn for the role 'system'")
        if self.tools and "user" not in roles:
            raise ConfigError("ChatFormat.tools needs a turn for the role 'user'")
        if not self.image_token or self.video_token == "":
            raise ConfigError("ChatFormat.image_token or video_token is empty")
        if (self.thinking == "cut") != bool(self.thinking_end):
            raise ConfigError("ChatFormat: thinking 'cut' and thinking_end belong together")

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(turn.role for turn in self.turns)

    @property
    def frames_apart(self) -> bool:
        """Whether every time step of a video is an item of its own."""
        return bool(self.frame_prefix or self.frame_suffix)

    def turn(self, role: str) -> Turn:
        return self.turns[self.roles.index(role)]

    def special_names(self, *, written: bool = True) -> list[str]:
        """Special tokens that the format needs, and those it writes if asked: in its strings they look like "<|name|>"."""
        needed = [self.image_token, *([self.video_token] if self.video_token else []), *self.stop]
        if written:
            texts = [self.separator, self.image_prefix, self.image_suffix, self.video_prefix, self.video_suffix]
            texts += [self.frame_prefix, self.frame_suffix]
            texts += [text for turn in self.turns for text in (turn.prefix, turn.suffix)]
            needed += [name for text in texts for name in re.findall(r"<\|[^|<>]+\|>|</?img>", text)]
        return list(dict.fromkeys(needed))


def _turns(template: str, suffix: str) -> tuple[Turn, ...]:
    roles = ("system", "user", "assistant")
    return tuple(Turn(role=role, prefix=template.format(role=role), suffix=suffix) for role in roles)


_KIMI = ChatFormat(
    turns=_turns("<|im_{role}|>{role}<|im_middle|>", "<|im_end|>"),
    image_prefix="<|media_start|>image<|media_content|>",
    image_token="<|media_pad|>",
    image_suffix="<|media_end|>",
    default_system="You are a helpful assistant",
    stop=("<|im_end|>", "[EOS]"),
)
_CHATML = ChatFormat(
    turns=_turns("<|im_start|>{role}\n", "<|im_end|>\n"),
    image_prefix="<|vision_start|>",
    image_token="<|image_pad|>",
    image_suffix="<|vision_end|>",
    video_prefix="<|vision_start|>",
    video_token="<|video_pad|>",
    video_suffix="<|vision_end|>",
    default_system="You are a helpful assistant.",
    stop=("<|im_end|>", "<|endoftext|>"),
)
_QWEN3_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
_QWEN3_VL = _CHATML.replace(
    default_system=None,
    video_prefix="",
    video_suffix="",
    frame_prefix="<{seconds} seconds><|vision_start|>",
    frame_suffix="<|vision_end|>",
    answer_tokens=_QWEN3_TOKENS,
    tools=True,
)
CHAT_FORMATS: dict[str, ChatFormat] = {
    # Kimi-VL, arXiv:2504.07491, as its Hub repository writes conversations: no line breaks, no BOS.
    "kimi": _KIMI,
    # The same where thoughts end with a mark: earlier answers are shown without them.
    "kimi-thinking": _KIMI.replace(thinking="cut", thinking_end="◁/think▷"),
    # Qwen2-VL and Qwen2.5-VL, arXiv:2409.12191. What closes an answer includes its line break, as in Qwen's own training.
    "chatml": _CHATML,
    # Qwen3-VL, as its checkpoints were published: no marks around a whole video. Where a video has an extra pair around
    # it (transformers from 5.10 on), set video_prefix and video_suffix as in "chatml".
    "qwen3-vl": _QWEN3_VL,
    "qwen3-vl-thinking": _QWEN3_VL.replace(thinking="qwen3", answer_prompt="<think>\n", thinking_on="<think>\n"),
    # Qwen3, arXiv:2505.09388: the template of its text models, which AndesVL's repositories carry too.
    "qwen3": _QWEN3_VL.replace(thinking="qwen3", thinking_on="", thinking_off="<think>\n\n</think>\n\n"),
    # AndesVL, arXiv:2510.11496, as its own `chat` writes it. The vocabulary is Qwen3's with the two marks around an image
    # renamed; thinking is asked for by its first mark alone.
    "andesvl": _CHATML.replace(
        image_prefix="<img>",
        image_token="<|vision_pad|>",
        image_suffix="</img>",
        video_prefix="",
        video_token=None,
        video_suffix="",
        default_system=None,
        answer_tokens=_QWEN3_TOKENS,
        thinking_on="<think>",
        thinking_off="",
    ),
    # Qwen-VL-Chat, arXiv:2308.12966: the line break stands before a turn, not behind it.
    "qwen-vl": _CHATML.replace(
        turns=_turns("<|im_start|>{role}\n", "<|im_end|>"),
        separator="\n",
        image_prefix="Picture {number}: <img>",
        image_token="<imgpad>",
        image_suffix="</img>\n",
        image_number="",
        video_prefix="",
        video_token=None,
        video_suffix="",
        stop=("<|im_end|>", "<|im_start|>", "<|endoftext|>"),
    ),
    # vlkit's own, for the byte tokenizer: as few ids as possible.
    "plain": ChatFormat(
        turns=_turns("<|im_{role}|>", "<|im_end|>"),
        image_prefix="<|media_start|>",
        image_token="<|media_pad|>",
        image_suffix="<|media_end|>",
        stop=("<|im_end|>", "<|eos|>"),
    ),
}
"""Known formats by name."""
