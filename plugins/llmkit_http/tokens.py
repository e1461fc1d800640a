"""/tokenize and /detokenize, in the form of vLLM's."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from pydantic import Field

from llmkit_http.chat import read_message
from llmkit_http.chat_schemas import ChatMessage
from llmkit_http.errors import bad_request
from llmkit_http.schemas import ERRORS, AnswerModel, RequestModel, TokenId
from llmkit_http.service import service
from llmkit_http.text import token_text
from llmkit_http.tools import spell_out

router = APIRouter(responses=ERRORS, tags=["Tokens"])


class TokenizeRequest(RequestModel):
    model: str | None = None
    prompt: str | None = Field(None, description="Text, or else messages.")
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    add_special_tokens: bool = Field(True, description="Put the begin token in front of a text, where there is one.")
    add_generation_prompt: bool = Field(True, description="End messages where the answer begins.")
    return_token_strs: bool | None = None


class TokenizeAnswer(AnswerModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(RequestModel):
    model: str | None = None
    tokens: list[TokenId]


class DetokenizeAnswer(AnswerModel):
    prompt: str


@router.post("/tokenize", response_model=TokenizeAnswer, summary="Text or a conversation as token ids")
async def tokenize(body: TokenizeRequest, request: Request) -> TokenizeAnswer:
    model = service(request).models.find(body.model)
    tokenizer = model.checkpoint.tokenizer
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("prompt: give either prompt or messages", "prompt")

    def encode() -> list[int]:
        from llmkit.chat import encode_chat

        if body.messages is not None:
            messages = spell_out([read_message(message, index) for index, message in enumerate(body.messages)], [])
            add = body.add_generation_prompt
            return encode_chat(model.checkpoint, messages, add_generation_prompt=add, plain=True)
        text = body.prompt or ""
        how = tokenizer.encode_prompt if body.add_special_tokens else tokenizer.encode
        return how(text, allow_special=True)

    try:
        ids = await asyncio.to_thread(encode)  # a body may hold megabytes of text, in messages too
    except ValueError as error:  # characters that the tokenizer lacks, or what the template refuses
        raise bad_request(str(error), "prompt" if body.messages is None else "messages") from None
    return TokenizeAnswer(
        count=len(ids),
        max_model_len=model.engine.context_length,
        tokens=ids,
        token_strs=[token_text(tokenizer, token) for token in ids] if body.return_token_strs else None,
    )


@router.post("/detokenize", response_model=DetokenizeAnswer, summary="Token ids as text")
async def detokenize(body: DetokenizeRequest, request: Request) -> DetokenizeAnswer:
    tokenizer = service(request).models.find(body.model).checkpoint.tokenizer
    if (highest := max(body.tokens, default=0)) >= tokenizer.vocab_size:
        raise bad_request(f"tokens: id {highest} is outside the vocabulary of {tokenizer.vocab_size}", "tokens")
    return DetokenizeAnswer(prompt=tokenizer.decode(body.tokens))
