#!/usr/bin/env python3
"""Speech to text: base64 audio in, segments out. usage: transcribe.py [--model NAME] [--beam N]"""
import argparse
import base64
import binascii
import io
import os
import sys
import tempfile
import wave
from datetime import datetime, timedelta, timezone
from enum import Enum
from typing import Annotated, List, Optional

import ogpu.service
from ogpu.service import expose, init, logger, start
from pydantic import BaseModel, Field, field_validator

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=os.getenv("WHISPER_MODEL", "base"), choices=["base", "large"])
parser.add_argument("--beam", type=int, default=5)
args = parser.parse_args()

MAX_SECONDS = float(os.getenv("MAX_SECONDS", "30"))
LANGUAGES = frozenset(filter(None, os.getenv("LANGUAGES", "en,de").split(",")))
DEBUG = os.getenv("DEBUG", "false").lower() in ("1", "true", "yes")

model = None


class Task(str, Enum):
    transcribe = "transcribe"
    translate = "translate"


class Audio(BaseModel):
    audio: bytes | str
    language: Optional[str] = Field(None, pattern="^[a-z]{2}$")
    task: Task = Task.transcribe
    temperature: Annotated[float, Field(ge=0, le=1)] = 0.0

    @field_validator("language")
    @classmethod
    def known(cls, value):
        if value is not None and value not in LANGUAGES:
            raise ValueError(f"language must be one of {sorted(LANGUAGES)}")
        return value


class Segment(BaseModel):
    id: int
    start: float
    end: float
    text: str


class Transcript(BaseModel):
    text: str
    language: str
    task: Task
    segments: List[Segment] = []
    duration: Optional[float] = None
    error: Optional[str] = None


class Whisper:
    def __init__(self, name, beam):
        self.name, self.beam = name, beam

    def transcribe(self, path):
        with wave.open(path) as sound:
            seconds = sound.getnframes() / sound.getframerate()
        count = int(seconds * 2)
        return seconds, [Segment(id=i, start=i / 2, end=i / 2 + 0.5, text=f" w{i}") for i in range(count)]


@init()
def load():
    global model
    model = Whisper(args.model, args.beam)
    logger.info(f"Model {model.name} (beam {model.beam}) from {os.path.basename(sys.argv[0])}")


@expose(timeout=60)
def transcribe(data: Audio) -> Transcript:
    language = data.language or "en"
    path = None
    try:
        assert isinstance(data.audio, str), type(data.audio)
        raw = base64.b64decode(data.audio.removeprefix("data:audio/wav;base64,"), validate=True)
        with tempfile.NamedTemporaryFile(suffix=".wav", delete=False) as file:
            file.write(raw)
            path = file.name
        seconds, segments = model.transcribe(path)
        if seconds > MAX_SECONDS:
            raise ValueError(f"the audio is longer than {MAX_SECONDS:g} s")
        text = "".join(s.text for s in segments).strip()
        return Transcript(
            text=text, language=language, task=data.task, segments=segments, duration=seconds
        )
    except binascii.Error:
        logger.task_fail("Could not transcribe: not base64")
        return Transcript(text="", language=language, task=data.task, error="not base64")
    except (wave.Error, EOFError, ValueError) as e:
        logger.task_fail(f"Could not transcribe: {e}")
        return Transcript(text="", language=language, task=data.task, error=str(e))
    finally:
        if path:
            os.unlink(path)


if __name__ == "__main__":
    start()
