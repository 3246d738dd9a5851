# SPDX-License-Identifier: Apache-2.0
"""The way out to ONNX: a quantized program becomes a graph that ONNX Runtime and its generate loop run."""
