"""How good a model is, perplexity and distance to a reference, and how fast.

Quality is measured on a `Scorer`, something that gives logits for a window of tokens: a checkpoint
through the torch reference (`TorchScorer`), or whatever the caller brings, such as a bundle in the
runtime. Speed (`speed`) is measured on whatever session the caller brings. Imports neither
`mla_deploy.quant`, `mla_deploy.exporters` nor `mla_deploy.runtime`.
"""

from mla_deploy.evaluate.scorer import Scorer
from mla_deploy.evaluate.scores import Comparison, Evaluation, evaluate
from mla_deploy.evaluate.text import Corpus, encode_text, read_text

__all__ = ["Comparison", "Corpus", "Evaluation", "Scorer", "encode_text", "evaluate", "read_text"]
