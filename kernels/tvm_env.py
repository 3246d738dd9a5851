# SPDX-License-Identifier: Apache-2.0
"""The one place that imports TVM's compiler."""

from __future__ import annotations

import tvm
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

__all__ = ["I", "R", "T", "relax", "tvm"]
