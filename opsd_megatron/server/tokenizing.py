"""/tokenize, /detokenize and /tokenizer_info, in the shapes of vLLM."""

from fastapi import APIRouter
from pydantic import BaseModel

from opsd_megatron.server.chat import Conversation
from opsd_megatron.server.jobs import Served
from opsd_megatron.server.refusal import Refusal
from opsd_megatron.server.wire import Dialect


class TokenizeText(Dialect):
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool | None = None


class TokenizeChat(Conversation):
    add_special_tokens: bool = False
    return_token_strs: bool | None = None


class TokenizeReply(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None


class DetokenizeRequest(Dialect):
    tokens: list[int]


class DetokenizeReply(BaseModel):
    prompt: str


class TokenizerInfo(BaseModel):
    vocab_size: int
    fingerprint: str
    """Equal for tokenizers that give the same pieces the same numbers."""
    chat_template: str | None
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None


def tokenizing_routes(served: Served) -> APIRouter:
    router = APIRouter()

    @router.post("/tokenize", response_model=TokenizeReply)
    async def tokenize(body: TokenizeText | TokenizeChat):
        text = served.need_text()
        if isinstance(body, TokenizeText):
            tokens = await served.encode(body.prompt, body.add_special_tokens)
        else:
            tokens = await body.token_ids(served, body.add_special_tokens)
        written = [text.pieces.get(token, "") for token in tokens] if body.return_token_strs else None
        longest = served.identity.max_model_len
        return {"tokens": tokens, "count": len(tokens), "max_model_len": longest, "token_strs": written}

    @router.post("/detokenize", response_model=DetokenizeReply)
    async def detokenize(body: DetokenizeRequest):
        text = served.need_text()
        served.check_ids(body.tokens)
        return {"prompt": text.decode(body.tokens, False)}

    @router.get("/tokenizer_info", response_model=TokenizerInfo)
    async def tokenizer_info():
        if served.text is None:
            raise Refusal(404, "the model directory has no tokenizer")
        return served.text.info()

    return router
