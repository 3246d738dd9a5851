# SPDX-License-Identifier: Apache-2.0
"""Writing what a compilation leaves: the artifact folder and the dequantized Hugging Face folder."""
