# SPDX-License-Identifier: Apache-2.0
"""From a Hugging Face model (folder, hub id or GGUF file) to a :class:`~gptq_compile.passes.program.Program`."""
