"""Export, imported as `mla_deploy.exporters`.

Tracing of the reference modules, one lowering table per target and version, and the streaming
of weights beside the graph. It may import the core of `mla_deploy` and `mla_deploy.quant`; not
`mla_deploy.runtime` or `mla_deploy.cli`.
"""
