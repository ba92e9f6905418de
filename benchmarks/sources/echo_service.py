"""The echo handler on ogpu.service."""

from pydantic import BaseModel

import ogpu.service


class Text(BaseModel):
    text: str


@ogpu.service.expose(timeout=30)
def echo(data: Text) -> Text:
    return Text(text=data.text)


ogpu.service.start()
