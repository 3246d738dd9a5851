# SPDX-License-Identifier: Apache-2.0
"""A server with OpenAI's routes over one compiled model; needs the extra ``serve`` (FastAPI, uvicorn, llguidance)."""
