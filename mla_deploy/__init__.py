"""mla-deploy: small, fast deployment of models with multi-head latent attention.

Here live the parts every other room builds on: configuration, checkpoints, families, the
reference modules in torch and the deployment ops they are written with, bundles, evaluation
and errors. They import nothing else of ours: not `mla_deploy.quant`, `mla_deploy.exporters`,
`mla_deploy.runtime` or `mla_deploy.cli`. Importing this module imports neither torch nor numpy.
"""

__version__ = "0.1.0"
