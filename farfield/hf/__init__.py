"""farfield in Hugging Face Transformers: another attention in a loaded model, and its perplexity on long text.

    model = AutoModelForCausalLM.from_pretrained(...)
    farfield.hf.use(model, "fma", {"sinks": 4, "open": 8}, layers={0: "full", -1: "full"})

Needs Transformers 5: pip install 'transformers>=5'.
"""

from farfield.hf.attention import NAME, in_use, use
from farfield.hf.budget import Loss, count_layers, losses, plan, read_plan
from farfield.hf.perplexity import Perplexity, perplexity

__all__ = [
    "NAME", "Loss", "Perplexity", "count_layers", "in_use", "losses", "perplexity", "plan", "read_plan", "use",
]  # fmt: skip
