"""Train a small language model on any text, measure it, and let it go on writing.

python examples/train.py                        # on farfield's own source
python examples/train.py book.txt --steps 500
"""

import argparse
from pathlib import Path

import farfield
from farfield.nn import ModelConfig
from farfield.train import TrainConfig, evaluate, generate, load_codec, stream_text, train


def main(text=(), *, tokens=1024, batch=2, steps=100, width=128, out="runs/example", quiet=False):
    text = list(text) or [Path(farfield.__file__).parent]
    model_config = ModelConfig(
        width=width, layers=2, heads=2, attention="fma", attention_options={"block": 32, "near": 128, "rank": 8}
    )
    config = TrainConfig(text=text, tokens=tokens, batch=batch, steps=steps, warmup=steps // 10, out=out)
    result = train(model_config, config, progress=not quiet)

    found = evaluate(result.model, result.data.valid, windows=8)
    print(f"held out: {found.bits_per_byte:.3f} bits a byte, {found.early:.3f} early, {found.late:.3f} late")
    for bucket in found.by_repeat:
        print(f"  last repeat {bucket.name:>8}: {bucket.bits_per_byte:.3f} on {bucket.share:.0%} of the bytes")

    codec = load_codec(result.checkpoint)
    ids = generate(
        result.model, codec.encode("def attend(").tolist(), new_tokens=200, temperature=0.7, top_p=0.95, seed=0
    )
    for piece in stream_text(codec, ids):
        print(piece, end="", flush=True)
    print()
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("text", nargs="*", help="files, folders or globs; default: farfield's own source")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", default="runs/example")
    given = parser.parse_args()
    main(given.text, tokens=given.tokens, steps=given.steps, out=given.out)
