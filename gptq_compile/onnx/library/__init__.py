# SPDX-License-Identifier: Apache-2.0
"""The shared library with which ONNX Runtime runs a model's ``gptq_compile`` operators."""
