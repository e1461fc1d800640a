"""Request and answers of /v1/chat/completions."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from llmkit_http.schemas import AnswerModel, RequestModel, SamplingFields, Usage

Reason = Literal["stop", "length", "tool_calls"]


class ContentPart(RequestModel):
    type: str = Field(description="text; others are not supported.")
    text: str | None = None


class FunctionCall(RequestModel):
    name: str
    arguments: str = Field(description="JSON.")


class ToolCall(RequestModel):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(RequestModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class FunctionTool(RequestModel):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of the arguments.")
    strict: bool | None = Field(None, description="Ignored: arguments always follow the schema.")


class Tool(RequestModel):
    type: Literal["function"]
    function: FunctionTool


class ToolName(RequestModel):
    name: str


class NamedTool(RequestModel):
    type: Literal["function"]
    function: ToolName


class JsonSchema(RequestModel):
    name: str
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    description: str | None = None
    strict: bool | None = Field(None, description="Ignored: the answer always follows the schema.")


class ResponseFormat(RequestModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(SamplingFields):
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, description="What the context holds where it is not given.")
    max_completion_tokens: int | None = Field(None, ge=1, description="The same; it counts where both are given.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = Field(None, description="False: at most one call in an answer.")
    response_format: ResponseFormat | None = None
    chat_template: None = Field(None, description="Not taken: a template is a program, and comes with the model.")


class TopLogprob(AnswerModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ContentLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(AnswerModel):
    content: list[ContentLogprob]
    refusal: None = None


class AnswerCall(AnswerModel):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class AnswerMessage(AnswerModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[AnswerCall] | None = None


class ChatChoice(AnswerModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Reason


class ChatCompletion(AnswerModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None = None
