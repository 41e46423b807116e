"""ONNX export: tracing to graph, lowering tables, weight streaming, bundles."""

from mla_deploy.exporters.onnx.export import ExportReport, export_onnx

__all__ = ["ExportReport", "export_onnx"]
