# SPDX-License-Identifier: Apache-2.0
"""Quality of a compiled artifact: perplexity of what was compiled, not of a model that stands for it."""
