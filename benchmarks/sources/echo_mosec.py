"""The echo handler on Mosec. Runs in the environment that peer_mosec.py makes for it."""

from mosec import Server, Worker
from pydantic import BaseModel


class Text(BaseModel):
    text: str


class Echo(Worker):
    def deserialize(self, data: bytes) -> Text:
        return Text.model_validate_json(data)

    def forward(self, data: Text) -> Text:
        return Text(text=data.text)

    def serialize(self, data: Text) -> bytes:
        return data.model_dump_json().encode()


if __name__ == "__main__":
    server = Server()
    server.append_worker(Echo, num=1)
    server.run()
