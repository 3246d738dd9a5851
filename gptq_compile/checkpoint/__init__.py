# SPDX-License-Identifier: Apache-2.0
"""GPTQ checkpoints in the layouts other tools use (``gptq`` and ``gptq_v2``): reading, checking, writing."""
