"""Training steps as one CUDA graph."""

import pytest
import torch

from farfield.nn import ModelConfig
from farfield.train import Examples, Mqar, TrainConfig, fit
from farfield.train.synthetic import Drawn

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_graph_takes_the_same_steps(tmp_path, optimizer, accumulate):
    data = Drawn(Examples(Mqar(vocab=64, pairs=8), 256))
    model = ModelConfig(
        vocab=64, width=128, layers=2, heads=2, attention="fma", attention_options={"block": 64, "near": 64}
    )
    found = []
    for graph in (False, True):
        config = TrainConfig(
            tokens=256, batch=2, accumulate=accumulate, steps=20, warmup=6, optimizer=optimizer, dtype="bfloat16",
            device="cuda", graph=graph, log_every=1, save_every=0, out=str(tmp_path / f"{graph}"),
        )  # fmt: skip
        result = fit(model, config, data, progress=False)
        losses = [entry["loss"] for entry in result.history]
        found.append((losses, [p.detach() for p in result.model.parameters()]))
    (plain, own), (replayed, got) = found
    assert len(plain) == len(replayed) == 20
    assert replayed == pytest.approx(plain, rel=5e-3)
    # a rate that the graph had not followed would be far off: it warms up and falls to 0
    start = [p.detach() for p in _fresh(model)]
    for a, b, c in zip(own, got, start, strict=True):
        assert (a - b).norm() <= 0.1 * (a - c).norm() + 1e-6


def _fresh(model):
    from farfield.nn import build

    torch.manual_seed(0)
    return build(model).to("cuda").parameters()


def test_a_graph_goes_on_from_a_checkpoint(tmp_path):
    data = Drawn(Examples(Mqar(vocab=64, pairs=8), 256))
    model = ModelConfig(vocab=64, width=128, layers=1, heads=2, attention="full")

    def run(out, stop=None, resume=False):
        config = TrainConfig(
            tokens=256, batch=2, steps=16, warmup=3, dtype="bfloat16", device="cuda", graph=True, log_every=1,
            save_every=0, out=str(tmp_path / out),
        )  # fmt: skip
        return fit(model, config, data, resume=resume, progress=False, on_step=lambda n: n == stop)

    whole = run("whole")
    assert run("cut", stop=9).interrupted
    rest = run("cut", resume=True)
    assert [e["loss"] for e in rest.history] == pytest.approx([e["loss"] for e in whole.history], rel=5e-3)
