"""Training, evaluation and generation on real text."""

from farfield.train.checkpoint import Checkpoint, load_codec, load_model, read
from farfield.train.codec import Bytes, Codec, Tokenizer, open_codec
from farfield.train.config import TrainConfig, pick_device
from farfield.train.data import Data, Split, open_data
from farfield.train.evaluate import Bucket, Evaluation, copy_probe, evaluate
from farfield.train.generate import generate, stream_text
from farfield.train.loop import TrainResult, fit, train
from farfield.train.optim import Optimizers
from farfield.train.synthetic import Examples, Mqar, Passkey, Recalled, recall

__all__ = [
    "Bucket",
    "Bytes",
    "Checkpoint",
    "Codec",
    "Data",
    "Evaluation",
    "Examples",
    "Mqar",
    "Optimizers",
    "Passkey",
    "Recalled",
    "Split",
    "Tokenizer",
    "TrainConfig",
    "TrainResult",
    "copy_probe",
    "evaluate",
    "fit",
    "generate",
    "load_codec",
    "load_model",
    "open_codec",
    "open_data",
    "pick_device",
    "read",
    "recall",
    "stream_text",
    "train",
]
