"""Applies a checkpoint's chat template, and finds out by trying what it can do: tools, reasoning, contents as texts.

Knows no media and no tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from model.request import ChatFormat, ToolCall

Turns = list[dict[str, Any]]
Tools = Sequence[Mapping[str, Any]]

# Variables of templates that are not for clients.
OWN = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template"})
THINKING = ("enable_thinking", "thinking")  # the names of the variable that turns thinking on and off
MARKERS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("\u25c1think\u25b7", "\u25c1/think\u25b7"))
# Settings of the reasoning parser, with the markers that each reads.
REASONING_PARSERS = {
    **dict.fromkeys(("deepseek_r1", "qwen3", "glm45"), MARKERS[0]),
    "mistral": MARKERS[1],
    "kimi": MARKERS[2],
}
# How templates write a call, by format; the first that is found counts.
NOTATIONS = {
    "qwen3_coder": re.compile(r"<function=probe>"),
    "glm45": re.compile(r"<arg_key>"),
    "hermes": re.compile(r"<tool_call>\s*\{"),
    "mistral": re.compile(r"\[TOOL_CALLS\]"),
    "llama3_json": re.compile(r'"name":\s*"probe".*"parameters":', re.DOTALL),
    "pythonic": re.compile(r"\bprobe\("),
}
TOOL_CALL_PARSERS = tuple(NOTATIONS)
# What may be a token of its own in the notations of calls.
CALL_TEXTS = (
    *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
)
MARKUP = 40  # characters before a call's name that may belong to its notation
PROBE = "Q7x"
CALL = ToolCall("Probe1234", "probe", f'{{"value": "{PROBE}"}}')
TOOL = {
    "type": "function",
    "function": {
        "name": "probe",
        "description": "Probes.",
        "parameters": {"type": "object", "properties": {"value": {"type": "string", "description": "What."}}},
    },
}
HELLO = [{"type": "text", "text": "Hello"}]


class ChatTemplate:
    """The chat template of one checkpoint.

    markers: the texts around reasoning, None without; variables: those that a client may set; knows_tools: whether it
    describes tools by itself; text_roles: whose content must be a text where it has no media, not a list of parts;
    text_arguments: whether a call's arguments must be JSON text, not an object; short_ids: whether ids of calls must
    have nine letters and digits; takes_system: whether it takes a system message.
    """

    def __init__(self, processor: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take the processor's own template, and try it."""
        self._processor, self._tokenizer = processor, tokenizer
        template = getattr(processor, "chat_template", None) or tokenizer.chat_template
        self._named: dict[str, str] = template if isinstance(template, dict) else {}
        self.source = str(self._named.get("default", "") if self._named else template)
        known = chat_template_utils._get_template_variables(self.source)
        self.markers = next((pair for pair in MARKERS if pair[1] in self.source), None)
        self.variables = known - OWN - {*tokenizer.special_tokens_map}
        self.text_arguments = False
        self.short_ids = False
        self.text_roles: frozenset[str] = frozenset()
        for role in ("user", "system", "assistant"):
            self.text_roles |= {role} if self._needs_text(role) else set()
        self.takes_system = self._shows("system", as_text="system" in self.text_roles)
        with_tools = self._tried([self.greeting], tools=[TOOL])
        self.knows_tools = with_tools is not None and with_tools != self._tried([self.greeting])
        self.written_call = self._try_calls() if self.knows_tools else ""
        if self.knows_tools and self._needs_text("tool"):
            self.text_roles |= {"tool"}

    def render(
        self,
        turns: Turns,
        *,
        tools: Tools = (),
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Apply the template. Variables that it does not know are ignored. Raises whatever the template raises."""
        # Named only where it is not the processor's own: some processors have a second one for videos.
        own = None if getattr(self._processor, "chat_template", None) else self.source
        known = {name: value for name, value in (variables or {}).items() if name in self.variables}
        return str(
            self._processor.apply_chat_template(
                turns,
                chat_template=self._named.get("tool_use", own) if tools else own,
                tools=[dict(tool) for tool in tools] or None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **known,
            )
        )

    def format(self, tool_call_parser: str = "auto", reasoning_parser: str = "auto") -> ChatFormat:
        """Describe answers as this template has them; a parser other than "auto" is taken as it is, "off" is none."""
        found = next((name for name, pattern in NOTATIONS.items() if pattern.search(self.written_call)), "hermes")
        calls = {"auto": found, "off": ""}.get(tool_call_parser, tool_call_parser)
        markers = REASONING_PARSERS.get(reasoning_parser)
        if reasoning_parser == "auto":
            markers = self.markers
        thinking = next((name for name in THINKING if name in self.variables), "") if markers else ""
        switches: tuple[dict[str, bool], ...] = ({}, {thinking: True}, {thinking: False})
        thinks, thinks_on, thinks_off = (markers is not None and self._opens(markers, each) for each in switches)
        added = self._tokenizer.added_tokens_encoder
        texts = (*CALL_TEXTS, *(markers or ()))
        return ChatFormat(
            calls=calls,
            described=not self.knows_tools,
            reasoning=markers,
            thinking=thinking,
            thinks=thinks or reasoning_parser == "deepseek_r1",
            thinks_on=thinks_on,
            thinks_off=thinks_off,
            tokens=tuple((text, added[text]) for text in texts if text in added),
        )

    # --- probes

    def _tried(self, turns: Turns, **options: Any) -> str | None:
        """Render; None where the template refuses."""
        try:
            return self.render(turns, **options)
        except Exception:  # a template may raise any error
            return None

    @property
    def greeting(self) -> dict[str, Any]:
        """Return the shortest conversation's only turn."""
        return {"role": "user", "content": "Hello" if "user" in self.text_roles else HELLO}

    def _needs_text(self, role: str) -> bool:
        """Return whether only a text is rendered as it should for a role's content."""
        return not self._shows(role, as_text=False) and self._shows(role, as_text=True)

    def _shows(self, role: str, *, as_text: bool) -> bool:
        """Return whether a role's content is rendered as it should: it comes out, and no list of parts around it."""
        turn: dict[str, Any] = {"role": role, "content": PROBE if as_text else [{"type": "text", "text": PROBE}]}
        turns = [turn]
        if role == "system":
            turns = [turn, self.greeting]
        elif role == "assistant":
            turns = [self.greeting, turn]
        elif role == "tool":
            turns = [self.greeting, self._calling(), turn | {"name": CALL.name, "tool_call_id": CALL.id}]
        rendered = self._tried(turns, tools=[TOOL] if role == "tool" else []) or ""
        # A call before it has the probe in its arguments.
        shown = rendered.count(PROBE) == (2 if role == "tool" else 1)
        return shown and not re.search(rf"""['"]text['"]: ['"]{PROBE}""", rendered)

    def _calling(self) -> dict[str, Any]:
        """Return the turn of a call."""
        arguments = CALL.arguments if self.text_arguments else json.loads(CALL.arguments)
        function = {"name": CALL.name, "arguments": arguments}
        content = "" if "assistant" in self.text_roles else []
        return {
            "role": "assistant",
            "content": content,
            "tool_calls": [{"id": CALL.id, "type": "function", "function": function}],
        }

    def _try_calls(self) -> str:
        """Find out how calls are passed, and return how the template writes one; "" if it writes none."""
        for self.text_arguments in (False, True):
            turns: Turns = [self.greeting, self._calling()]
            rendered = self._tried(turns, tools=[TOOL], add_generation_prompt=False) or ""
            if PROBE in rendered:
                turns[1]["tool_calls"][0]["id"] = f"call_{CALL.id}"
                self.short_ids = self._tried(turns, tools=[TOOL], add_generation_prompt=False) is None
                name = rendered.rfind(CALL.name, 0, rendered.rfind(PROBE))
                return rendered[max(0, name - MARKUP) :]
        self.text_arguments = False
        return ""

    def _opens(self, markers: tuple[str, str], variables: Mapping[str, Any]) -> bool:
        """Return whether a prompt ends within the reasoning."""
        rendered = self._tried([self.greeting], variables=variables) or ""
        return rendered.rfind(markers[0]) > rendered.rfind(markers[1])
