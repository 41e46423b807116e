"""Reference modules: decoder blocks in torch over the deployment ops.

They are built on the meta device, carry the source of each parameter, and serve three ends: filled
from a checkpoint they are the reference; traced they become the graphs of the targets; counted
they say what a checkpoint must hold. They import `mla_deploy.ops`, `config`, `rope`, `sources` and
`recipe`.
"""
