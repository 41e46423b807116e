"""How good a model is: perplexity, and how far it is from a reference.

Everything here works on a `Scorer`, something that gives logits for a window of tokens: a checkpoint
through the torch reference (`TorchScorer`), or whatever the caller brings, such as a bundle in the
runtime. May be imported by the commands; imports neither `mla_deploy.quant`, `mla_deploy.exporters`
nor `mla_deploy.runtime`.
"""

from mla_deploy.evaluate.scorer import Scorer
from mla_deploy.evaluate.scores import Comparison, Evaluation, evaluate
from mla_deploy.evaluate.text import Corpus, encode_text, read_text

__all__ = ["Comparison", "Corpus", "Evaluation", "Scorer", "encode_text", "evaluate", "read_text"]
