"""TensorRT export: lowering tables by version, engines, bundles."""
