"""Running a bundle, imported as `mla_deploy.runtime`.

The Python face of the C++ core in `csrc/` and `include/`, and generation. It may import of the
core only what needs no torch (the bundle, errors, the tokenizer), because a bundle is run where
neither torch nor transformers is installed.
"""
