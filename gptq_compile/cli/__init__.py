# SPDX-License-Identifier: Apache-2.0
"""The command line: one module a command; none of them imports torch or TVM before the command runs."""
