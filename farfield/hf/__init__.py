"""farfield in Hugging Face Transformers: another attention in a loaded model, and its perplexity on long text.

    model = AutoModelForCausalLM.from_pretrained(...)
    farfield.hf.use(model, "fma", {"sinks": 4, "open": 8}, layers={0: "full", -1: "full"})

Needs Transformers 5: pip install 'farfield[hf]'.
"""

from farfield.hf.attention import NAME, in_use, use
from farfield.hf.perplexity import Perplexity, perplexity

__all__ = ["NAME", "Perplexity", "in_use", "perplexity", "use"]
