"""Decoding for the model server: one base, many adapters, one batch. Others use what `__all__` names."""

from worker.serving.engine.asks import Ask, Broken, Ended, EngineEvent, EngineFull, EngineLimits, Piece, ServedAdapter
from worker.serving.engine.decoding import AdapterDoesNotFit
from worker.serving.engine.engine import Engine
from worker.serving.engine.sampling import Sampling, TokenLogprob
from worker.serving.engine.text import token_bytes

__all__ = [
    "AdapterDoesNotFit",
    "Ask",
    "Broken",
    "Ended",
    "Engine",
    "EngineEvent",
    "EngineFull",
    "EngineLimits",
    "Piece",
    "Sampling",
    "ServedAdapter",
    "TokenLogprob",
    "token_bytes",
]
