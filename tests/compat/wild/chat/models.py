from typing import List, Literal, Optional

from pydantic import BaseModel, Field


class Message(BaseModel):
    role: Literal["system", "user", "assistant"] = "user"
    content: str = "what is the capital of France?"


class InputData(BaseModel):
    messages: List[Message] = Field(..., min_length=1)
    temperature: float = Field(0.7, ge=0.0, le=2.0)
    max_tokens: Optional[int] = Field(default=None, gt=0)


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int


class ChatResult(Message):
    usage: Usage
    finish_reason: Optional[str] = None
