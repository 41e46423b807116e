"""Generate text from a bundle with stock onnxruntime: nothing of mla-deploy is imported.

    python examples/stock_onnxruntime.py BUNDLE "The keeper of the lighthouse" 32

Needs onnxruntime, numpy and tokenizers. The graph carries its latent attention as a function of
standard operators, so it runs on any onnxruntime with opset 24.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


def main(bundle: Path, prompt: str, max_tokens: int) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    session = onnxruntime.InferenceSession(
        bundle / manifest["graph"]["path"], providers=["CPUExecutionProvider"]
    )
    new = tokenizer.encode(prompt).ids

    # The arena: page 0 is scratch, pages 1, 2, ... are ours in order. Bound as input and as output,
    # it is updated in place.
    pages = -(-(len(new) + max_tokens) // manifest["cache"]["page_tokens"])
    block_table = np.arange(1, pages + 1, dtype=np.int64)[None]
    cache = {
        f"{index}.{part['name']}": onnxruntime.OrtValue.ortvalue_from_numpy(
            np.zeros((pages + 1, *part["page_shape"]), part["dtype"])
        )
        for index, layer in enumerate(manifest["cache"]["layers"])
        for part in layer["parts"]
    }

    tokens: list[int] = []
    past = 0
    while len(tokens) < max_tokens:
        binding = session.io_binding()
        binding.bind_output("logits")
        inputs = {
            "input_ids": [new],
            "past_lengths": [past],
            "new_lengths": [len(new)],
            "block_table": block_table,
            "logit_index": [[len(new) - 1]],
        }
        for name, value in inputs.items():
            binding.bind_cpu_input(name, np.asarray(value, np.int64))
        for name, value in cache.items():
            binding.bind_ortvalue_input(f"cache.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        session.run_with_iobinding(binding)
        past += len(new)
        best = int(binding.get_outputs()[0].numpy()[0, 0].argmax())
        if best in manifest["model"]["eos_token_ids"]:
            break
        tokens.append(best)
        new = [best]
    print(prompt + tokenizer.decode(tokens))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 64)
