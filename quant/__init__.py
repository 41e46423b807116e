"""Quantisation, imported as `mla_deploy.quant`.

The HQQ solver, weight packing, the cache record, rotation, bit allocation and, in `compress`,
the conversion of ordinary attention to MLA. It may import the core of `mla_deploy`; not
`mla_deploy.exporters`, `mla_deploy.runtime` or `mla_deploy.cli`.
"""
